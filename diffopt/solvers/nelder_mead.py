r"""The simplex method of Nelder and Mead, by values alone.

.. math:: x_r = \bar x + \alpha\,(\bar x - x_{n+1})
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import any_lane
from diffopt.solvers.objective import Objective

__all__ = ["NelderMead", "NelderMeadState"]


class NelderMeadState(NamedTuple):
    """The best vertex, the others relative to it, no failure, its value, and all vertices with their values, sorted."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    simplex: Tensor
    values: Tensor


@dataclasses.dataclass(frozen=True)
class NelderMead:
    r"""Nelder and Mead's method: for few unknowns, and functions without useful derivatives.

    .. math:: \bar x = \tfrac1n \sum_{i \le n} x_i, \quad x_r = \bar x + \alpha (\bar x - x_{n+1}), \quad
              x_e = \bar x + \beta (\bar x - x_{n+1}), \quad x_c = \bar x \pm \gamma (\bar x - x_{n+1})

    The residual is the extent of the simplex, :math:`x_i - x_1`. The solution still has its implicit derivative where
    `fn` is twice differentiable; the steps themselves have none.

    Args:
        adaptive: Whether the coefficients depend on the number of unknowns, which helps from about ten on.
        initial: The relative size of the first simplex; where an unknown starts at 0, a twentieth of it is its size.

    Example:
        >>> from diffopt.solvers import minimize
        >>> loss = lambda x: ((x - torch.tensor([1.0, 3.0], dtype=x.dtype)) ** 2).sum()
        >>> minimize(loss, torch.zeros(2, dtype=torch.float64), solver=NelderMead()).value
        tensor([1.0000, 3.0000], dtype=torch.float64)

    References:
        Lagarias, Reeds, Wright and Wright (1998), Convergence properties of the Nelder-Mead simplex method, section 2.
        Gao and Han (2012), Implementing the Nelder-Mead simplex algorithm with adaptive parameters, eq. 4.1.
    """

    adaptive: bool = False
    initial: float = 0.05

    truncatable = False
    unrollable = False

    def init(self, fn: Any, x: Tensor) -> NelderMeadState:
        """The state at the start."""
        objective = Objective.of(fn)
        edges = torch.diag_embed(torch.where(x == 0, torch.full_like(x, self.initial / 20), self.initial * x))
        simplex = torch.cat([x[None], x + edges])
        return _sorted(simplex, _values(objective, simplex))

    def step(self, fn: Any, state: NelderMeadState) -> NelderMeadState:
        """The state after one step."""
        objective = Objective.of(fn)
        n = state.x.numel()
        wide, narrow, shrink = (1 + 2 / n, 0.75 - 0.5 / n, 1 - 1 / n) if self.adaptive and n > 1 else (2.0, 0.5, 0.5)
        simplex, values = state.simplex, state.values
        middle = simplex[:-1].mean(0)
        away = middle - simplex[-1]
        reflected = middle + away
        f = _value(objective, reflected)
        best, second, worst = f < values[0], f < values[-2 if n > 1 else 0], f < values[-1]
        factor = torch.where(best, wide, torch.where(worst, narrow, -narrow))
        other = middle + factor * away
        f_other = _value(objective, other)
        # expansion if it is better than the reflection; contraction outside if no worse, inside if better
        better = torch.where(best, f_other < f, ~second & torch.where(worst, f_other <= f, f_other < values[-1]))
        shrinks = ~second & ~better
        vertex, value = torch.where(better, other, reflected), torch.where(better, f_other, f)
        moved, found = torch.cat([simplex[:-1], vertex[None]]), torch.cat([values[:-1], value[None]])
        if torch.compiler.is_compiling() or any_lane(shrinks):
            smaller = simplex[:1] + shrink * (simplex - simplex[:1])
            moved = torch.where(shrinks, smaller, moved)
            found = torch.where(shrinks, _values(objective, smaller), found)
        return _sorted(moved, found)


def _value(objective: Objective, x: Tensor) -> Tensor:
    """The value, infinite where it is not a number."""
    value = objective(x).detach()
    return torch.where(value.isnan(), math.inf, value)


def _values(objective: Objective, simplex: Tensor) -> Tensor:
    return torch.stack([_value(objective, vertex) for vertex in simplex])


def _sorted(simplex: Tensor, values: Tensor) -> NelderMeadState:
    values, order = values.sort(stable=True)
    simplex = simplex[order]
    spread = (simplex[1:] - simplex[0]).flatten()
    # with no finite value the simplex shrinks to a point that means nothing
    residual = torch.where(values[0].isfinite(), spread, math.nan)
    failed = torch.zeros_like(values[0], dtype=torch.bool)
    return NelderMeadState(simplex[0], residual, failed, values[0], simplex, values)
