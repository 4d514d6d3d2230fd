r"""MRBO: one inner and one outer step along recursive means of gradients."""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from diffopt import tree
from diffopt.multilevel.single_loop.problem import BilevelProblem
from diffopt.multilevel.single_loop.protocol import Draws, check_state, start
from diffopt.multilevel.single_loop.recursion import check_recursion, recursive_step
from diffopt.multilevel.single_loop.series import summed_series
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["MRBO", "MRBOState"]


class MRBOState(NamedTuple):
    """The state of `MRBO`.

    Attributes:
        z: The inner variable, a tree.
        x: The outer variable, a tree.
        last_z: The inner variable before the last step.
        last_x: The outer variable before the last step.
        inner_mean: The mean of inner gradients, a tree like `z`.
        outer_mean: The mean of hypergradients, a tree like `x`.
        count: The steps taken, an int64 0-d tensor.
    """

    z: Tree
    x: Tree
    last_z: Tree
    last_x: Tree
    inner_mean: Tree
    outer_mean: Tree
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclasses.dataclass(frozen=True, eq=False)
class MRBO:
    r"""Step along means of gradients that follow the point, the hypergradient by a Neumann series.

    .. math::
        u_t &= \nabla_1 G_I(z_t, x_t) + (1 - \beta_t) \big(u_{t-1} - \nabla_1 G_I(z_{t-1}, x_{t-1})\big), &
        z_{t+1} &= z_t - \lambda_t u_t \\
        w_t &= \hat\nabla h(z_t, x_t) + (1 - \alpha_t) \big(w_{t-1} - \hat\nabla h(z_{t-1}, x_{t-1})\big), &
        x_{t+1} &= x_t - \gamma_t w_t

    with the estimate :math:`\hat\nabla h` of `StocBiO`, both times on the same batches. The paper takes steps in
    proportion to :math:`\eta_t = d / (m + t)^{1/3}`, and weights to :math:`\eta_{t-1}^2`.

    Args:
        inner_step_size: The step :math:`\lambda`, above 0: a number, a 0-d tensor or a schedule, like all five.
        outer_step_size: The step :math:`\gamma`.
        linear_step_size: The factor of the series, below 2 over the largest eigenvalue of the Hessians of batches.
        inner_weight: The weight :math:`\beta`, in (0, 1]; with 1 there is no memory.
        outer_weight: The weight :math:`\alpha`, likewise.
        series_steps: The number of products of the series.

    Raises:
        TypeError: If a hyperparameter is neither a number, nor a floating-point tensor, nor a function, or a number of
            steps not an int.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.multilevel.single_loop import BilevelProblem
        >>> inner = lambda z, x, batch: ((z - x - batch) ** 2).mean() / 2  # z* = x + mean of the data
        >>> outer = lambda z, x, batch: ((z - batch) ** 2).mean() / 2
        >>> problem = BilevelProblem(inner, outer, torch.tensor([1.0, 3.0]), torch.tensor([5.0]))
        >>> method = MRBO(0.5, 0.2, linear_step_size=0.5, series_steps=3)
        >>> state = method.init(problem, torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(60):
        ...     state = method.step(problem, state, torch.tensor([0, 1]), torch.tensor([0]))
        >>> f"{state.x:.2f}"
        '3.00'

    References:
        Yang, Ji and Liang (2021), Provably faster algorithms for bilevel optimization, algorithm 1.
    """

    inner_step_size: Numeric | Schedule
    outer_step_size: Numeric | Schedule
    _: dataclasses.KW_ONLY
    linear_step_size: Numeric | Schedule
    inner_weight: Numeric | Schedule = 0.5
    outer_weight: Numeric | Schedule = 0.5
    series_steps: int = 10

    def __post_init__(self):
        check_recursion(self)

    @property
    def draws(self) -> Draws:
        """A batch for the inner step, each product and the cross derivative, and one of the outer problem."""
        return Draws(self.series_steps + 2, 1)

    def init(self, problem: BilevelProblem, z: Tree, x: Tree) -> MRBOState:
        """The state at the start, whose means the first step replaces."""
        count = start(problem, z, x)
        return MRBOState(z, x, z, x, tree.zeros_like(z), tree.zeros_like(x), count)

    def step(self, problem: BilevelProblem, state: MRBOState, inner_batch: Tensor, outer_batch: Tensor) -> MRBOState:
        """The state after one step on batches of indices."""
        check_state(state, MRBOState)
        return recursive_step(self, problem, state, inner_batch, outer_batch, summed_series)
