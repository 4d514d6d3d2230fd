r"""Extrapolation of a fixed-point iteration from two evaluations: `Aitken` for each number, `SQUAREM` for vectors.

.. math:: r = T(x) - x, \qquad v = T(T(x)) - T(x) - r
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from diffopt.solvers.fixed_point_iteration import FixedPointState, started

__all__ = ["SQUAREM", "Aitken"]


@dataclasses.dataclass(frozen=True)
class Aitken:
    r"""Aitken's delta-squared process, for each number on its own: quadratic convergence where they are independent.

    .. math:: x_{k+1} = x_k - \frac{r_k^2}{v_k}

    Also converges to fixed points that repel. For vectors whose numbers depend on each other use `SQUAREM` or
    `Anderson`.

    Example:
        >>> from diffopt.solvers import fixed_point
        >>> fixed_point(torch.cos, torch.tensor(0.5), solver=Aitken()).value
        tensor(0.7391)

    References:
        Steffensen (1933), Remarks on iteration, eq. 5. Aitken (1926), On Bernoulli's numerical solution of algebraic
        equations.
    """

    truncatable = False

    def init(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> FixedPointState:
        """The state at the start."""
        return started(fn, x)

    def step(self, fn: Callable[[Tensor], Tensor], state: FixedPointState) -> FixedPointState:
        """The state after one step."""
        r = state.residual
        once = state.x + r
        twice = fn(once)
        v = twice - once - r
        flat = v.abs() <= torch.finfo(v.dtype).eps * r.abs()
        x = torch.where(flat, twice, state.x - r * r / torch.where(flat, torch.ones_like(v), v))
        return FixedPointState(x, fn(x) - x, (x == state.x).all())


@dataclasses.dataclass(frozen=True)
class SQUAREM:
    r"""Squared extrapolation: two steps, and one of a length that fits them, taken twice.

    .. math:: x' = x_k - 2 \alpha_k r_k + \alpha_k^2 v_k, \qquad x_{k+1} = T(x'), \qquad
              \alpha_k = -\max\!\left(1, \frac{\|r_k\|}{\|v_k\|}\right)

    Where that would increase the residual more than `growth` times, the two plain steps are taken instead. For slow
    iterations such as expectation maximization.

    Args:
        growth: How much larger the residual may become by extrapolation.

    Example:
        >>> from diffopt.solvers import fixed_point
        >>> fixed_point(torch.cos, torch.tensor([0.5, 0.9]), solver=SQUAREM(), atol=1e-6).value
        tensor([0.7391, 0.7391])

    References:
        Varadhan and Roland (2008), Simple and globally convergent methods for accelerating the convergence of any EM
        algorithm, scheme S3.
    """

    growth: float = 2.0

    truncatable = False

    def init(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> FixedPointState:
        """The state at the start."""
        return started(fn, x)

    def step(self, fn: Callable[[Tensor], Tensor], state: FixedPointState) -> FixedPointState:
        """The state after one step."""
        r = state.residual
        once = state.x + r
        twice = fn(once)
        v = twice - once - r
        size, bend = _length(r), _length(v)
        # two steps that are alike to rounding tell no length
        a = torch.where(bend <= torch.finfo(v.dtype).eps * size, 1.0, (size / bend).clamp(min=1.0))
        far = state.x + 2 * a * r + a * a * v
        moved = fn(far)
        good = _length(moved - far) <= self.growth * size  # of NaN, no
        x = torch.where(good, moved, twice)
        return FixedPointState(x, fn(x) - x, (x == state.x).all())


def _length(v: Tensor) -> Tensor:
    """The norm, with a derivative at zero."""
    square = (v * v).sum()
    return torch.where(square == 0, torch.finfo(v.dtype).tiny, square).sqrt()
