r"""A solver at work inside a step of another: until its residual is small, without any derivative rule.

.. math:: \|r_j\|_\infty \le \tau
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffopt.autodiff import while_loop

__all__ = ["check_inner", "solve_subproblem"]

_FAR = 1e8  # an inner problem may be unbounded below, for want of penalty


def solve_subproblem(solver: Any, fn: Callable[..., Any], x: Tensor, tolerance: Tensor, max_steps: int) -> Any:
    """Step a solver until the largest entry of its residual is small, no further step can be made, or it runs away.

    Args:
        solver: The inner solver.
        fn: Its problem, on vectors.
        x: Where to start.
        tolerance: What the largest entry of the residual must not exceed, a tensor.
        max_steps: The most steps.

    Returns:
        The last state of the solver.
    """

    far = _FAR * x.detach().abs().amax().clamp(min=1)

    def live(state):
        error = state.residual.abs().amax()
        return (error > tolerance) & ~state.failed & error.isfinite() & (state.x.abs().amax() < far)

    return while_loop(live, lambda state: solver.step(fn, state), solver.init(fn, x), max_steps=max_steps)


def check_inner(solver: Any, max_inner_steps: int) -> None:
    """Raise unless a solver can be the inner one."""
    if isinstance(solver, type) or not all(callable(getattr(solver, name, None)) for name in ("init", "step")):
        raise TypeError(f"the inner solver must be a solver of smooth problems, such as LBFGS(); got {solver!r}")
    if getattr(solver, "batching", "vmap") != "vmap":
        raise ValueError(f"the steps of {type(solver).__name__} are not torch operations, so it cannot be an inner one")
    if not isinstance(max_inner_steps, int) or max_inner_steps < 1:
        raise ValueError(f"max_inner_steps must be a positive int; got {max_inner_steps!r}")
