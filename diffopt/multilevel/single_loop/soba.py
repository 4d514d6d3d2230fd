"""SOBA: stochastic steps of the inner variable, of a linear system, and of the outer variable, all at once."""

import dataclasses
from typing import NamedTuple

from torch import Tensor

from diffopt import tree
from diffopt.multilevel.single_loop.problem import BilevelProblem, products_of
from diffopt.multilevel.single_loop.protocol import (
    Draws,
    check_state,
    check_step_sizes,
    current,
    open_batches,
    start,
)
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["SOBA", "SOBAState"]


class SOBAState(NamedTuple):
    """The state of `SOBA`.

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
class SOBA:
    r"""Move all three variables at once, each along an unbiased direction that is linear in the data.

    .. math::
        z &\leftarrow z - \rho_t \nabla_1 G_I(z, x) \\
        v &\leftarrow v - \rho'_t \big(\nabla^2_{11} G_I(z, x)\, v + \nabla_1 F_J(z, x)\big) \\
        x &\leftarrow x - \gamma_t \big(\nabla^2_{21} G_I(z, x)\, v + \nabla_2 F_J(z, x)\big)

    Right sides are taken at the old point. One batch of each problem, and one product with second derivatives.

    Args:
        inner_step_size: The step :math:`\rho`, above 0: a number, a 0-d tensor or a schedule, like all three.
        outer_step_size: The step :math:`\gamma`.
        linear_step_size: The step :math:`\rho'`. Default: :math:`\rho`, as in the paper.

    Raises:
        TypeError: If a step size is neither a number, nor a floating-point tensor, nor a function.
        ValueError: If a number is not above 0, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.multilevel.single_loop import BilevelProblem
        >>> inner = lambda z, x, batch: ((z - x - batch) ** 2).mean() / 2  # z* = x + mean of the data
        >>> outer = lambda z, x, batch: ((z - batch) ** 2).mean() / 2
        >>> problem = BilevelProblem(inner, outer, torch.tensor([1.0, 3.0]), torch.tensor([5.0]))
        >>> method = SOBA(0.5, 0.2)
        >>> state = method.init(problem, torch.tensor(0.0), torch.tensor(0.0))
        >>> for _ in range(100):
        ...     state = method.step(problem, state, torch.tensor([0, 1]), torch.tensor([0]))
        >>> f"{state.x:.2f}"
        '3.00'

    References:
        Dagréou, Ablin, Vaiter and Moreau (2022), A framework for bilevel optimization that enables stochastic and
        global variance reduction algorithms, section 2.
    """

    inner_step_size: Numeric | Schedule
    outer_step_size: Numeric | Schedule
    _: dataclasses.KW_ONLY
    linear_step_size: Numeric | Schedule | None = None

    def __post_init__(self):
        check_step_sizes(
            inner_step_size=self.inner_step_size,
            outer_step_size=self.outer_step_size,
            linear_step_size=self.linear_step_size,
        )

    @property
    def draws(self) -> Draws:
        """One batch of each problem."""
        return Draws(1, 1)

    def init(self, problem: BilevelProblem, z: Tree, x: Tree) -> SOBAState:
        """The state at the start, with `v` zero."""
        count = start(problem, z, x)
        return SOBAState(z, x, tree.zeros_like(z), count)

    def step(self, problem: BilevelProblem, state: SOBAState, inner_batch: Tensor, outer_batch: Tensor) -> SOBAState:
        """The state after one step on batches of indices."""
        check_state(state, SOBAState)
        (i,), (j,) = open_batches(problem, self.draws, inner_batch, outer_batch)
        products, z, x = products_of(problem, state.z, state.x)
        v = tree.ravel(state.v)[0]
        slope, hessian_v, cross_v = products.inner(z, x, v, i)
        outer_z, outer_x = products.outer(z, x, j)
        linear = self.inner_step_size if self.linear_step_size is None else self.linear_step_size
        z = z - current(self.inner_step_size, state.count, z, "inner_step_size") * slope
        v = v - current(linear, state.count, z, "linear_step_size") * (hessian_v + outer_z)
        x = x - current(self.outer_step_size, state.count, x, "outer_step_size") * (cross_v + outer_x)
        return SOBAState(products.unravel_z(z), products.unravel_x(x), products.unravel_z(v), state.count + 1)
