r"""Newton's method for equations, with the Jacobian of each step (`Newton`) or of the first one alone (`Chord`).

.. math:: x_{k+1} = x_k - F'(x_k)^{-1} F(x_k) \qquad\text{or}\qquad x_{k+1} = x_k - F'(x_0)^{-1} F(x_k)
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.linalg import LinearSolver, jacobian_operator
from diffopt.linalg.solve import solve_flat

__all__ = ["Chord", "ChordState", "Newton", "NewtonState"]


class NewtonState(NamedTuple):
    """The iterate, the equation's value there, and whether the Jacobian was singular."""

    x: Tensor
    residual: Tensor
    failed: Tensor


@dataclasses.dataclass(frozen=True)
class Newton:
    r"""Newton's method: quadratic convergence near a root where the Jacobian is regular.

    .. math:: F'(x_k)\,d_k = -F(x_k), \qquad x_{k+1} = x_k + \eta\,d_k

    Args:
        linear_solver: For the step; None takes `Dense` up to 256 unknowns, beyond that `GMRES`.
        step_size: :math:`\eta`, 1 for the full step.

    Example:
        >>> from diffopt.solvers import root
        >>> root(lambda x, a: x**2 - a, torch.tensor(1.0), (torch.tensor(2.0),), solver=Newton()).value
        tensor(1.4142)

    References:
        Nocedal and Wright (2006), Numerical Optimization, algorithm 11.1.
    """

    linear_solver: LinearSolver | None = None
    step_size: float | Tensor = 1.0

    def init(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> NewtonState:
        """The state at the start."""
        return NewtonState(x, fn(x), torch.zeros((), dtype=torch.bool, device=x.device))

    def step(self, fn: Callable[[Tensor], Tensor], state: NewtonState) -> NewtonState:
        """The state after one step."""
        d = _direction(fn, state.x, state.residual, self.linear_solver)
        sound = d.isfinite().all()
        x = torch.where(sound, state.x + self.step_size * d, state.x)
        return NewtonState(x, fn(x), ~sound)


class ChordState(NamedTuple):
    """The iterate, the equation's value there, whether the Jacobian was singular, and its inverse at the start."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    inverse: Tensor


@dataclasses.dataclass(frozen=True)
class Chord:
    r"""The simplified Newton method: one Jacobian, at the start, for all steps.

    .. math:: x_{k+1} = x_k - F'(x_0)^{-1} F(x_k)

    Linear convergence, from near enough; each step costs one evaluation and one product.

    Example:
        >>> from diffopt.solvers import root
        >>> root(lambda x, a: x**2 - a, torch.tensor(1.5), (torch.tensor(2.0),), solver=Chord()).value
        tensor(1.4142)

    References:
        Deuflhard (2011), Newton Methods for Nonlinear Problems, section 2.1.2.
    """

    def init(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> ChordState:
        """The state at the start."""
        J = torch.func.jacrev(fn)(x)
        inverse, info = torch.linalg.inv_ex(J)
        return ChordState(x, fn(x), (info != 0) | ~inverse.isfinite().all(), inverse)

    def step(self, fn: Callable[[Tensor], Tensor], state: ChordState) -> ChordState:
        """The state after one step."""
        x = state.x - state.inverse @ state.residual
        return state._replace(x=x, residual=fn(x))


def _direction(fn, x: Tensor, value: Tensor, linear_solver: LinearSolver | None) -> Tensor:
    return solve_flat(jacobian_operator(fn, x), -value, linear_solver, failure="ignore")
