r"""Newton's method in a trust region, of Steihaug.

.. math:: p_k \approx \arg\min_{\|p\| \le \Delta_k} g_k^\top p + \tfrac12 p^\top \nabla^2 f(x_k)\,p
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.solvers.newton_cg import hessian_product, truncated_cg
from diffopt.solvers.objective import Objective

__all__ = ["TrustRegion", "TrustRegionState"]


class TrustRegionState(NamedTuple):
    """The iterate, its gradient, whether the radius has vanished, the value, and the radius."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    radius: Tensor


@dataclasses.dataclass(frozen=True)
class TrustRegion:
    r"""A trust region with conjugate gradients: robust where the Hessian is indefinite.

    .. math:: \rho_k = \frac{f(x_k) - f(x_k + p_k)}{-g_k^\top p_k - \tfrac12 p_k^\top \nabla^2 f(x_k)\,p_k}

    The radius becomes a quarter of the step's length where :math:`\rho_k < 1/4`, and is doubled where
    :math:`\rho_k > 3/4` at the boundary.

    Args:
        radius: The radius at the start.
        max_radius: The largest radius.
        accept: The least :math:`\rho_k` of a step that is taken.
        max_products: The most products with the Hessian in a step; None is twice the number of unknowns, at least 20.

    Example:
        >>> from diffopt.solvers import minimize
        >>> rosenbrock = lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        >>> minimize(rosenbrock, torch.zeros(2, dtype=torch.float64), solver=TrustRegion()).value
        tensor([1.0000, 1.0000], dtype=torch.float64)

    References:
        Nocedal and Wright (2006), Numerical Optimization, algorithms 4.1 and 7.2. Conn, Gould and Toint (2000),
        Trust-region methods, section 17.4.2, for the rounding in :math:`\rho_k`.
    """

    radius: float | Tensor = 1.0
    max_radius: float | Tensor = 1e6
    accept: float = 1e-4
    max_products: int | None = None

    truncatable = False  # its inner steps stop early, at a solution at once

    def init(self, fn: Any, x: Tensor) -> TrustRegionState:
        """The state at the start."""
        value, slope = Objective.of(fn).value_and_grad(x)
        radius = torch.as_tensor(self.radius, dtype=x.dtype, device=x.device)
        return TrustRegionState(x, slope, torch.zeros_like(value, dtype=torch.bool), value, radius)

    def step(self, fn: Any, state: TrustRegionState) -> TrustRegionState:
        """The state after one step."""
        objective, g, radius = Objective.of(fn), state.residual, state.radius
        p, Hp = truncated_cg(hessian_product(objective, state.x), g, radius, self.max_products)
        x = state.x + p
        value, slope = objective.value_and_grad(x)
        predicted = -(g @ p) - (p @ Hp) / 2
        rounding = 10 * torch.finfo(x.dtype).eps * state.value.abs().clamp(min=torch.finfo(x.dtype).tiny)
        ratio = (state.value - value + rounding) / (predicted + rounding)
        taken = (ratio > self.accept) & slope.isfinite().all()
        bad = ~taken | (ratio < 0.25)
        length = torch.linalg.vector_norm(p)
        wider = (ratio > 0.75) & (length >= 0.99 * radius)
        most = torch.as_tensor(self.max_radius, dtype=x.dtype, device=x.device)
        radius = torch.where(bad, length / 4, torch.where(wider, torch.minimum(2 * radius, most), radius))
        far = torch.linalg.vector_norm(state.x).clamp(min=1.0)
        return TrustRegionState(
            torch.where(taken, x, state.x),
            torch.where(taken, slope, g),
            ~(radius > torch.finfo(x.dtype).eps * far),
            torch.where(taken, value, state.value),
            radius,
        )
