r"""Nonlinear conjugate gradients.

.. math:: p_{k+1} = -g_{k+1} + \beta_{k+1} p_k, \qquad x_{k+1} = x_k + \alpha_k p_k
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffopt.solvers.line_search import LineSearch, Zoom
from diffopt.solvers.objective import Objective

__all__ = ["NonlinearCG", "NonlinearCGState"]


class NonlinearCGState(NamedTuple):
    """The iterate, its gradient, whether the search failed, the value, the next direction, and the step to try."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    direction: Tensor
    start: Tensor


@dataclasses.dataclass(frozen=True)
class NonlinearCG:
    r"""Nonlinear conjugate gradients: for smooth problems with very many unknowns, in memory of a few vectors.

    .. math:: \beta^{FR} = \frac{g_{k+1}^\top g_{k+1}}{g_k^\top g_k}, \quad
              \beta^{PR} = \frac{g_{k+1}^\top y_k}{g_k^\top g_k}, \quad
              \beta^{HS} = \frac{g_{k+1}^\top y_k}{p_k^\top y_k}, \quad
              \beta^{DY} = \frac{g_{k+1}^\top g_{k+1}}{p_k^\top y_k}

    Negative values become 0. It starts anew along the gradient where two successive gradients are far from orthogonal,
    and where the direction does not descend.

    Args:
        method: "polak_ribiere", "fletcher_reeves", "hestenes_stiefel" or "dai_yuan".
        line_search: How far to go; strong Wolfe conditions with `c2` below 1/2 are needed.
        restart: The largest :math:`|g_{k+1}^\top g_k| / \|g_{k+1}\|^2` without a new start.

    Raises:
        ValueError: If `method` is not one of these.

    Example:
        >>> from diffopt.solvers import minimize
        >>> rosenbrock = lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        >>> minimize(rosenbrock, torch.zeros(2, dtype=torch.float64), solver=NonlinearCG()).value
        tensor([1.0000, 1.0000], dtype=torch.float64)

    References:
        Nocedal and Wright (2006), Numerical Optimization, algorithm 5.4 and eqs. 5.41 to 5.52. Dai and Yuan (1999).
    """

    method: Literal["fletcher_reeves", "polak_ribiere", "hestenes_stiefel", "dai_yuan"] = "polak_ribiere"
    line_search: LineSearch = dataclasses.field(default_factory=lambda: Zoom(c2=0.1))
    restart: float = 0.5

    truncatable = False

    def __post_init__(self):
        if self.method not in ("fletcher_reeves", "polak_ribiere", "hestenes_stiefel", "dai_yuan"):
            raise ValueError(
                f"method must be fletcher_reeves, polak_ribiere, hestenes_stiefel or dai_yuan; got {self.method!r}"
            )

    def init(self, fn: Any, x: Tensor) -> NonlinearCGState:
        """The state at the start."""
        value, slope = Objective.of(fn).value_and_grad(x)
        start = 1 / torch.linalg.vector_norm(slope).clamp(min=1.0)
        return NonlinearCGState(x, slope, torch.zeros_like(value, dtype=torch.bool), value, -slope, start)

    def step(self, fn: Any, state: NonlinearCGState) -> NonlinearCGState:
        """The state after one step."""
        g, p = state.residual, state.direction
        point = self.line_search.search(Objective.of(fn), state.x, state.value, g, p, state.start)
        new = point.slope
        beta = self._beta(g, new, p)
        square = new @ new
        direction = beta * p - new
        # the second condition holds where Wolfe's do, and guards against searches that ended without
        sound = (beta > 0) & ((new @ g).abs() <= self.restart * square) & (new @ direction < -0.01 * square)
        direction = torch.where(sound, direction, -new)
        # the first change of the value is taken to be that of the last step
        slant = new @ direction
        start = point.step * (g @ p) / torch.where(slant == 0, 1.0, slant)
        start = torch.where(start.isfinite() & (start > 0), start, 1.0)
        return NonlinearCGState(point.x, new, ~point.accepted, point.value, direction, start)

    def _beta(self, old: Tensor, new: Tensor, p: Tensor) -> Tensor:
        y = new - old
        top = new @ (new if self.method in ("fletcher_reeves", "dai_yuan") else y)
        bottom = old @ old if self.method in ("fletcher_reeves", "polak_ribiere") else p @ y
        return torch.where(bottom > 0, top / torch.where(bottom > 0, bottom, 1.0), 0.0)
