r"""The quasi-Newton method of Broyden, Fletcher, Goldfarb and Shanno, with a dense inverse Hessian.

.. math:: x_{k+1} = x_k - \alpha_k H_k \nabla f(x_k), \qquad
          H_{k+1} = \Bigl(I - \frac{s y^\top}{s^\top y}\Bigr) H_k \Bigl(I - \frac{y s^\top}{s^\top y}\Bigr)
          + \frac{s s^\top}{s^\top y}
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.solvers.line_search import LineSearch, Zoom
from diffopt.solvers.objective import Objective

__all__ = ["BFGS", "BFGSState"]


class BFGSState(NamedTuple):
    """The iterate, its gradient, whether the search failed, the value, the inverse Hessian, whether it is a guess."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    inverse: Tensor
    fresh: Tensor


@dataclasses.dataclass(frozen=True)
class BFGS:
    r"""BFGS: for smooth problems of up to some hundreds of unknowns, in memory of their square.

    .. math:: x_{k+1} = x_k - \alpha_k H_k \nabla f(x_k), \qquad H_{k+1}\,y_k = s_k

    Before the first update the inverse Hessian is scaled by :math:`s^\top y / y^\top y`.

    Args:
        line_search: How far to go.

    Example:
        >>> from diffopt.solvers import minimize
        >>> rosenbrock = lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        >>> minimize(rosenbrock, torch.zeros(2, dtype=torch.float64), solver=BFGS()).value
        tensor([1.0000, 1.0000], dtype=torch.float64)

    References:
        Nocedal and Wright (2006), Numerical Optimization, algorithm 6.1 and eq. 6.20.
    """

    line_search: LineSearch = dataclasses.field(default_factory=Zoom)

    truncatable = False

    def init(self, fn: Any, x: Tensor) -> BFGSState:
        """The state at the start."""
        value, slope = Objective.of(fn).value_and_grad(x)
        inverse = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        false = torch.zeros_like(value, dtype=torch.bool)
        return BFGSState(x, slope, false, value, inverse, ~false)

    def step(self, fn: Any, state: BFGSState) -> BFGSState:
        """The state after one step."""
        g = state.residual
        p = -(state.inverse @ g)
        p = torch.where(g @ p < 0, p, -g)
        start = torch.where(state.fresh, 1 / torch.linalg.vector_norm(g).clamp(min=1.0), 1.0)
        point = self.line_search.search(Objective.of(fn), state.x, state.value, g, p, start)
        s, y = point.x - state.x, point.slope - g
        sy, yy = s @ y, y @ y
        sound = sy > torch.finfo(s.dtype).eps * yy
        sy, yy = torch.where(sound, sy, 1.0), torch.where(sound, yy, 1.0)
        inverse = torch.where(state.fresh & sound, sy / yy * state.inverse, state.inverse)
        inverse = torch.where(sound, _updated(inverse, s, y, sy), inverse)
        return BFGSState(point.x, point.slope, ~point.accepted, point.value, inverse, state.fresh & ~sound)


def _updated(H: Tensor, s: Tensor, y: Tensor, sy: Tensor) -> Tensor:
    """The update as one of rank two: `H + (s w' + w s') / s'y`, with `w = (1 + y'Hy / s'y) s / 2 - Hy`."""
    Hy = H @ y
    w = (0.5 + 0.5 * (y @ Hy) / sy) * s - Hy
    change = torch.outer(s, w / sy)
    return H + change + change.mT
