r"""AmIGO: steps of the inner variable and of the linear system from where the last ones ended, then an outer step."""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from diffopt import tree
from diffopt.multilevel.single_loop.problem import BilevelProblem, products_of
from diffopt.multilevel.single_loop.protocol import Draws, check_state, check_step_sizes, current, open_batches, start
from diffopt.schedules.hyperparameters import check_count
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["AmIGO", "AmIGOState"]


class AmIGOState(NamedTuple):
    """The state of `AmIGO`.

    Attributes:
        z: The inner variable, a tree.
        x: The outer variable, a tree.
        v: The solution of the linear system, a tree like `z`.
        count: The steps taken, an int64 0-d tensor.
    """

    z: Tree
    x: Tree
    v: Tree
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclasses.dataclass(frozen=True, eq=False)
class AmIGO:
    r"""Solve both inner problems roughly, each from its last solution, and take an outer step.

    .. math::
        z &\leftarrow z - \rho_t \nabla_1 G_I(z, x) && (T \text{ times}) \\
        v &\leftarrow v - \rho'_t \big(\nabla^2_{11} G_I(z, x)\, v + \nabla_1 F_J(z, x)\big) && (N \text{ times}) \\
        x &\leftarrow x - \gamma_t \big(\nabla^2_{21} G_I(z, x)\, v + \nabla_2 F_J(z, x)\big)

    A new batch I in every line and time, one batch J in all.

    Args:
        inner_step_size: The step :math:`\rho`, above 0: a number, a 0-d tensor or a schedule, like all three.
        outer_step_size: The step :math:`\gamma`.
        linear_step_size: The step :math:`\rho'`. Default: :math:`\rho`.
        inner_steps: The number T.
        linear_steps: The number N.

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
        >>> method = AmIGO(1.0, 0.5)
        >>> state = method.init(problem, torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(15):
        ...     state = method.step(problem, state, torch.tensor([0, 1]), torch.tensor([0]))
        >>> f"{state.x:.2f}"
        '3.00'

    References:
        Arbel and Mairal (2022), Amortized implicit differentiation for stochastic bilevel optimization, algorithm 1.
    """

    inner_step_size: Numeric | Schedule
    outer_step_size: Numeric | Schedule
    _: dataclasses.KW_ONLY
    linear_step_size: Numeric | Schedule | None = None
    inner_steps: int = 10
    linear_steps: int = 10

    def __post_init__(self):
        check_step_sizes(
            inner_step_size=self.inner_step_size,
            outer_step_size=self.outer_step_size,
            linear_step_size=self.linear_step_size,
        )
        check_count("inner_steps", self.inner_steps)
        check_count("linear_steps", self.linear_steps)

    @property
    def draws(self) -> Draws:
        """A batch for each inner step, each linear step and the cross derivative, and one of the outer problem."""
        return Draws(self.inner_steps + self.linear_steps + 1, 1)

    def init(self, problem: BilevelProblem, z: Tree, x: Tree) -> AmIGOState:
        """The state at the start, with `v` zero."""
        count = start(problem, z, x)
        return AmIGOState(z, x, tree.zeros_like(z), count)

    def step(self, problem: BilevelProblem, state: AmIGOState, inner_batch: Tensor, outer_batch: Tensor) -> AmIGOState:
        """The state after one step on batches of indices."""
        check_state(state, AmIGOState)
        batches, (j,) = open_batches(problem, self.draws, inner_batch, outer_batch)
        products, z, x = products_of(problem, state.z, state.x)
        v = tree.ravel(state.v)[0]
        rho = current(self.inner_step_size, state.count, z, "inner_step_size")
        for i in batches[: self.inner_steps]:
            z = z - rho * products.inner_z(z, x, i)
        outer_z, outer_x = products.outer(z, x, j)
        linear = self.inner_step_size if self.linear_step_size is None else self.linear_step_size
        rho = current(linear, state.count, z, "linear_step_size")
        for i in batches[self.inner_steps : -1]:
            v = v - rho * (products.hessian(z, x, v, i) + outer_z)
        gamma = current(self.outer_step_size, state.count, x, "outer_step_size")
        x = x - gamma * (products.cross(z, x, v, batches[-1]) + outer_x)
        return AmIGOState(products.unravel_z(z), products.unravel_x(x), products.unravel_z(v), state.count + 1)
