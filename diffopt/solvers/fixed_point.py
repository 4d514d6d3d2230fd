r"""`fixed_point`: find what a map leaves where it is, and differentiate it.

.. math:: x^\star = T(x^\star, \theta)
"""

from collections.abc import Callable
from typing import Any

from diffopt import tree
from diffopt.implicit.adjoints import Implicit
from diffopt.implicit.optimality import fixed_point_map
from diffopt.implicit.protocol import Adjoint, Equation
from diffopt.solvers.anderson import Anderson
from diffopt.solvers.iterate import Norm, Solver, options
from diffopt.solvers.root import shaped
from diffopt.solvers.solution import Solution
from diffopt.solvers.verb import solve
from diffopt.typing import Tree

__all__ = ["fixed_point"]


def fixed_point(
    fn: Callable[..., Tree],
    init: Tree,
    args: tuple = (),
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    norm: Norm = "max",
    max_steps: int = 1000,
    throw: bool | None = None,
    callback: Callable[[Any], None] | None = None,
    history: bool = False,
) -> Solution:
    r"""Solve :math:`x = T(x, \theta)` for `x`.

    .. math:: \|T(x) - x\| \le \text{atol} + \text{rtol}\,\|T(x_0) - x_0\|

    Composes with every transform. Under `vmap` each lane stops on its own.

    Args:
        fn: `T(x, *args)`, shaped like `x`.
        init: Where to start, a tree of floating-point tensors of one dtype; it carries no gradient.
        args: Further arguments, trees; these, and what `fn` captures, are differentiated.
        solver: `Anderson()` by default, or `FixedPointIteration()`, `SQUAREM()`, `Aitken()`.
        adjoint: How the solution is differentiated; `Implicit()` by default, by the equation :math:`x - T(x) = 0`.
            `Implicit(Neumann(n))` takes `n` steps of the iteration's own adjoint.
        rtol: Relative tolerance; None is :math:`\varepsilon^{2/3}` of the dtype.
        atol: Absolute tolerance; None is :math:`\varepsilon^{1/2}`.
        norm: "max", "rms", "l2", or a function of the residual.
        max_steps: The most steps.
        throw: Whether to raise where a lane fails; by default in eager code. Without, the best iterate is returned.
        callback: Called with the solver's state after every step.
        history: Whether to record the norm of every step, in `stats.history`.

    Returns:
        The solution.

    Raises:
        SolverError: If a lane did not converge, and `throw` is not False.
        ValueError: If `fn` does not return a tree shaped like `init`.

    Example:
        >>> import torch
        >>> solution = fixed_point(lambda x, a: torch.cos(x) + a, torch.tensor(0.5), (torch.tensor(0.0),))
        >>> solution.value, solution.message
        (tensor(0.7391), 'converged')

    References:
        Walker and Ni (2011), Anderson acceleration for fixed-point iterations, section 2.
    """
    settings = options(rtol, atol, norm, max_steps, callback, history)
    mapping = shaped("fixed_point", fn, "a map of its unknowns to themselves. For equations use `root`")

    def problem(unravel, args):
        return lambda x: tree.ravel(mapping(unravel(x), *args))[0]

    return solve(
        "fixed_point", Anderson() if solver is None else solver, problem, Equation(fixed_point_map(mapping)), init,
        args, adjoint=Implicit() if adjoint is None else adjoint, settings=settings, throw=throw,
    )  # fmt: skip
