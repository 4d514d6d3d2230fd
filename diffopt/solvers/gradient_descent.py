r"""Gradient descent, by a learning rate or a line search.

.. math:: x_{k+1} = x_k - \eta_k \nabla f(x_k)
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.solvers.line_search import Backtracking, LineSearch
from diffopt.solvers.objective import Objective

__all__ = ["GradientDescent", "GradientDescentState"]


class GradientDescentState(NamedTuple):
    """The iterate, its gradient, whether the search failed, the value, and the step size to try first."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    step_size: Tensor


@dataclasses.dataclass(frozen=True)
class GradientDescent:
    r"""Gradient descent: the plainest of solvers, linear at best; mostly to be unrolled.

    .. math:: x_{k+1} = x_k - \eta_k \nabla f(x_k)

    Args:
        learning_rate: :math:`\eta`, below 2 over the largest curvature; a tensor carries gradient. None searches for a
            step size in every step, beginning at twice the last one.
        line_search: How to search, where there is no learning rate.

    Example:
        >>> from diffopt.solvers import minimize
        >>> minimize(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2), solver=GradientDescent(0.5)).value
        tensor([3., 3.])

    References:
        Nocedal and Wright (2006), Numerical Optimization, section 3.3.
    """

    learning_rate: float | Tensor | None = None
    line_search: LineSearch = dataclasses.field(default_factory=Backtracking)

    def init(self, fn: Any, x: Tensor) -> GradientDescentState:
        """The state at the start."""
        value, slope = Objective.of(fn).value_and_grad(x)
        rate = (
            0.5 / torch.linalg.vector_norm(slope).clamp(min=1.0) if self.learning_rate is None else self.learning_rate
        )
        size = torch.as_tensor(rate, dtype=x.dtype, device=x.device)
        return GradientDescentState(x, slope, torch.zeros_like(value, dtype=torch.bool), value, size)

    def step(self, fn: Any, state: GradientDescentState) -> GradientDescentState:
        """The state after one step."""
        objective = Objective.of(fn)
        if self.learning_rate is not None:
            x = state.x - state.step_size * state.residual
            value, slope = objective.value_and_grad(x)
            return GradientDescentState(x, slope, state.failed, value, state.step_size)
        g = state.residual
        point = self.line_search.search(objective, state.x, state.value, g, -g, 2 * state.step_size)
        return GradientDescentState(point.x, point.slope, ~point.accepted, point.value, point.step)
