r"""The method of Frank and Wolfe: a convex set known by its linear minimizations alone, without any projection.

.. math:: s_k = \arg\min_{s \in C} \langle \nabla f(x_k), s \rangle, \qquad x_{k+1} = x_k + \gamma_k (s_k - x_k)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.solvers.objective import Objective
from diffopt.typing import Tree

__all__ = ["FrankWolfe", "FrankWolfeState"]


class FrankWolfeState(NamedTuple):
    """The iterate, the duality gap as the residual, whether no step served, the curvature, and the steps taken."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    curvature: Tensor
    steps: Tensor


@dataclasses.dataclass(frozen=True)
class FrankWolfe:
    r"""The conditional gradient method: it ends by the duality gap, which bounds :math:`f(x_k) - f^\star`.

    .. math:: s_k = \arg\min_{s \in C} \langle \nabla f(x_k), s \rangle, \qquad
              \langle \nabla f(x_k), x_k - s_k \rangle \le \text{tol}

    It converges like 1/k, and linearly only on strongly convex sets or towards an interior minimizer, so ask for no
    more than you need by `atol` and `rtol`. The set is in the oracle, where
    `minimize` cannot see it: for an implicit derivative, give the `projection=` onto the same set, too.

    Args:
        oracle: The linear minimization: a gradient, a tree like the unknowns, to a vertex `s` of the set.
        step_size: "search" takes the minimum of a quadratic model, whose curvature is found by backtracking;
            "open" takes :math:`\gamma_k = 2 / (k + 2)`.
        max_backtracks: The most doublings of the curvature in a step.

    Raises:
        TypeError: If `oracle` is not a function.
        ValueError: If `step_size` is not one of these, or when a derivative of the solution is asked for without
            `projection=`.

    Example:
        >>> from diffopt.solvers import minimize
        >>> corner = lambda g: -g / torch.linalg.vector_norm(g)  # of the unit ball
        >>> loss = lambda x: ((x - torch.tensor([3.0, 4.0])) ** 2).sum()
        >>> minimize(loss, torch.zeros(2), solver=FrankWolfe(corner)).value
        tensor([0.6000, 0.8000])

    References:
        Frank and Wolfe (1956), An algorithm for quadratic programming. Jaggi (2013), Revisiting Frank-Wolfe, algorithms
        1 and 2. Pedregosa et al. (2020), Linearly convergent Frank-Wolfe with backtracking line-search, algorithm 2.
    """

    oracle: Callable[[Tree], Tree]
    step_size: Literal["search", "open"] = "search"
    max_backtracks: int = 60

    handles = ("prox",)
    hides_set = True

    def __post_init__(self):
        if not callable(self.oracle):
            raise TypeError(f"oracle must be a function of a gradient; got {type(self.oracle).__name__}")
        if self.step_size not in ("search", "open"):
            raise ValueError(f'step_size must be "search" or "open"; got {self.step_size!r}')

    def init(self, fn: Any, x: Tensor) -> FrankWolfeState:
        """The state at the start, which must be in the set; with a projection it is moved there."""
        objective = Objective.of(fn)
        one = x.new_ones(())
        x = x if objective.prox is None else objective.prox(x, one)
        _, slope = objective.value_and_grad(x)
        gap = -(slope @ self._direction(objective, x, slope))
        no = torch.zeros_like(one, dtype=torch.bool)
        return FrankWolfeState(x, gap, no, one, torch.zeros_like(no, dtype=torch.int64))

    def step(self, fn: Any, state: FrankWolfeState) -> FrankWolfeState:
        """The state after one step."""
        objective, x = Objective.of(fn), state.x
        value, slope = objective.value_and_grad(x)
        d = self._direction(objective, x, slope)
        gap, square = -(slope @ d), d @ d
        curvature, failed = state.curvature, state.failed
        if self.step_size == "open":
            share = 2 / (state.steps.to(x.dtype) + 2)
        else:
            curvature, failed = self._searched(objective, state, value, gap, d)
            share = _share(gap, curvature, square)
        new = x + share * d
        _, slope = objective.value_and_grad(new)
        gap = -(slope @ self._direction(objective, new, slope))
        return FrankWolfeState(new, gap, failed, curvature, state.steps + 1)

    def _direction(self, objective: Objective, x: Tensor, slope: Tensor) -> Tensor:
        return objective.on_vectors(self.oracle)(slope) - x

    def _searched(self, objective: Objective, state: FrankWolfeState, value: Tensor, gap: Tensor, d: Tensor):
        """The least tried curvature whose quadratic model lies above the function; whether none does."""
        square = d @ d

        def poor(curvature):
            share = _share(gap, curvature, square)
            model = value - share * gap + share**2 * curvature / 2 * square
            rounding = 10 * torch.finfo(value.dtype).eps * value.abs()
            return ~(objective(state.x + share * d) <= model + rounding)

        def doubled(carry):
            curvature = 2 * carry[0]
            return curvature, poor(curvature)

        search = 0.9 * state.curvature, poor(0.9 * state.curvature)
        return while_loop(lambda carry: carry[1], doubled, search, max_steps=self.max_backtracks)


def _share(gap: Tensor, curvature: Tensor, square: Tensor) -> Tensor:
    """The minimum of the quadratic model, within the segment."""
    bottom = curvature * square
    return (gap / torch.where(bottom > 0, bottom, torch.ones_like(bottom))).clamp(0, 1)
