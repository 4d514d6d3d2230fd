r"""The method of Levenberg and Marquardt for least squares, in a box where there is one.

.. math:: (J_k^\top J_k + \mu_k I)\,d_k = -J_k^\top r_k, \qquad x_{k+1} = P(x_k + d_k)
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffopt.linalg import CG, Dense, LinearSolver, matrix_operator
from diffopt.linalg.solve import solve_flat
from diffopt.linalg.stopping import nonzero
from diffopt.solvers.residuals import Linearized, Residuals

__all__ = ["LMState", "LevenbergMarquardt", "tried"]

_DENSE_SIZE = 256
_LEAST_GAIN = 1e-4


class LMState(NamedTuple):
    r"""The iterate, what vanishes at a solution, whether no step can be made, the value, and the rest.

    Attributes:
        x: The iterate.
        residual: The gradient; with bounds the step of a projected gradient step.
        failed: Whether no further step can be made.
        value: Half the squared length of the residuals.
        errors: The residuals.
        slope: The gradient.
        jacobian: The Jacobian, without rows where the solver works by products.
        damping: :math:`\mu`.
        growth: What a rejected step multiplies it by.
    """

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    errors: Tensor
    slope: Tensor
    jacobian: Tensor
    damping: Tensor
    growth: Tensor


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Levenberg-Marquardt: Gauss-Newton, damped as much as the last steps' gain asks for.

    .. math:: (J^\top J + \mu I)\,d = -J^\top r, \qquad
              \rho = \frac{f(x) - f(x + d)}{-d^\top J^\top r - \frac12 \|J d\|^2}, \qquad
              \mu \leftarrow \mu \max\!\left(\tfrac13, 1 - (2\rho - 1)^3\right) \text{ if } \rho > 0

    A step that does not lower the value is not taken; then :math:`\mu` grows by 2, 4, 8, ... With bounds, unknowns that
    the gradient presses against one are held, and the step is projected.

    Args:
        damping: :math:`\mu` at the start, relative to the largest squared column of J; a tensor carries gradient under
            `Unrolled`.
        linear_solver: For the step by products, such as `CG()`. None takes a dense Cholesky factorization up to 256
            unknowns, beyond that `CG`.

    Example:
        >>> from diffopt.solvers import least_squares
        >>> rosenbrock = lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
        >>> least_squares(rosenbrock, torch.tensor([-1.2, 1.0]), solver=LevenbergMarquardt()).value.round(decimals=2)
        tensor([1., 1.])

    References:
        Nielsen (1999), Damping parameter in Marquardt's method, eq. 2.4. Kanzow, Yamashita and Fukushima (2004),
        Levenberg-Marquardt methods with strong local convergence properties for solving nonlinear equations with convex
        constraints, algorithm 3.1, for bounds.
    """

    damping: float | Tensor = 1e-3
    linear_solver: LinearSolver | None = None

    handles: ClassVar[tuple[str, ...]] = ("bounds",)
    truncatable: ClassVar[bool] = False

    def init(self, fn: Any, x: Tensor) -> LMState:
        """The state at the start."""
        problem = Residuals.of(fn)
        x = problem.clip(x)
        at = problem.linearized(x, self._dense(x))
        if self._dense(x):
            lengths = (at.jacobian * at.jacobian).sum(0)
            largest = lengths.amax() if lengths.numel() else at.value
        else:
            image = problem.push(x, at.slope)
            largest = image @ image / nonzero(at.slope @ at.slope)
        damping = self.damping * torch.where(largest > 0, largest, torch.ones_like(largest))
        failed = torch.zeros((), dtype=torch.bool, device=x.device)
        return _state(problem, x, at, failed, damping, torch.full_like(damping, 2.0))

    def step(self, fn: Any, state: LMState) -> LMState:
        """The state after one step."""
        problem = Residuals.of(fn)
        d = self._direction(problem, state)
        sound = d.isfinite().all()
        d = torch.where(sound, d, torch.zeros_like(d))
        trial = problem.clip(state.x + d)
        s = trial - state.x
        image = state.jacobian @ s if self._dense(s) else problem.push(state.x, s)
        before = Linearized(state.errors, state.slope, state.value, state.jacobian)
        x, at, ratio, good = tried(problem, state.x, trial, before, -(state.slope @ s) - (image @ image) / 2)
        damping = state.damping * torch.where(good, (1 - (2 * ratio - 1) ** 3).clamp(min=1 / 3), state.growth)
        growth = torch.where(good, torch.full_like(state.growth, 2.0), 2 * state.growth)
        failed = (sound & (state.x + d == state.x).all()) | ~damping.isfinite()
        return _state(problem, x, at, failed, damping, growth)

    def _dense(self, x: Tensor) -> bool:
        return self.linear_solver is None and x.numel() <= _DENSE_SIZE

    def _direction(self, problem: Residuals, state: LMState) -> Tensor:
        free = problem.free(state.x, state.slope)
        side = -state.slope if free is None else -free * state.slope
        if not self._dense(state.x):
            operator = problem.normal_operator(state.x, free).shifted(state.damping)
            solver = CG() if self.linear_solver is None else self.linear_solver
            return solve_flat(operator, side, solver, failure="ignore")
        J = state.jacobian if free is None else state.jacobian * free
        A = J.mT @ J + state.damping * torch.eye(side.numel(), dtype=side.dtype, device=side.device)
        return solve_flat(matrix_operator(A, tags=["positive_definite"]), side, Dense(), failure="ignore")


def tried(
    problem: Residuals, x: Tensor, trial: Tensor, before: Linearized, predicted: Tensor
) -> tuple[Tensor, Linearized, Tensor, Tensor]:
    """Go to a point if it is better: the point, the function there, the gain over the prediction, and whether it is."""
    actual = before.value - problem.value(trial)
    rounding = 10 * torch.finfo(actual.dtype).eps * before.value.abs()
    hidden = (predicted > 0) & (predicted <= rounding) & (actual.abs() <= rounding)
    good = (predicted > 0) & (actual > _LEAST_GAIN * predicted)
    # evaluated again where the value is known, so that a step out of the domain leaves no NaN in a derivative
    at = problem.linearized(torch.where(good | hidden, trial, x), before.jacobian.shape[0] > 0)
    # where rounding hides the change of the value, the slopes at both ends still tell it
    by_slope = -((trial - x) @ (before.slope + at.slope)) / 2 / nonzero(predicted)
    ratio = torch.where(hidden, by_slope, (before.value - at.value) / nonzero(predicted))
    good = torch.where(hidden, by_slope > _LEAST_GAIN, good)
    at = Linearized(*(torch.where(good, new, old) for new, old in zip(at, before, strict=True)))
    return torch.where(good, trial, x), at, ratio, good


def _state(problem: Residuals, x: Tensor, at: Linearized, failed: Tensor, damping: Tensor, growth: Tensor) -> LMState:
    residual = problem.optimality(x, at.slope)
    return LMState(x, residual, failed, at.value, at.errors, at.slope, at.jacobian, damping, growth)
