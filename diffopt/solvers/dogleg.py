r"""Powell's dogleg for least squares: a trust region between the steps of Gauss-Newton and of steepest descent.

.. math:: \min_d \|J d + r\|^2, \quad \|d\| \le \Delta, \qquad \text{along } 0 \to d_{SD} \to d_{GN}
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffopt.linalg import QR, lstsq, matrix_operator
from diffopt.linalg.stopping import nonzero
from diffopt.solvers.levenberg_marquardt import tried
from diffopt.solvers.newton_cg import to_boundary
from diffopt.solvers.residuals import Linearized, Residuals

__all__ = ["Dogleg", "DoglegState"]


class DoglegState(NamedTuple):
    """The iterate, the gradient, whether no step can be made, the value, residuals, their Jacobian, and the radius."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    errors: Tensor
    jacobian: Tensor
    radius: Tensor


@dataclasses.dataclass(frozen=True)
class Dogleg:
    r"""Powell's dogleg: the Gauss-Newton step where it is trusted, else as far towards it as the region reaches.

    .. math:: d = d_{SD} + \beta\,(d_{GN} - d_{SD}), \quad \|d\| = \Delta, \qquad
              d_{SD} = -\frac{\|g\|^2}{\|J g\|^2}\,g, \quad g = J^\top r

    With a dense Jacobian, for up to a few hundred unknowns.

    Args:
        radius: :math:`\Delta` at the start; a tensor carries gradient under `Unrolled`.

    Example:
        >>> from diffopt.solvers import least_squares
        >>> rosenbrock = lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
        >>> least_squares(rosenbrock, torch.tensor([-1.2, 1.0]), solver=Dogleg()).value.round(decimals=2)
        tensor([1., 1.])

    References:
        Powell (1970), A hybrid method for nonlinear equations. Madsen, Nielsen and Tingleff (2004), Methods for
        non-linear least squares problems, algorithm 3.21.
    """

    radius: float | Tensor = 1.0

    truncatable: ClassVar[bool] = False

    def init(self, fn: Any, x: Tensor) -> DoglegState:
        """The state at the start."""
        radius = torch.as_tensor(self.radius, dtype=x.dtype, device=x.device)
        at = Residuals.of(fn).linearized(x, True)
        return _state(x, at, torch.zeros((), dtype=torch.bool, device=x.device), radius)

    def step(self, fn: Any, state: DoglegState) -> DoglegState:
        """The state after one step."""
        problem = Residuals.of(fn)
        d = _step_within(state)
        length = _norm(d)
        image = state.jacobian @ d
        trial = state.x + d
        before = Linearized(state.errors, state.residual, state.value, state.jacobian)
        x, at, ratio, good = tried(problem, state.x, trial, before, -(state.residual @ d) - (image @ image) / 2)
        radius = torch.where(good & (ratio > 0.75), torch.maximum(state.radius, 3 * length), state.radius)
        radius = torch.where(good & (ratio >= 0.25), radius, torch.minimum(state.radius, length) / 2)
        return _state(x, at, (trial == state.x).all(), radius)


def _state(x: Tensor, at: Linearized, failed: Tensor, radius: Tensor) -> DoglegState:
    return DoglegState(x, at.slope, failed, at.value, at.errors, at.jacobian, radius)


def _step_within(state: DoglegState) -> Tensor:
    """The point of the dogleg at the border of the region, or its end; without a Gauss-Newton step, its first leg."""
    g, radius = state.residual, state.radius
    image = state.jacobian @ g
    descent = -(g @ g) / nonzero(image @ image) * g
    newton = lstsq(matrix_operator(state.jacobian), -state.errors, QR(), throw=False)
    regular = newton.isfinite().all()
    newton = torch.where(regular, newton, descent)
    first = descent * (radius / _norm(descent)).clamp(max=1.0)
    leg = newton - descent
    bent = torch.where(descent @ descent < radius**2, descent + to_boundary(descent, leg, radius) * leg, first)
    return torch.where(newton @ newton <= radius**2, newton, bent)


def _norm(v: Tensor) -> Tensor:
    """The norm, with a derivative at zero."""
    return (v @ v).clamp(min=torch.finfo(v.dtype).tiny).sqrt()
