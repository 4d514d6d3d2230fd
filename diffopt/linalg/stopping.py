r"""When an iteration stops: :math:`\|b - A x\| \le \max(\text{rtol}\,\|b\|, \text{atol})`, or after its steps."""

import torch
from torch import Tensor

from diffopt.linalg.operators import Bound

__all__ = [
    "CAUSES",
    "check_options",
    "counter",
    "dot",
    "most_steps",
    "nonzero",
    "norm",
    "residual_of",
    "scaled",
    "solved",
]

CAUSES = (
    "the operator is singular, ill-conditioned or holds NaN; it is not positive definite (for CG); or "
    "max_steps is too small or rtol too tight for its dtype"
)


def scaled(solver, b: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The system with a right side of magnitude 1, so that no square over- or underflows: `(b, x, limit, scale)`."""
    scale = b.abs().amax()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    b = b / scale
    rtol = torch.finfo(b.dtype).eps ** (2 / 3) if solver.rtol is None else solver.rtol
    limit = torch.maximum(rtol * norm(b), solver.atol / scale).clamp(min=torch.finfo(b.dtype).tiny)
    return b, None if x is None else x / scale, limit, scale


def residual_of(bound: Bound, b: Tensor, x: Tensor | None) -> Tensor:
    """The residual `b - A x`; no initial guess is zero."""
    return b if x is None else b - bound.matvec(x)


def solved(bound: Bound, b: Tensor, x: Tensor, limit: Tensor) -> Tensor:
    """Whether the true residual is small; the recursive one may have drifted below it, by rounding a little."""
    return norm(b - bound.matvec(x)) <= 10 * limit


def most_steps(solver, size: int) -> int:
    return max(50, 10 * size) if solver.max_steps is None else solver.max_steps


def counter(like: Tensor) -> Tensor:
    """No steps yet."""
    return torch.zeros((), dtype=torch.int64, device=like.device)


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def norm(a: Tensor) -> Tensor:
    return (a * a).sum().sqrt()


def nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)


def check_options(solver) -> None:
    """Raise unless the tolerances, numbers of steps and the damping of a solver make sense."""
    for name in ("rtol", "atol", "rcond"):
        value = getattr(solver, name, None)
        if value is not None and not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f"{name} must be a non-negative number; got {value!r}")
    for name in ("damping", "alpha"):
        value = getattr(solver, name, 0.0)
        if not isinstance(value, (int, float, Tensor)) or (isinstance(value, Tensor) and value.dim() > 0):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a number or a 0-d tensor; got {found}")
    for name in ("max_steps", "restart", "max_restarts"):
        value = getattr(solver, name, None)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name} must be a positive int; got {value!r}")
