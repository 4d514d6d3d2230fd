r"""The limited-memory quasi-Newton method within bounds, of Byrd, Lu, Nocedal and Zhu.

.. math:: \min_{l \le x \le u} f(x), \qquad
          m_k(x) = g_k^\top (x - x_k) + \tfrac12 (x - x_k)^\top B_k (x - x_k), \qquad
          B = \theta I - W M W^\top
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.solvers.line_search import Backtracking
from diffopt.solvers.objective import Objective
from diffopt.solvers.solution import REFUSED

__all__ = ["LBFGSB", "LBFGSBState"]


class LBFGSBState(NamedTuple):
    """The iterate, its residual, whether the search failed, value and gradient, the last pairs, and the curvature."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    slope: Tensor
    steps: Tensor
    changes: Tensor
    curvature: Tensor


class _Model(NamedTuple):
    """The Hessian's approximation, `theta I - W M W'`."""

    theta: Tensor
    W: Tensor
    M: Tensor

    def product(self, v: Tensor) -> Tensor:
        return self.theta * v - self.W @ (self.M @ (self.W.mT @ v))


@dataclasses.dataclass(frozen=True)
class LBFGSB:
    r"""L-BFGS-B: the default for smooth problems with bounds.

    .. math:: x_{k+1} = x_k + \alpha_k (\bar x_k - x_k), \qquad
              \bar x_k \approx \arg\min_{l \le x \le u} m_k(x)

    The model is minimized along the projected gradient, to find which bounds hold, and then in the unknowns that are
    free, both exactly. Every iterate is within the bounds. One of them may be missing, or infinite.

    Args:
        memory: The number of steps kept.
        line_search: How far to go towards the model's minimizer; no further, so that the bounds hold.

    Raises:
        ValueError: If `memory` is not a positive int, or the search may go further than the model's minimizer.

    Example:
        >>> from diffopt.solvers import minimize
        >>> loss = lambda x: ((x - torch.tensor([2.0, 0.5])) ** 2).sum()
        >>> minimize(loss, torch.zeros(2), bounds=(None, 1.0), solver=LBFGSB()).value
        tensor([1.0000, 0.5000])

    References:
        Byrd, Lu, Nocedal and Zhu (1995), A limited memory algorithm for bound constrained optimization, algorithm CP
        and section 5.1. Morales and Nocedal (2011), Remark on algorithm 778, for the projection.
    """

    memory: int = 10
    line_search: Backtracking = dataclasses.field(default_factory=Backtracking)

    handles = ("bounds",)
    truncatable = False

    def __post_init__(self):
        if not isinstance(self.memory, int) or self.memory < 1:
            raise ValueError(f"memory must be a positive int; got {self.memory!r}")
        if not isinstance(self.line_search, Backtracking) or self.line_search.condition != "armijo":
            raise ValueError(
                "line_search must be Backtracking(), whose steps are never longer, so that the bounds hold"
            )

    def init(self, fn: Any, x: Tensor) -> LBFGSBState:
        """The state at the start, the nearest point within the bounds."""
        objective = Objective.of(fn)
        x = objective.clip(x)
        value, slope = objective.value_and_grad(x)
        past = x.new_zeros((self.memory, x.numel()))
        crossed = torch.zeros_like(value) if objective.lower is None else (x < objective.lower).any()
        curvature = torch.where(crossed != 0, 0.0, torch.ones_like(value))
        residual = objective.residual(x, slope)
        return LBFGSBState(x, residual, curvature == 0, value, slope, past, past, curvature)

    def step(self, fn: Any, state: LBFGSBState) -> LBFGSBState:
        """The state after one step."""
        objective = Objective.of(fn)
        x, g = state.x, state.slope
        lower = x.new_full(x.shape, -math.inf) if objective.lower is None else objective.lower
        upper = x.new_full(x.shape, math.inf) if objective.upper is None else objective.upper
        model = _model(state)
        cauchy = _cauchy_point(model, x, g, lower, upper)
        p = _subspace_minimizer(model, x, g, cauchy, lower, upper) - x
        point = self.line_search.search(objective, x, state.value, g, p, torch.ones_like(state.value))
        new = objective.clip(point.x)  # x + p may lie outside by rounding
        s, y = new - x, point.slope - g
        steps, changes, curvature = _remembered(state, s, y)
        residual = objective.residual(new, point.slope)
        return LBFGSBState(new, residual, ~point.accepted, point.value, point.slope, steps, changes, curvature)

    def result(self, state: LBFGSBState, code: Tensor) -> Tensor:
        """How the run ended: refused, where a lower bound lies above the upper one."""
        return torch.where(state.curvature == 0, REFUSED, code)


def _model(state: LBFGSBState) -> _Model:
    r"""The compact form, with :math:`W = [Y\ \theta S]` and the inverse of the small matrix."""
    S, Y, theta = state.steps, state.changes, state.curvature
    SY = S @ Y.mT
    D = SY.diagonal()
    empty = torch.diag_embed((D == 0).to(S.dtype))
    L = SY.tril(-1)
    top = torch.cat([-torch.diag_embed(D) - empty, L.mT], -1)
    bottom = torch.cat([L, theta * (S @ S.mT) + empty], -1)
    M, _ = torch.linalg.inv_ex(torch.cat([top, bottom], -2))
    return _Model(theta, torch.cat([Y, theta * S]).mT, M)


def _cauchy_point(model: _Model, x: Tensor, g: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The first minimizer of the model along the projected gradient, every piece of which is looked at once."""
    falls, rises = g < 0, g > 0
    room = torch.where(falls, x - upper, torch.where(rises, x - lower, torch.zeros_like(x)))
    ends = room / torch.where(g == 0, torch.ones_like(g), g)
    ends, order = ends.sort()
    d = -g[order]
    W = model.W[order]
    begins = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    bounded = begins.isfinite()
    begins = torch.where(bounded, begins, torch.zeros_like(begins))
    lengths = ends - begins
    moved = torch.where(lengths.isfinite(), lengths, torch.zeros_like(lengths))
    square = _from_end(d * d)
    P = _from_end(W * d[:, None])
    change = P * moved[:, None]
    c = change.cumsum(0) - change
    PM = P @ model.M
    first = -square + model.theta * begins * square - (PM * c).sum(-1)
    second = model.theta * square - (PM * P).sum(-1)
    eps = torch.finfo(x.dtype).eps
    inside = (-first / torch.where(square > 0, second.clamp(min=eps), torch.ones_like(second))).clamp(min=0)
    hit = bounded & (square > 0) & (inside < lengths)
    everywhere = torch.where(ends.isfinite(), ends, torch.zeros_like(ends)).amax()
    best = torch.where(hit, begins + inside, torch.full_like(inside, math.inf)).amin()
    t = torch.where(hit.any(), best, everywhere)
    return torch.minimum(torch.maximum(x - t * g, lower), upper)


def _subspace_minimizer(
    model: _Model, x: Tensor, g: Tensor, cauchy: Tensor, lower: Tensor, upper: Tensor
) -> Tensor:  # fmt: skip
    """The model's minimizer in the unknowns that are free at the Cauchy point, brought back within the bounds."""
    free = (cauchy > lower) & (cauchy < upper)
    r = torch.where(free, g + model.product(cauchy - x), torch.zeros_like(g))
    W = torch.where(free[:, None], model.W, torch.zeros_like(model.W))
    # Sherman, Morrison and Woodbury
    inner = torch.eye(W.shape[1], dtype=W.dtype, device=W.device) - model.M @ (W.mT @ W) / model.theta
    v = torch.linalg.inv_ex(inner)[0] @ (model.M @ (W.mT @ r))
    d = -(r + W @ v / model.theta) / model.theta
    d = torch.where(d.isfinite().all(), d, torch.zeros_like(d))
    projected = torch.minimum(torch.maximum(cauchy + d, lower), upper)
    room = torch.where(d > 0, upper - cauchy, lower - cauchy) / torch.where(d == 0, torch.ones_like(d), d)
    most = torch.where(d == 0, torch.ones_like(d), room).amin().clamp(max=1.0)
    return torch.where(g @ (projected - x) < 0, projected, cauchy + most * d)


def _remembered(state: LBFGSBState, s: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The memory with one more pair, where it has positive curvature, and the curvature along it.

    Where there is none, the function is linear or bends down, and the next model is flatter, to reach the bounds.
    """
    sy, yy = s @ y, y @ y
    sound = sy > torch.finfo(s.dtype).eps * yy
    steps = torch.where(sound, torch.cat([state.steps[1:], s[None]]), state.steps)
    changes = torch.where(sound, torch.cat([state.changes[1:], y[None]]), state.changes)
    curvature = torch.where(sound, yy / torch.where(sound, sy, torch.ones_like(sy)), state.curvature / 10)
    # only that of crossed bounds is 0
    least = torch.where(state.curvature > 0, torch.finfo(s.dtype).tiny, torch.zeros_like(sy))
    return steps, changes, torch.maximum(curvature, least)


def _from_end(x: Tensor) -> Tensor:
    """The sums of each row and all below it."""
    return x.flip(0).cumsum(0).flip(0)
