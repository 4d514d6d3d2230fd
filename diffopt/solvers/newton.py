r"""Newton's method for equations, with the Jacobian of each step (`Newton`) or of the first one alone (`Chord`).

.. math:: x_{k+1} = x_k - F'(x_k)^{-1} F(x_k) \qquad\text{or}\qquad x_{k+1} = x_k - F'(x_0)^{-1} F(x_k)
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import any_lane, vjp
from diffopt.autodiff.levels import batched_at_most
from diffopt.linalg import Dense, LinearSolver, jacobian_operator
from diffopt.linalg.solve import solve_flat

__all__ = ["Chord", "ChordState", "Newton", "NewtonState"]

_DENSE_SIZE = 256


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
        d = newton_direction(fn, state.x, state.residual, self.linear_solver)
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
        value, inverse, regular = inverse_jacobian(fn, x)
        return ChordState(x, value, ~regular, inverse)

    def step(self, fn: Callable[[Tensor], Tensor], state: ChordState) -> ChordState:
        """The state after one step."""
        x = state.x - state.inverse @ state.residual
        return state._replace(x=x, residual=fn(x))


def newton_direction(
    fn: Callable[[Tensor], Tensor], x: Tensor, value: Tensor, linear_solver: LinearSolver | None
) -> Tensor:
    r"""The solution `d` of :math:`F'(x)\,d = -F(x)`; NaN where the Jacobian is singular."""
    if isinstance(linear_solver, Dense | None) and 0 < x.numel() <= _DENSE_SIZE and not torch.compiler.is_compiling():
        out, pull = vjp(fn, x)
        if batched_at_most((out, x, value)):  # no derivative can be asked for: the Jacobian need not be an operator
            return solved(rows(lambda u: pull(u)[0], x), -value)
    return solve_flat(jacobian_operator(fn, x), -value, linear_solver, failure="ignore")


def inverse_jacobian(fn: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The value of an equation, the inverse of its Jacobian, and whether that one is regular."""
    value, pull = vjp(fn, x)
    J = rows(lambda u: pull(u)[0], x)
    sound, eye = J.sum().isfinite(), torch.eye(x.numel(), dtype=x.dtype, device=x.device)
    inverse, info = torch.linalg.inv_ex(torch.where(sound, J, eye))
    regular = sound & (info == 0) & inverse.isfinite().all()
    return value, torch.where(regular, inverse, eye), regular


def rows(product: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The matrix whose rows are the products with unit vectors like `like`."""
    # units along the last dimension: under a further vmap, the batched products then keep their rows contiguous
    units = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
    if like.numel() == 0:
        return torch.func.vmap(product, in_dims=1, out_dims=1)(units).mT
    # 0 * u: a constant product, too, must be batched, as out_dims is not 0
    return torch.func.vmap(lambda u: product(u) + 0 * u.sum(), in_dims=1, out_dims=1)(units).mT


def solved(J: Tensor, b: Tensor) -> Tensor:
    """The solution of a dense system, in one call; NaN where the matrix is singular or not finite."""
    sound = J.sum().isfinite()
    if any_lane(~sound):  # LAPACK may give no pivots for NaN
        J = torch.where(sound, J, torch.eye(J.shape[-1], dtype=J.dtype, device=J.device))
    d, info = torch.linalg.solve_ex(J, b[:, None])
    return torch.where(sound & (info == 0), d[:, 0], torch.nan)
