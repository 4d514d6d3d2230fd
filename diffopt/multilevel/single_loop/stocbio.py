r"""stocBiO: inner steps, a Neumann series from nothing, then an outer step."""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from diffopt.multilevel.single_loop.problem import BilevelProblem, products_of
from diffopt.multilevel.single_loop.protocol import Draws, check_state, check_step_sizes, current, open_batches, start
from diffopt.multilevel.single_loop.series import series_gradient, summed_series
from diffopt.schedules.hyperparameters import check_count
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["StocBiO", "StocBiOState"]


class StocBiOState(NamedTuple):
    """The state of `StocBiO`.

    Attributes:
        z: The inner variable, a tree.
        x: The outer variable, a tree.
        count: The steps taken, an int64 0-d tensor.
    """

    z: Tree
    x: Tree
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclasses.dataclass(frozen=True, eq=False)
class StocBiO:
    r"""Take some inner steps from where the last ended, sum a Neumann series, and take an outer step.

    .. math::
        z &\leftarrow z - \alpha_t \nabla_1 G_I(z, x) \qquad (D \text{ times}) \\
        v &= -\eta \sum_{q=0}^{Q} \prod_{k=1}^{q} \big(I - \eta \nabla^2_{11} G_{I_k}(z, x)\big)\, \nabla_1 F_J(z, x) \\
        x &\leftarrow x - \beta_t \big(\nabla^2_{21} G_I(z, x)\, v + \nabla_2 F_J(z, x)\big)

    A new batch I in every step, product and line, one batch J in all. A series of Q products leaves a bias of
    :math:`\max_\lambda |1 - \eta \lambda|^{Q + 1}` of the solution at most, over the eigenvalues :math:`\lambda`.

    Args:
        inner_step_size: The step :math:`\alpha`, above 0: a number, a 0-d tensor or a schedule, like all three.
        outer_step_size: The step :math:`\beta`.
        linear_step_size: The factor :math:`\eta` of the series, below 2 over the largest eigenvalue of the Hessians of
            batches.
        inner_steps: The number D.
        series_steps: The number Q.

    Raises:
        TypeError: If a step size is neither a number, nor a floating-point tensor, nor a function, or a number of steps
            not an int.
        ValueError: If a number is not above 0, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.multilevel.single_loop import BilevelProblem
        >>> inner = lambda z, x, batch: ((z - x - batch) ** 2).mean() / 2  # z* = x + mean of the data
        >>> outer = lambda z, x, batch: ((z - batch) ** 2).mean() / 2
        >>> problem = BilevelProblem(inner, outer, torch.tensor([1.0, 3.0]), torch.tensor([5.0]))
        >>> method = StocBiO(1.0, 0.5, linear_step_size=1.0)
        >>> state = method.init(problem, torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(15):
        ...     state = method.step(problem, state, torch.tensor([0, 1]), torch.tensor([0]))
        >>> f"{state.x:.2f}"
        '3.00'

    References:
        Ji, Yang and Liang (2021), Bilevel optimization: convergence analysis and enhanced design, algorithms 2 and 3.
    """

    inner_step_size: Numeric | Schedule
    outer_step_size: Numeric | Schedule
    _: dataclasses.KW_ONLY
    linear_step_size: Numeric | Schedule
    inner_steps: int = 10
    series_steps: int = 10

    def __post_init__(self):
        check_step_sizes(
            inner_step_size=self.inner_step_size,
            outer_step_size=self.outer_step_size,
            linear_step_size=self.linear_step_size,
        )
        check_count("inner_steps", self.inner_steps)
        check_count("series_steps", self.series_steps)

    @property
    def draws(self) -> Draws:
        """A batch for each inner step, each product and the cross derivative, and one of the outer problem."""
        return Draws(self.inner_steps + self.series_steps + 1, 1)

    def init(self, problem: BilevelProblem, z: Tree, x: Tree) -> StocBiOState:
        """The state at the start."""
        count = start(problem, z, x)
        return StocBiOState(z, x, count)

    def step(
        self, problem: BilevelProblem, state: StocBiOState, inner_batch: Tensor, outer_batch: Tensor
    ) -> StocBiOState:
        """The state after one step on batches of indices."""
        check_state(state, StocBiOState)
        batches, (j,) = open_batches(problem, self.draws, inner_batch, outer_batch)
        products, z, x = products_of(problem, state.z, state.x)
        alpha = current(self.inner_step_size, state.count, z, "inner_step_size")
        for i in batches[: self.inner_steps]:
            z = z - alpha * products.inner_z(z, x, i)
        outer_z, outer_x = products.outer(z, x, j)
        eta = current(self.linear_step_size, state.count, z, "linear_step_size")
        v = summed_series(products, z, x, outer_z, eta, batches[self.inner_steps : -1])
        beta = current(self.outer_step_size, state.count, x, "outer_step_size")
        x = x - beta * series_gradient(products, z, x, v, outer_x, batches[-1])
        return StocBiOState(products.unravel_z(z), products.unravel_x(x), state.count + 1)
