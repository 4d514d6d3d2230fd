r"""SUSTAIN: one inner and one outer step along recursive means of gradients, with a randomly truncated series."""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from diffopt import random, tree
from diffopt.multilevel.single_loop.problem import BilevelProblem
from diffopt.multilevel.single_loop.protocol import Draws, check_state, start
from diffopt.multilevel.single_loop.recursion import check_recursion, recursive_step
from diffopt.multilevel.single_loop.series import random_term
from diffopt.random.keys import check_key
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["SUSTAIN", "SUSTAINState"]


class SUSTAINState(NamedTuple):
    """The state of `SUSTAIN`.

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
class SUSTAIN:
    r"""Step along means of gradients that follow the point, the hypergradient by one random term of a series.

    .. math::
        u_t &= \nabla_1 G_I(z_t, x_t) + (1 - \beta_t) \big(u_{t-1} - \nabla_1 G_I(z_{t-1}, x_{t-1})\big), &
        z_{t+1} &= z_t - \lambda_t u_t \\
        w_t &= \bar\nabla h(z_t, x_t) + (1 - \alpha_t) \big(w_{t-1} - \bar\nabla h(z_{t-1}, x_{t-1})\big), &
        x_{t+1} &= x_t - \gamma_t w_t

    .. math:: \bar\nabla h = \nabla_2 F_J - \nabla^2_{21} G_I\; K \eta \prod_{k=1}^{q}
              \big(I - \eta \nabla^2_{11} G_{I_k}\big)\, \nabla_1 F_J, \qquad q \sim \text{Uniform}\{0, \dots, K - 1\}

    The estimate has the mean of a series of K terms, and K times fewer terms, but more noise. All K - 1 products are
    computed, so that lanes of a `vmap` may differ in q.

    Args:
        inner_step_size: The step :math:`\lambda`, above 0: a number, a 0-d tensor or a schedule, like all five.
        outer_step_size: The step :math:`\gamma`.
        key: A key, int64, shape (2,), from which q is drawn in each step.
        linear_step_size: The factor :math:`\eta`, in the paper 1 over the largest eigenvalue.
        inner_weight: The weight :math:`\beta`, in (0, 1]; with 1 there is no memory.
        outer_weight: The weight :math:`\alpha`, likewise.
        series_steps: The number K.

    Raises:
        TypeError: If a hyperparameter is neither a number, nor a floating-point tensor, nor a function, a number of
            steps not an int, or the key not an int64 tensor.
        ValueError: If a number is out of range, a tensor has dimensions, or the key is not of shape (2,).

    Example:
        >>> import torch
        >>> from diffopt.multilevel.single_loop import BilevelProblem
        >>> inner = lambda z, x, batch: ((z - x - batch) ** 2).mean() / 2  # z* = x + mean of the data
        >>> outer = lambda z, x, batch: ((z - batch) ** 2).mean() / 2
        >>> problem = BilevelProblem(inner, outer, torch.tensor([1.0, 3.0]), torch.tensor([5.0]))
        >>> method = SUSTAIN(0.5, 0.2, key=torch.tensor([42, 0]), linear_step_size=0.5, series_steps=2)
        >>> state = method.init(problem, torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(60):
        ...     state = method.step(problem, state, torch.tensor([0, 1]), torch.tensor([0]))
        >>> f"{state.x:.2f}"
        '3.00'

    References:
        Khanduri et al. (2021), A near-optimal algorithm for stochastic bilevel optimization via double-momentum,
        algorithm 1.
    """

    inner_step_size: Numeric | Schedule
    outer_step_size: Numeric | Schedule
    _: dataclasses.KW_ONLY
    key: Tensor
    linear_step_size: Numeric | Schedule
    inner_weight: Numeric | Schedule = 0.5
    outer_weight: Numeric | Schedule = 0.5
    series_steps: int = 10

    def __post_init__(self):
        check_key(self.key)
        check_recursion(self)

    @property
    def draws(self) -> Draws:
        """A batch for the inner step, each product and the cross derivative, and one of the outer problem."""
        return Draws(self.series_steps + 1, 1)

    def init(self, problem: BilevelProblem, z: Tree, x: Tree) -> SUSTAINState:
        """The state at the start, whose means the first step replaces."""
        count = start(problem, z, x)
        return SUSTAINState(z, x, z, x, tree.zeros_like(z), tree.zeros_like(x), count)

    def power(self, count: Tensor) -> Tensor:
        """The power of the random term at a step count, an int64 0-d tensor from 0 to K - 1."""
        return (random.bits(random.fold_in(self.key, count)) * self.series_steps) >> 32

    def step(
        self, problem: BilevelProblem, state: SUSTAINState, inner_batch: Tensor, outer_batch: Tensor
    ) -> SUSTAINState:
        """The state after one step on batches of indices."""
        check_state(state, SUSTAINState)
        power = self.power(state.count)

        def solution(products, z, x, slope, factor, batches):
            return random_term(products, z, x, slope, factor, batches, power.to(z.device))

        return recursive_step(self, problem, state, inner_batch, outer_batch, solution)
