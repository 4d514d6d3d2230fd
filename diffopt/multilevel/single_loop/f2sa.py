r"""F2SA: the hypergradient from first derivatives alone, as the difference of two inner problems."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.multilevel.single_loop.problem import BilevelProblem, products_of
from diffopt.multilevel.single_loop.protocol import Draws, check_state, check_step_sizes, current, open_batches, start
from diffopt.schedules.hyperparameters import check_count, check_hyperparameter
from diffopt.transforms.leaves import as_dtype
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["F2SA", "F2SAState"]


class F2SAState(NamedTuple):
    r"""The state of `F2SA`.

    Attributes:
        z: The inner variable, a tree.
        x: The outer variable, a tree.
        y: The variable of the penalized problem, :math:`\arg\min_y F(y, x) + \lambda G(y, x)`, a tree like `z`.
        penalty: The weight :math:`\lambda`, a 0-d tensor.
        count: The steps taken, an int64 0-d tensor.
    """

    z: Tree
    x: Tree
    y: Tree
    penalty: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclasses.dataclass(frozen=True, eq=False)
class F2SA:
    r"""Follow the slope of a penalized problem, with no second derivatives.

    .. math::
        z &\leftarrow z - \gamma_t \nabla_1 G_I(z, x), \qquad
        y \leftarrow y - \alpha_t \big(\nabla_1 F_J(y, x) + \lambda_t \nabla_1 G_I(y, x)\big)
        \qquad (T \text{ times}) \\
        x &\leftarrow x - \xi_t \big(\nabla_2 F_J(y, x) + \lambda_t (\nabla_2 G_I(y, x) - \nabla_2 G_I(z, x))\big),
        \qquad \lambda_{t+1} = \lambda_t + \delta_t

    The bias of the slope falls as :math:`1 / \lambda`, and its noise grows as :math:`\lambda |y - z|`: both slopes of a
    difference are taken on one batch, so that what they share cancels. Without an increase the bias stays: take a
    large penalty then.

    Args:
        inner_step_size: The step :math:`\gamma`, above 0: a number, a 0-d tensor or a schedule, like those below.
        outer_step_size: The step :math:`\xi`.
        penalized_step_size: The step :math:`\alpha`. Default: :math:`\gamma_t / \lambda_t`.
        penalty: The weight :math:`\lambda_0` at the start, a number or a 0-d tensor.
        penalty_increase: Its increase :math:`\delta` after each step, at least 0.
        inner_steps: The number T.

    Raises:
        TypeError: If a hyperparameter is neither a number, nor a floating-point tensor, nor a function, or the number
            of steps not an int.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> from diffopt.multilevel.single_loop import BilevelProblem
        >>> inner = lambda z, x, batch: ((z - x - batch) ** 2).mean() / 2  # z* = x + mean of the data
        >>> outer = lambda z, x, batch: ((z - batch) ** 2).mean() / 2
        >>> problem = BilevelProblem(inner, outer, torch.tensor([1.0, 3.0]), torch.tensor([5.0]))
        >>> method = F2SA(0.5, 0.5, penalty=10.0, inner_steps=5)
        >>> state = method.init(problem, torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(30):
        ...     state = method.step(problem, state, torch.tensor([0, 1]), torch.tensor([0]))
        >>> f"{state.x:.2f}"
        '3.00'

    References:
        Kwon, Kwon, Wright and Nowak (2023), A fully first-order method for stochastic bilevel optimization,
        algorithm 1, where :math:`\xi_t` is :math:`\xi \alpha_t`.
    """

    inner_step_size: Numeric | Schedule
    outer_step_size: Numeric | Schedule
    _: dataclasses.KW_ONLY
    penalized_step_size: Numeric | Schedule | None = None
    penalty: Numeric = 1.0
    penalty_increase: Numeric | Schedule = 0.0
    inner_steps: int = 10

    def __post_init__(self):
        check_step_sizes(
            inner_step_size=self.inner_step_size,
            outer_step_size=self.outer_step_size,
            penalized_step_size=self.penalized_step_size,
        )
        check_hyperparameter("penalty", self.penalty, above=0.0)
        if not callable(self.penalty_increase):
            check_hyperparameter("penalty_increase", self.penalty_increase, at_least=0.0)
        check_count("inner_steps", self.inner_steps)

    @property
    def draws(self) -> Draws:
        """A batch of each problem for each inner step and the outer step."""
        return Draws(self.inner_steps + 1, self.inner_steps + 1)

    def init(self, problem: BilevelProblem, z: Tree, x: Tree) -> F2SAState:
        """The state at the start, with `y` equal to `z`."""
        count, flat = start(problem, z, x), tree.ravel(z)[0]
        penalty = torch.zeros((), dtype=flat.dtype, device=flat.device) + as_dtype(self.penalty, flat.dtype)
        return F2SAState(z, x, z, penalty, count)

    def step(self, problem: BilevelProblem, state: F2SAState, inner_batch: Tensor, outer_batch: Tensor) -> F2SAState:
        """The state after one step on batches of indices."""
        check_state(state, F2SAState)
        (*inner, i), (*outer, j) = open_batches(problem, self.draws, inner_batch, outer_batch)
        products, z, x = products_of(problem, state.z, state.x)
        y, weight, count = tree.ravel(state.y)[0], state.penalty, state.count
        gamma = current(self.inner_step_size, count, z, "inner_step_size")
        alpha = self.penalized_step_size
        alpha = gamma / weight if alpha is None else current(alpha, count, z, "penalized_step_size")
        for batch, other in zip(inner, outer, strict=True):
            z = z - gamma * products.inner_z(z, x, batch)
            y = y - alpha * (products.outer_z(y, x, other) + weight * products.inner_z(y, x, batch))
        gap = products.inner_x(y, x, i) - products.inner_x(z, x, i)
        slope = products.outer_x(y, x, j) + weight.to(x.dtype) * gap
        x = x - current(self.outer_step_size, count, x, "outer_step_size") * slope
        weight = weight + current(self.penalty_increase, count, z, "penalty_increase")
        z, x, y = products.unravel_z(z), products.unravel_x(x), products.unravel_z(y)
        return F2SAState(z, x, y, weight, count + 1)
