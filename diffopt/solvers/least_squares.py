r"""`least_squares`: minimize a sum of squares, possibly in a box, and differentiate the minimizer.

.. math:: x^\star(\theta) \in \arg\min_{l \le x \le u} \tfrac12 \|r(x, \theta)\|^2
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from diffopt import tree
from diffopt.implicit.adjoints import Implicit
from diffopt.implicit.protocol import Adjoint, Equation
from diffopt.solvers.bounds import check_bounds, crossed_bounds, flat_bounds
from diffopt.solvers.iterate import Norm, Solver, options
from diffopt.solvers.levenberg_marquardt import LevenbergMarquardt
from diffopt.solvers.residuals import Residuals
from diffopt.solvers.solution import Solution
from diffopt.solvers.verb import solve
from diffopt.typing import Tree

__all__ = ["least_squares"]


def least_squares(
    fn: Callable[..., Tree],
    init: Tree,
    args: tuple = (),
    *,
    solver: Solver | None = None,
    bounds: tuple[Tree, Tree] | None = None,
    adjoint: Adjoint | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    norm: Norm = "max",
    max_steps: int = 1000,
    throw: bool | None = None,
    callback: Callable[[Any], None] | None = None,
    history: bool = False,
) -> Solution:
    r"""Minimize :math:`\tfrac12 \|r(x, \theta)\|^2` in `x`.

    .. math:: \|J^\top r\| \le \text{atol} + \text{rtol}\,\|J_0^\top r_0\|, \qquad
              \text{in a box} \quad \|x - P(x - J^\top r)\| \le \ldots

    Composes with every transform. Under `vmap` each lane stops on its own.

    Args:
        fn: `r(x, *args)`, the residuals, any tree of tensors.
        init: Where to start, a tree of floating-point tensors of one dtype; it carries no gradient.
        args: Further arguments, trees; these, and what `fn` captures, are differentiated.
        solver: `LevenbergMarquardt()` by default, or `GaussNewton()`, `Dogleg()`, `SciPyLeastSquares()`.
        bounds: `(lower, upper)`, each a tree like `init`, a tensor, a number, or None; they carry gradient.
        adjoint: How the solution is differentiated; `Implicit()` by default, with the full Hessian of the sum of
            squares.
        rtol: Relative tolerance; None is :math:`\varepsilon^{2/3}` of the dtype.
        atol: Absolute tolerance; None is :math:`\varepsilon^{1/2}`.
        norm: "max", "rms", "l2", or a function of the residual.
        max_steps: The most steps.
        throw: Whether to raise where a lane fails; by default in eager code. Without, the best iterate is returned.
        callback: Called with the solver's state after every step.
        history: Whether to record the norm of every step, in `stats.history`.

    Returns:
        The solution; `state.value` is half the sum of squares.

    Raises:
        SolverError: If a lane did not converge, and `throw` is not False.
        ValueError: If `bounds` is not a pair, or the solver does not take bounds.

    Example:
        >>> x, y = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 5.0])
        >>> line = lambda p, x, y: p["slope"] * x + p["offset"] - y
        >>> init = {"slope": torch.tensor(0.0), "offset": torch.tensor(0.0)}
        >>> least_squares(line, init, (x, y), atol=1e-6).value
        {'slope': tensor(2.0000), 'offset': tensor(1.0000)}

    References:
        Nocedal and Wright (2006), Numerical Optimization, chapter 10.
    """
    settings = options(rtol, atol, norm, max_steps, callback, history)
    check_bounds(bounds)
    boxed = bounds is not None and any(b is not None for b in bounds)
    solver = LevenbergMarquardt() if solver is None else solver
    if boxed and "bounds" not in getattr(solver, "handles", ()):
        raise ValueError(f"{type(solver).__name__} cannot handle bounds; use LevenbergMarquardt()")
    tree.check_tensors(init, name="init")
    example = tree.map(torch.detach, init)
    problem = functools.partial(_residuals, fn, bounds, example)

    def optimality(x: Tree, *args: Tree) -> Tree:
        vector, unravel = tree.ravel(x)
        at = problem(unravel, args)
        return unravel(at.optimality(vector, at.linearized(vector, False).slope))

    return solve(
        "least_squares", solver, problem, Equation(optimality, symmetric=not boxed), init, args,
        adjoint=Implicit() if adjoint is None else adjoint, settings=settings, throw=throw,
        refused=crossed_bounds(bounds, example),
    )  # fmt: skip


def _residuals(fn, bounds, init: Tree, unravel: Callable, args: tuple) -> Residuals:
    def errors(x):
        value = fn(unravel(x), *args)
        tree.check_tensors(value, name="the value of fn")
        vector = tree.ravel(value)[0]
        if vector.dtype != x.dtype:
            raise TypeError(f"least_squares needs residuals of the dtype of init, {x.dtype}; got {vector.dtype}")
        return vector

    return Residuals(errors, *flat_bounds(bounds, init))
