r"""The method of Gauss and Newton for least squares.

.. math:: x_{k+1} = x_k + d_k, \qquad d_k = \arg\min_d \|J_k d + r_k\|^2
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.linalg import LSMR, QR, SVD, LinearSolver, jacobian_operator, lstsq, matrix_operator
from diffopt.linalg.solve import solve_flat
from diffopt.solvers.residuals import Residuals

__all__ = ["GaussNewton", "GaussNewtonState"]

_DENSE_SIZE = 256


class GaussNewtonState(NamedTuple):
    """The iterate, the gradient, whether no step can be made, the value, the residuals, and their Jacobian.

    The Jacobian has no rows where the solver works by products.
    """

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    errors: Tensor
    jacobian: Tensor


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    r"""Gauss-Newton: quadratic convergence where the residuals vanish, fast where they are small, no safeguard.

    .. math:: d_k = \arg\min_d \|J_k d + r_k\|^2, \qquad x_{k+1} = x_k + \eta\,d_k

    Args:
        linear_solver: For the step. `QR()`, `SVD()` for a rank that is not full, `LSMR()` by products, or a solver of
            the normal equations by products, such as `CG()`. None takes `QR` up to 256 unknowns, beyond that `LSMR`.
        step_size: :math:`\eta`, 1 for the full step; a tensor carries gradient under `Unrolled`.

    Example:
        >>> from diffopt.solvers import least_squares
        >>> rosenbrock = lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
        >>> least_squares(rosenbrock, torch.tensor([-1.2, 1.0]), solver=GaussNewton()).value.round(decimals=2)
        tensor([1., 1.])

    References:
        Nocedal and Wright (2006), Numerical Optimization, eq. 10.23.
    """

    linear_solver: LinearSolver | None = None
    step_size: float | Tensor = 1.0

    def init(self, fn: Any, x: Tensor) -> GaussNewtonState:
        """The state at the start."""
        return self._at(Residuals.of(fn), x, torch.zeros((), dtype=torch.bool, device=x.device))

    def step(self, fn: Any, state: GaussNewtonState) -> GaussNewtonState:
        """The state after one step."""
        problem = Residuals.of(fn)
        d = self._direction(problem, state)
        sound = d.isfinite().all()
        x = torch.where(sound, state.x + self.step_size * d, state.x)
        return self._at(problem, x, ~sound | (x == state.x).all())

    def _solver(self, size: int) -> LinearSolver:
        automatic = QR() if size <= _DENSE_SIZE else LSMR()
        return automatic if self.linear_solver is None else self.linear_solver

    def _at(self, problem: Residuals, x: Tensor, failed: Tensor) -> GaussNewtonState:
        at = problem.linearized(x, isinstance(self._solver(x.numel()), QR | SVD))
        return GaussNewtonState(x, at.slope, failed, at.value, at.errors, at.jacobian)

    def _direction(self, problem: Residuals, state: GaussNewtonState) -> Tensor:
        solver = self._solver(state.x.numel())
        if isinstance(solver, QR | SVD):
            return lstsq(matrix_operator(state.jacobian), -state.errors, solver, throw=False)
        if hasattr(solver, "least_squares"):
            return lstsq(jacobian_operator(problem.fn, state.x), -state.errors, solver, throw=False)
        return solve_flat(problem.normal_operator(state.x), -state.residual, solver, failure="ignore")
