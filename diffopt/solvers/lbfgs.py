r"""The limited-memory quasi-Newton method of Broyden, Fletcher, Goldfarb and Shanno.

.. math:: x_{k+1} = x_k - \alpha_k H_k \nabla f(x_k), \qquad
          H_k = \gamma\,(I - Y R^{-1} S^\top)^\top (I - Y R^{-1} S^\top) + S R^{-\top} D R^{-1} S^\top
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import any_lane
from diffopt.solvers.line_search import LineSearch, Zoom
from diffopt.solvers.objective import Objective

__all__ = ["LBFGS", "LBFGSState", "inverse_hessian_product"]


class LBFGSState(NamedTuple):
    """The iterate, its gradient and value, whether the search failed, and the last steps and gradient changes."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    steps: Tensor
    changes: Tensor


@dataclasses.dataclass(frozen=True)
class LBFGS:
    r"""L-BFGS: the default for smooth problems, in memory of `2 memory` vectors.

    .. math:: x_{k+1} = x_k - \alpha_k H_k \nabla f(x_k)

    The inverse Hessian is applied in compact form, a few matrix products, with the scaling
    :math:`\gamma = s^\top y / y^\top y`.

    Args:
        memory: The number of steps kept; 0 is steepest descent.
        line_search: How far to go.

    Raises:
        ValueError: If `memory` is not a non-negative int.

    Example:
        >>> from diffopt.solvers import minimize
        >>> rosenbrock = lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        >>> minimize(rosenbrock, torch.zeros(2, dtype=torch.float64), solver=LBFGS()).value
        tensor([1.0000, 1.0000], dtype=torch.float64)

    References:
        Byrd, Nocedal and Schnabel (1994), Representations of quasi-Newton matrices, eq. 3.1.
    """

    memory: int = 10
    line_search: LineSearch = dataclasses.field(default_factory=Zoom)

    truncatable = False

    def __post_init__(self):
        if not isinstance(self.memory, int) or self.memory < 0:
            raise ValueError(f"memory must be a non-negative int; got {self.memory!r}")

    def init(self, fn: Any, x: Tensor) -> LBFGSState:
        """The state at the start."""
        value, slope = Objective.of(fn).value_and_grad(x)
        past = x.new_zeros((self.memory, x.numel()))
        return LBFGSState(x, slope, torch.zeros_like(value, dtype=torch.bool), value, past, past)

    def step(self, fn: Any, state: LBFGSState) -> LBFGSState:
        """The state after one step."""
        g = state.residual
        p = -inverse_hessian_product(state.steps, state.changes, g)
        p = torch.where(g @ p < 0, p, -g)
        start = torch.linalg.vector_norm(g).clamp(min=1.0).reciprocal()
        if self.memory:  # with a curvature known, the step is 1
            start = torch.where(state.steps[-1].any(), 1.0, start)
        point = self.line_search.search(Objective.of(fn), state.x, state.value, g, p, start)
        steps, changes = _remembered(state, point.x - state.x, point.slope - g)
        return LBFGSState(point.x, point.slope, ~point.accepted, point.value, steps, changes)


def inverse_hessian_product(steps: Tensor, changes: Tensor, v: Tensor) -> Tensor:
    r"""The product of the L-BFGS inverse Hessian with a vector.

    .. math:: q = v - Y R^{-1} S^\top v, \qquad H v = \gamma q + S R^{-\top} (D R^{-1} S^\top v - \gamma Y^\top q)

    Here :math:`D` and :math:`R` are the diagonal and the upper triangle of :math:`S^\top Y`.

    Args:
        steps: The last steps, oldest first, shape `(m, n)`; rows of zeros are ignored.
        changes: The changes of the gradient over them, shape `(m, n)`.
        v: The vector, shape `(n,)`.

    Returns:
        A vector of shape `(n,)`.

    Example:
        >>> s, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> inverse_hessian_product(s, y, torch.tensor([2.0, 2.0]))
        tensor([1., 1.])

    References:
        Byrd, Nocedal and Schnabel (1994), Representations of quasi-Newton matrices, eq. 3.1.
    """
    if steps.shape[0] == 0:
        return v
    R = steps @ changes.mT
    empty = R.diagonal() == 0
    R = R + torch.diag_embed(empty)
    gamma = R[-1, -1] / (changes[-1] @ changes[-1] + empty[-1])
    u = torch.linalg.solve_triangular(R, (steps @ v)[:, None], upper=True)[:, 0]
    q = torch.addmv(v, changes.mT, u, alpha=-1)
    inner = torch.addcmul(R.diagonal() * u, gamma, changes @ q, value=-1)
    w = torch.linalg.solve_triangular(R.mT, inner[:, None], upper=False)[:, 0]
    return torch.addmv(gamma * q, steps.mT, w)


def _remembered(state: LBFGSState, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The memory with one more pair, where it has positive curvature; the oldest goes."""
    if state.steps.shape[0] == 0:
        return state.steps, state.changes
    sound = s @ y > torch.finfo(s.dtype).eps * (y @ y)
    steps, changes = torch.cat([state.steps[1:], s[None]]), torch.cat([state.changes[1:], y[None]])
    if not torch.compiler.is_compiling() and not any_lane(~sound):
        return steps, changes
    return torch.where(sound, steps, state.steps), torch.where(sound, changes, state.changes)
