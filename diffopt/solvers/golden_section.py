r"""Golden-section search, for one unknown within an interval.

.. math:: c = b - \frac{b - a}{\varphi}, \quad d = a + \frac{b - a}{\varphi}, \qquad \varphi = \frac{1 + \sqrt 5}{2}
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.solvers.objective import Objective
from diffopt.solvers.solution import REFUSED

__all__ = ["GoldenSection", "GoldenSectionState"]

_SHARE = (math.sqrt(5) - 1) / 2


class GoldenSectionState(NamedTuple):
    """The better inner point, the interval's width, whether it was empty, the value, the four points, two values."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    points: Tensor  # a < c < d < b
    values: Tensor  # at c and d


@dataclasses.dataclass(frozen=True)
class GoldenSection:
    r"""Golden-section search: one value a step, for a function with one minimum in the interval.

    .. math:: [a, b] \leftarrow [a, d] \text{ if } f(c) < f(d), \text{ else } [c, b]

    The residual is the width of the interval, which shrinks by 0.618 in every step. Values alone place a minimizer no
    better than :math:`\sqrt\varepsilon`. The solution has its implicit derivative; the steps have none.

    Args:
        lower: The lower end of the interval.
        upper: The upper end.

    Raises:
        ValueError: When run, if there is more than one unknown.

    Example:
        >>> from diffopt.solvers import minimize
        >>> start = torch.tensor(0.0, dtype=torch.float64)
        >>> minimize(lambda x: x.cosh() - x, start, solver=GoldenSection(0.0, 2.0)).value
        tensor(0.8814, dtype=torch.float64)

    References:
        Kiefer (1953), Sequential minimax search for a maximum.
    """

    lower: float | Tensor
    upper: float | Tensor

    truncatable = False
    unrollable = False

    @property
    def interval(self) -> tuple[float | Tensor, float | Tensor]:
        """The bounds of the unknown, which `minimize` needs for the derivative."""
        return self.lower, self.upper

    def init(self, fn: Any, x: Tensor) -> GoldenSectionState:
        """The state at the start; only the shape of `x` matters."""
        if x.numel() != 1:
            raise ValueError(f"GoldenSection takes one unknown; got {x.numel()}. Use LBFGS() or LBFGSB()")
        objective = Objective.of(fn)
        a, b = (torch.as_tensor(end, dtype=x.dtype, device=x.device).reshape(1) for end in (self.lower, self.upper))
        points = torch.cat([a, b - _SHARE * (b - a), a + _SHARE * (b - a), b])
        values = torch.stack([_value(objective, points[1:2]), _value(objective, points[2:3])])
        return _state(points, values, ~(a < b)[0])

    def step(self, fn: Any, state: GoldenSectionState) -> GoldenSectionState:
        """The state after one step."""
        (a, c, d, b), (fc, fd) = state.points.unbind(), state.values.unbind()
        left = fc < fd
        new = torch.where(left, d - _SHARE * (d - a), c + _SHARE * (b - c))
        f = _value(Objective.of(fn), new[None])
        points = torch.where(left, torch.stack([a, new, c, d]), torch.stack([c, d, new, b]))
        return _state(points, torch.where(left, torch.stack([f, fc]), torch.stack([fd, f])), state.failed)

    def result(self, state: GoldenSectionState, code: Tensor) -> Tensor:
        """How the run ended: refused, where the interval is empty."""
        return torch.where(state.failed, REFUSED, code)


def _value(objective: Objective, x: Tensor) -> Tensor:
    return objective(x).detach()


def _state(points: Tensor, values: Tensor, failed: Tensor) -> GoldenSectionState:
    left = values[0] < values[1]
    x = torch.where(left, points[1:2], points[2:3])
    value = torch.where(left, values[0], values[1])
    width = torch.where(value.isfinite(), points[3] - points[0], math.nan)
    return GoldenSectionState(x, width, failed, value, points, values)
