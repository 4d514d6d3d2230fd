r"""The method of multipliers: constrained problems as a sequence of smooth ones.

.. math:: L_\rho(x, \lambda, \mu) = f(x) + \lambda^\top h(x) + \tfrac{\rho}{2} |h(x)|^2
          + \tfrac{1}{2\rho} \left(|\max(\mu + \rho\,c(x), 0)|^2 - |\mu|^2\right)
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.implicit.optimality import KKT
from diffopt.solvers.lbfgs import LBFGS
from diffopt.solvers.objective import Objective
from diffopt.solvers.solution import CONVERGED, REFUSED
from diffopt.solvers.subproblem import check_inner, solve_subproblem

__all__ = ["AugmentedLagrangian", "AugmentedLagrangianState"]


class AugmentedLagrangianState(NamedTuple):
    """The unknowns with their multipliers, the conditions there, whether no step can help, whether that is because the
    constraints cannot be met, the penalty, and the violation of the constraints and of complementarity."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    infeasible: Tensor
    penalty: Tensor
    violation: Tensor


@dataclasses.dataclass(frozen=True)
class AugmentedLagrangian:
    r"""The augmented Lagrangian method: the default for equality and inequality constraints.

    .. math:: x_{k+1} = \arg\min_x L_\rho(x, \lambda_k, \mu_k), \qquad \lambda_{k+1} = \lambda_k + \rho\,h(x_{k+1}),
              \qquad \mu_{k+1} = \max(\mu_k + \rho\,c(x_{k+1}), 0)

    The minimizations are inexact, to a tenth of the residual before; the penalty grows where the violation did not fall
    to a quarter. Where it has grown beyond all bounds and the constraints are still violated, the problem is refused as
    infeasible. Problems need not be convex: the solution is a local one.

    Args:
        solver: Of the inner, smooth problems.
        penalty: The first :math:`\rho`.
        growth: By what the penalty is multiplied.
        max_penalty: Where it ends; None is :math:`\varepsilon^{-1/2}` of the dtype.
        max_inner_steps: The most steps of an inner minimization.

    Raises:
        TypeError: If `solver` is not a solver.
        ValueError: If `penalty` or `max_inner_steps` is not positive, or `growth` not above 1; if the steps of `solver`
            are not torch operations; or, when run, if there are no constraints.

    Example:
        >>> from diffopt.solvers import minimize
        >>> f, h = lambda x: (x**2).sum(), lambda x: x.sum() - 2
        >>> solution = minimize(f, torch.zeros(2), equality=h, solver=AugmentedLagrangian(), atol=1e-6)
        >>> solution.value, solution.dual[0]
        (tensor([1.0000, 1.0000]), tensor(-2.0000))

    References:
        Nocedal and Wright (2006), Numerical Optimization, framework 17.3. Birgin and Martinez (2014), Practical
        Augmented Lagrangian Methods for Constrained Optimization, algorithm 4.1.
    """

    solver: Any = dataclasses.field(default_factory=LBFGS)
    penalty: float | Tensor = 10.0
    growth: float = 10.0
    max_penalty: float | None = None
    max_inner_steps: int = 500

    handles = ("constraints",)
    truncatable = False

    def __post_init__(self):
        check_inner(self.solver, self.max_inner_steps)
        if not isinstance(self.penalty, Tensor) and not self.penalty > 0:
            raise ValueError(f"penalty must be positive; got {self.penalty!r}")
        if not self.growth > 1:
            raise ValueError(f"growth must be above 1; got {self.growth!r}")

    def init(self, fn: Any, x: Tensor) -> AugmentedLagrangianState:
        """The state at the start, `x` holding the multipliers behind the unknowns."""
        objective = _constrained(fn)
        penalty = torch.as_tensor(self.penalty, dtype=x.dtype, device=x.device)
        worst = _violation(objective, objective.split(x).primal).detach()
        no = torch.zeros((), dtype=torch.bool, device=x.device)
        return AugmentedLagrangianState(x, objective.optimality(x), no, no, penalty, worst)

    def step(self, fn: Any, state: AugmentedLagrangianState) -> AugmentedLagrangianState:
        """The state after one inner minimization and one update of the multipliers."""
        objective, rho = _constrained(fn), state.penalty
        before = objective.split(state.x)
        eps = torch.finfo(state.x.dtype).eps
        tolerance = 0.1 * _largest(state.residual).detach().clamp(min=eps)
        lagrangian = _augmented(objective, before, rho)
        inner = solve_subproblem(self.solver, lagrangian, before.primal, tolerance, self.max_inner_steps)
        # where the augmented Lagrangian is unbounded below for want of penalty, its minimizer runs away: stay, and grow
        away = _violation(objective, inner.x) > 1e4 * _violation(objective, before.primal).clamp(min=1)
        sound = inner.x.isfinite().all() & inner.residual.isfinite().all() & ~away
        x = torch.where(sound, inner.x, before.primal)
        h, c = _values(objective, x)
        mu = (before.inequality + rho * c).clamp(min=0)
        both = torch.cat([h, (mu - before.inequality) / rho])
        multipliers = torch.where(sound, torch.cat([before.equality + rho * h, mu]), _multipliers(before))
        y = torch.cat([x, multipliers])
        violation = _largest(both).detach()
        slow = ~sound | ((violation > 0.25 * state.violation) & (violation > eps**0.75))
        penalty = torch.where(slow, self.growth * rho, rho)
        most = eps**-0.5 if self.max_penalty is None else self.max_penalty
        exhausted = penalty > most
        violated = _violation(objective, x) > 10 * eps**0.5
        still = (y == state.x).all() & ~slow
        return AugmentedLagrangianState(
            y, objective.optimality(y), exhausted | still, exhausted & violated, penalty, violation
        )

    def result(self, state: AugmentedLagrangianState, code: Tensor) -> Tensor:
        """How the run ended: refused where the constraints cannot be met together."""
        return torch.where(state.infeasible & (code != CONVERGED), REFUSED, code)


def _constrained(fn: Any) -> Objective:
    objective = Objective.of(fn)
    if objective.sizes is None:
        raise ValueError("AugmentedLagrangian is for constraints: give equality= or inequality=, or use LBFGS()")
    return objective


def _values(objective: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    """The values of the equality and of the inequality constraints, empty where there are none."""
    none = x[:0]
    h = none if objective.equality is None else objective.equality(x)
    c = none if objective.inequality is None else objective.inequality(x)
    return h, c


def _violation(objective: Objective, x: Tensor) -> Tensor:
    h, c = _values(objective, x)
    return _largest(torch.cat([h, c.clamp(min=0)]))


def _augmented(objective: Objective, point: KKT, rho: Tensor) -> Objective:
    def value(x):
        h, c = _values(objective, x)
        pushed = (point.inequality + rho * c).clamp(min=0)
        return objective(x) + point.equality @ h + rho / 2 * (h @ h) + (pushed @ pushed) / (2 * rho)

    return Objective(value)


def _multipliers(point: KKT) -> Tensor:
    return torch.cat([point.equality, point.inequality])


def _largest(values: Tensor) -> Tensor:
    return values.abs().amax() if values.numel() else values.new_zeros(())
