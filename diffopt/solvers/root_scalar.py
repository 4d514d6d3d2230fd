r"""`root_scalar`: solve one equation in one unknown, and differentiate the solution.

.. math:: f(x^\star, \theta) = 0, \qquad x^\star \in \mathbb R
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.implicit.adjoints import Implicit, Unrolled
from diffopt.implicit.protocol import Adjoint, Equation
from diffopt.solvers.bracketing import Brent, ScalarEquation
from diffopt.solvers.iterate import Norm, Solver, options
from diffopt.solvers.newton import Newton
from diffopt.solvers.root import shaped
from diffopt.solvers.solution import Solution
from diffopt.solvers.verb import solve

__all__ = ["root_scalar"]


def root_scalar(
    fn: Callable[..., Tensor],
    init: Tensor | float | None = None,
    args: tuple = (),
    *,
    bracket: tuple[Tensor | float, Tensor | float] | None = None,
    solver: Solver | None = None,
    expand: bool = False,
    adjoint: Adjoint | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    norm: Norm = "max",
    max_steps: int = 100,
    throw: bool | None = None,
    callback: Callable[[Any], None] | None = None,
    history: bool = False,
) -> Solution:
    r"""Solve :math:`f(x, \theta) = 0` for one number `x`, in a bracket or from a start.

    .. math:: |x - x^\star| \le \text{atol} + \text{rtol}\,|b - a| \qquad\text{or}\qquad
              |f(x)| \le \text{atol} + \text{rtol}\,|f(x_0)|

    With a solver that keeps a bracket the tolerances speak of `x`, with others of `f`. For many equations use `vmap`:
    each lane stops on its own.

    Args:
        fn: `f(x, *args)`, a 0-d tensor of a 0-d tensor.
        init: Where to start, a 0-d tensor or a number, without gradient; by default the middle of the bracket.
        args: Further arguments, trees; these, and what `fn` captures, are differentiated.
        bracket: `(a, b)`, numbers or 0-d tensors, at which `fn` has different signs; they carry no gradient. Newton's
            method and its like only start between them.
        solver: `Brent()` by default, or `Bisection()`; without a bracket `Newton()`, or another solver of `root`.
        expand: Whether a bracket without a change of sign grows until it has one; without a bracket, from around
            `init`.
        adjoint: How the solution is differentiated; `Implicit()` by default. Brackets cannot be unrolled.
        rtol: Relative tolerance; None is :math:`\varepsilon^{2/3}` of the dtype.
        atol: Absolute tolerance; None is :math:`\varepsilon^{1/2}`.
        norm: "max", "rms", "l2", or a function of the residual.
        max_steps: The most steps.
        throw: Whether to raise where a lane fails; by default in eager code. Without, the best iterate is returned.
        callback: Called with the solver's state after every step.
        history: Whether to record the norm of every step, in `stats.history`.

    Returns:
        The solution, a 0-d tensor; its result is `REFUSED` where the bracket has no change of sign.

    Raises:
        SolverError: If a lane did not converge, or its bracket was refused, and `throw` is not False.
        ValueError: If the unknown is not 0-d, or neither a start nor a bracket is given.

    Example:
        >>> solution = root_scalar(lambda x, a: torch.cos(x) + a - x, args=(torch.tensor(0.0),), bracket=(0.0, 2.0))
        >>> solution.value
        tensor(0.7391)

    References:
        Brent (1973), Algorithms for minimization without derivatives, chapter 4.
    """
    settings = options(rtol, atol, norm, max_steps, callback, history)
    if bracket is not None and not (isinstance(bracket, tuple) and len(bracket) == 2):
        raise ValueError(f"bracket must be a pair of two ends, (a, b); got {bracket!r}")
    if init is None and bracket is None:
        raise ValueError("root_scalar needs init, where to start, or bracket=(a, b), where fn has different signs")
    solver = (Newton() if bracket is None and not expand else Brent()) if solver is None else solver
    keeps = getattr(solver, "bracketing", False)
    if keeps and bracket is None and not expand:
        raise ValueError(f"{type(solver).__name__} needs bracket=(a, b), or expand=True to seek one around init")
    if expand and not keeps:
        raise ValueError(f"{type(solver).__name__} keeps no bracket that could expand; use Brent() or Bisection()")
    if keeps and isinstance(adjoint, Unrolled):
        raise ValueError(
            f"the steps of {type(solver).__name__} depend on signs, so they have no meaningful derivative: use "
            "Implicit(), or Newton()"
        )
    start, lower, upper = _placed(fn, init, args, bracket)
    equation = shaped("root_scalar", fn, "one number of one number. For systems use `root`")
    problem = functools.partial(_on_vectors, equation, lower, upper, expand)
    return solve(
        "root_scalar", solver, problem, Equation(equation), start, args,
        adjoint=Implicit() if adjoint is None else adjoint, settings=settings, throw=throw,
    )  # fmt: skip


def _on_vectors(equation, lower, upper, expand, unravel: Callable, args: tuple) -> ScalarEquation:
    def of_vector(x):
        return tree.ravel(equation(unravel(x), *args))[0]

    lower, upper = (None if t is None else t.reshape(1) for t in (lower, upper))
    return ScalarEquation(of_vector, lower, upper, expand)


def _placed(fn, init, args, bracket) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The start and the ends, as detached 0-d tensors of one dtype: that of the first, or of the value of `fn`."""
    for name, value in (("init", init), *(("an end of the bracket", end) for end in bracket or ())):
        if not isinstance(value, (int, float, Tensor)) and not (name == "init" and value is None):
            raise TypeError(f"root_scalar needs {name} to be a number or a 0-d tensor; got {type(value).__name__}")
    others: Any = tree.partition(args)[0] if isinstance(args, tuple) else ()
    given = [t for t in (init, *(bracket or ()), *others) if isinstance(t, Tensor)]
    like = next((t for t in given if t.is_floating_point()), None)
    if like is None:
        value = fn(torch.tensor(float(bracket[0] if init is None else init)), *args)
        like = value if isinstance(value, Tensor) and value.is_floating_point() else torch.empty(())

    def number(value, name):
        value = torch.as_tensor(value, dtype=like.dtype, device=like.device).detach()
        if value.dim() != 0:
            raise ValueError(
                f"root_scalar solves for one number, and needs a 0-d {name}; got shape {tuple(value.shape)}. Use vmap "
                "for many equations, and `root` for systems"
            )
        return value

    if bracket is None:
        start = number(init, "init")
        reach = 0.1 * start.abs().clamp(min=1.0)
        return start, start - reach, start + reach
    lower, upper = (number(end, "end of the bracket") for end in bracket)
    start = lower + (upper - lower) / 2 if init is None else number(init, "init")
    return start, lower, upper
