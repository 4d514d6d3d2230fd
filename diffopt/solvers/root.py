r"""`root`: solve a system of equations, and differentiate the solution.

.. math:: F(x^\star, \theta) = 0
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffopt import tree
from diffopt.implicit.adjoints import Implicit
from diffopt.implicit.protocol import Adjoint, Equation
from diffopt.solvers.iterate import Norm, Solver, options
from diffopt.solvers.newton import Newton
from diffopt.solvers.solution import Solution
from diffopt.solvers.verb import solve
from diffopt.typing import Tree

__all__ = ["root", "shaped"]


def root(
    fn: Callable[..., Tree],
    init: Tree,
    args: tuple = (),
    *,
    solver: Solver | None = None,
    adjoint: Adjoint | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    norm: Norm = "max",
    max_steps: int = 100,
    throw: bool | None = None,
    callback: Callable[[Any], None] | None = None,
    history: bool = False,
) -> Solution:
    r"""Solve :math:`F(x, \theta) = 0` for `x`.

    .. math:: \|F(x)\| \le \text{atol} + \text{rtol}\,\|F(x_0)\|

    Composes with every transform. Under `vmap` each lane stops on its own.

    Args:
        fn: `F(x, *args)`, shaped like `x`.
        init: Where to start, a tree of floating-point tensors of one dtype; it carries no gradient.
        args: Further arguments, trees; these, and what `fn` captures, are differentiated.
        solver: `Newton()` by default, or `Chord()`, `Broyden()`, `SciPyRoot()`.
        adjoint: How the solution is differentiated; `Implicit()` by default.
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
        >>> solution = root(lambda x, a: torch.cos(x) + a - x, torch.tensor(0.5), (torch.tensor(0.0),))
        >>> solution.value, solution.message
        (tensor(0.7391), 'converged')

    References:
        Nocedal and Wright (2006), Numerical Optimization, chapter 11.
    """
    settings = options(rtol, atol, norm, max_steps, callback, history)
    equation = shaped("root", fn, "one equation for each unknown. For residuals use `least_squares`")

    def problem(unravel, args):
        return lambda x: tree.ravel(equation(unravel(x), *args))[0]

    return solve(
        "root", Newton() if solver is None else solver, problem, Equation(equation), init, args,
        adjoint=Implicit() if adjoint is None else adjoint, settings=settings, throw=throw,
    )  # fmt: skip


def shaped(verb: str, fn: Callable[..., Tree], advice: str) -> Callable[..., Tree]:
    """The function, refusing a value that is not shaped like its first argument."""

    def checked(x: Tree, *args: Tree) -> Tree:
        value = fn(x, *args)
        try:
            tree.check_like(value, x, name="its value", reference_name="x")
        except (TypeError, ValueError) as error:
            both = isinstance(value, Tensor) and isinstance(x, Tensor) and value.shape != x.shape
            found = f"got {tuple(value.shape)} for x {tuple(x.shape)}" if both else str(error).rstrip(".")  # pyright: ignore
            raise type(error)(f"`{verb}` needs fn(x) shaped like x; {found}: {advice}") from None
        return value

    return checked
