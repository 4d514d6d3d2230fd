r"""Proximal gradient descent, accelerated: for a smooth function plus one whose proximal operator is known.

.. math:: x_{k+1} = \operatorname{prox}_{\eta g}(y_k - \eta \nabla f(y_k)), \qquad
          y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k)
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.solvers.objective import Objective

__all__ = ["ProximalGradient", "ProximalGradientState"]


class ProximalGradientState(NamedTuple):
    """The iterate, its residual, whether no step size served, the extrapolated point, `t`, and the step size."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    y: Tensor
    t: Tensor
    step_size: Tensor


@dataclasses.dataclass(frozen=True)
class ProximalGradient:
    r"""Proximal gradient descent: FISTA, with restarts; of a projection, projected gradient descent.

    .. math:: x_{k+1} = \operatorname{prox}_{\eta g}(y_k - \eta \nabla f(y_k))

    Args:
        step_size: :math:`\eta`, at most :math:`1 / L`; None searches for it by backtracking.
        accelerate: Whether to extrapolate; if not, that is ISTA.
        max_backtracks: The most halvings of the step size in a step.

    Example:
        >>> from diffopt.solvers import minimize
        >>> soft = lambda x, s: x.sign() * (x.abs() - s).clamp(min=0)
        >>> minimize(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2), prox=soft, solver=ProximalGradient()).value
        tensor([2.5000, 2.5000])

    References:
        Beck and Teboulle (2009), A fast iterative shrinkage-thresholding algorithm, eqs. 4.1 to 4.3. O'Donoghue and
        Candes (2015), Adaptive restart for accelerated gradient schemes, eq. 13.
    """

    step_size: float | Tensor | None = None
    accelerate: bool = True
    max_backtracks: int = 60

    handles = ("prox", "bounds")

    def init(self, fn: Any, x: Tensor) -> ProximalGradientState:
        """The state at the start."""
        objective = Objective.of(fn)
        one = x.new_ones(())
        size = one if self.step_size is None else torch.as_tensor(self.step_size, dtype=x.dtype, device=x.device)
        x = _prox(objective, x, 0.0 * one) if objective.prox is None else x
        residual = objective.optimality(x)
        return ProximalGradientState(x, residual, torch.zeros_like(one, dtype=torch.bool), x, one, size)

    def step(self, fn: Any, state: ProximalGradientState) -> ProximalGradientState:
        """The state after one step."""
        objective = Objective.of(fn)
        value, slope = objective.value_and_grad(state.y)
        size = state.step_size if self.step_size is not None else self._searched(objective, state, value, slope)
        x = _prox(objective, state.y - size * slope, size)
        t = (1 + (1 + 4 * state.t**2).sqrt()) / 2 if self.accelerate else state.t
        y = x + (state.t - 1) / t * (x - state.x)
        restart = ((state.y - x) * (x - state.x)).sum() > 0
        y, t = torch.where(restart, x, y), torch.where(restart, torch.ones_like(t), t)
        failed = ~size.isfinite() | (size == 0)
        return ProximalGradientState(x, objective.optimality(x), failed, y, t, size)

    def _searched(self, objective: Objective, state: ProximalGradientState, value: Tensor, slope: Tensor) -> Tensor:
        """The largest tried step size at which the quadratic model lies above the function."""

        def excess(size):
            d = _prox(objective, state.y - size * slope, size) - state.y
            rounding = 10 * torch.finfo(value.dtype).eps * value.abs()
            return objective(state.y + d) - (value + slope @ d + (d @ d) / (2 * size)) > rounding

        size = state.step_size * 1.5
        carry = size, excess(size)

        def halved(carry):
            size = carry[0] / 2
            return size, excess(size)

        return while_loop(lambda carry: carry[1], halved, carry, max_steps=self.max_backtracks)[0]


def _prox(objective: Objective, x: Tensor, scaling: Tensor) -> Tensor:
    return objective.clip(x) if objective.prox is None else objective.prox(x, scaling)
