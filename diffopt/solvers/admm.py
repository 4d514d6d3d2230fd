r"""The alternating direction method of multipliers: the smooth part and the other one, each minimized on its own.

.. math:: x_{k+1} &= \arg\min_x f(x) + \tfrac{\rho}{2} |x - z_k + u_k|^2 \\
          z_{k+1} &= \operatorname{prox}_{g / \rho}(x_{k+1} + u_k), \qquad u_{k+1} = u_k + x_{k+1} - z_{k+1}
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import grad
from diffopt.linalg import LinearSolver, jacobian_operator
from diffopt.linalg.solve import check_solver, solve_flat
from diffopt.solvers.lbfgs import LBFGS
from diffopt.solvers.objective import Objective
from diffopt.solvers.subproblem import check_inner, solve_subproblem

__all__ = ["ADMM", "ADMMState"]


class ADMMState(NamedTuple):
    """The iterate `z`, its residual, whether the inner problem failed, the smooth part's iterate, the scaled dual `u`,
    the penalty, and the number of steps taken."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    smooth: Tensor
    u: Tensor
    rho: Tensor
    steps: Tensor


@dataclasses.dataclass(frozen=True)
class ADMM:
    r"""ADMM, for a smooth function plus one whose proximal operator is known, or bounds.

    .. math:: x_{k+1} &= \arg\min_x f(x) + \tfrac{\rho}{2} |x - z_k + u_k|^2 \\
              z_{k+1} &= \operatorname{prox}_{g / \rho}(\alpha x_{k+1} + (1 - \alpha) z_k + u_k)

    The iterate is `z`, so it has the structure that the proximal operator gives: zeros, or feasibility. It needs few
    steps where `f` is badly conditioned, at the cost of an inner problem in each.

    Args:
        rho: The penalty :math:`\rho` at the start.
        relaxation: :math:`\alpha`, in (0, 2); above 1 over-relaxes.
        adapt_steps: In how many steps, from the start, `rho` may change to balance the primal and the dual residual;
            for ever, it could circle.
        solver: Of the inner problem; inexact, to a tenth of the residual before.
        linear_solver: If given, such as `Dense()` or `CG()`, the inner problem is one Newton step by it instead:
            exact for a quadratic `f`.
        max_inner_steps: The most steps of an inner minimization.

    Raises:
        TypeError: If `solver` or `linear_solver` is not one.
        ValueError: If `rho` or `max_inner_steps` is not positive, `adapt_steps` is negative, or `relaxation` not in
            (0, 2); or if the steps of `solver` are not torch operations.

    Example:
        >>> from diffopt.solvers import minimize
        >>> soft = lambda x, s: x.sign() * (x.abs() - s).clamp(min=0)
        >>> minimize(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2), prox=soft, solver=ADMM(), atol=1e-6).value
        tensor([2.5000, 2.5000])

    References:
        Boyd et al. (2011), Distributed optimization and statistical learning via the alternating direction method of
        multipliers, eqs. 3.5 to 3.7, 3.13 and 3.19.
    """

    rho: float | Tensor = 1.0
    relaxation: float = 1.6
    adapt_steps: int = 50
    solver: Any = dataclasses.field(default_factory=LBFGS)
    linear_solver: LinearSolver | None = None
    max_inner_steps: int = 100

    handles = ("prox", "bounds")

    @property
    def truncatable(self) -> bool:
        """Whether a step at a solution has a meaningful derivative: an inner loop takes no steps there."""
        return self.linear_solver is not None

    def __post_init__(self):
        check_inner(self.solver, self.max_inner_steps)
        check_solver(self.linear_solver, "linear_solver")
        if not isinstance(self.rho, Tensor) and not self.rho > 0:
            raise ValueError(f"rho must be positive; got {self.rho!r}")
        if not isinstance(self.adapt_steps, int) or self.adapt_steps < 0:
            raise ValueError(f"adapt_steps must be a non-negative int; got {self.adapt_steps!r}")
        if not 0 < self.relaxation < 2:
            raise ValueError(f"relaxation must be between 0 and 2; got {self.relaxation!r}")

    def init(self, fn: Any, x: Tensor) -> ADMMState:
        """The state at the start."""
        objective = Objective.of(fn)
        rho = torch.as_tensor(self.rho, dtype=x.dtype, device=x.device)
        z = objective.clip(x)
        no = torch.zeros((), dtype=torch.bool, device=x.device)
        return ADMMState(z, objective.optimality(z), no, x, torch.zeros_like(x), rho, no.to(torch.int64))

    def step(self, fn: Any, state: ADMMState) -> ADMMState:
        """The state after one update of both parts and of the dual."""
        objective = Objective.of(fn)
        z, rho = state.x, state.rho
        x = self._smooth_part(objective, state)
        ahead = self.relaxation * x + (1 - self.relaxation) * z + state.u
        new = objective.clip(ahead) if objective.prox is None else objective.prox(ahead, 1 / rho)
        u = ahead - new
        failed = ~x.isfinite().all()
        primal, dual = torch.linalg.vector_norm(x - new), rho * torch.linalg.vector_norm(new - z)
        one = torch.ones_like(rho)
        factor = torch.where(primal > 10 * dual, 2 * one, torch.where(dual > 10 * primal, one / 2, one))
        factor = torch.where(state.steps < self.adapt_steps, factor, one)
        return ADMMState(new, objective.optimality(new), failed, x, u / factor, rho * factor, state.steps + 1)

    def _smooth_part(self, objective: Objective, state: ADMMState) -> Tensor:
        target, rho = state.x - state.u, state.rho

        def value(x):
            away = x - target
            return objective(x) + rho / 2 * (away @ away)

        if self.linear_solver is None:
            least = torch.finfo(state.x.dtype).eps
            tolerance = 0.1 * state.residual.detach().abs().amax().clamp(min=least)
            return solve_subproblem(self.solver, Objective(value), state.smooth, tolerance, self.max_inner_steps).x
        slope = grad(value)
        hessian = jacobian_operator(slope, state.smooth, tags=("positive_definite",))
        return state.smooth - solve_flat(hessian, slope(state.smooth), self.linear_solver, failure="ignore")
