r"""SABA: SOBA with a table of each sample's last directions, whose noise so vanishes at the solution."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import any_lane
from diffopt.multilevel.single_loop.problem import BilevelProblem, products_of
from diffopt.multilevel.single_loop.protocol import Draws, check_state, check_step_sizes, current, open_batches, start
from diffopt.schedules.hyperparameters import check_count
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["SABA", "SABAState"]


class SABAState(NamedTuple):
    r"""The state of `SABA`.

    Attributes:
        z: The inner variable, a tree.
        x: The outer variable, a tree.
        v: The solution of the linear system, a tree like `z`.
        inner_table: For each inner sample its last :math:`\nabla_1 G_i, \nabla^2_{11} G_i v, \nabla^2_{21} G_i v`, side
            by side, shape `(n, 2 d_z + d_x)`.
        outer_table: For each outer sample its last :math:`\nabla_1 F_j, \nabla_2 F_j`, shape `(m, d_z + d_x)`.
        count: The steps taken, an int64 0-d tensor.
    """

    z: Tree
    x: Tree
    v: Tree
    inner_table: Tensor
    outer_table: Tensor
    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclasses.dataclass(frozen=True, eq=False)
class SABA:
    r"""Move all three variables at once, along directions whose noise is reduced by those of past steps.

    .. math::
        z &\leftarrow z - \rho_t\, S[\nabla_1 G] \\
        v &\leftarrow v - \rho'_t \big(S[\nabla^2_{11} G\, v] + S[\nabla_1 F]\big) \\
        x &\leftarrow x - \gamma_t \big(S[\nabla^2_{21} G\, v] + S[\nabla_2 F]\big), \qquad
        S[\phi] = \frac{1}{|I|} \sum_{i \in I} (\phi_i - \hat\phi_i) + \frac1n \sum_{k=1}^n \hat\phi_k

    where :math:`\hat\phi_i` is the term of sample i when it was last drawn, at the start for those never drawn. With
    constant steps it converges to the solution at the rate of gradient descent, where `SOBA` needs ever smaller ones.

    A table of :math:`n (2 d_z + d_x) + m (d_z + d_x)` numbers, which every step copies. To keep fewer, let each row of
    the data be a block of samples: data of shape `(n / b, b, ...)`, and a loss that takes the mean over a block, too.

    Args:
        inner_step_size: The step :math:`\rho`, above 0: a number, a 0-d tensor or a schedule, like all three.
        outer_step_size: The step :math:`\gamma`.
        linear_step_size: The step :math:`\rho'`. Default: :math:`\rho`, as in the paper.
        chunk_size: The most samples that `init` takes at a time. Default: all.

    Raises:
        TypeError: If a step size is neither a number, nor a floating-point tensor, nor a function.
        ValueError: If a number is not above 0, or a tensor has dimensions; in `init`, if a loss is not the mean of its
            losses of single samples.

    Example:
        >>> from diffopt.multilevel.single_loop import BilevelProblem
        >>> inner = lambda z, x, batch: ((z - x - batch) ** 2).mean() / 2  # z* = x + mean of the data
        >>> outer = lambda z, x, batch: ((z - batch) ** 2).mean() / 2
        >>> problem = BilevelProblem(inner, outer, torch.tensor([1.0, 3.0]), torch.tensor([5.0]))
        >>> method = SABA(0.5, 0.2)
        >>> state = method.init(problem, torch.tensor(0.0), torch.tensor(0.0))
        >>> for t in range(100):
        ...     state = method.step(problem, state, torch.tensor([t % 2]), torch.tensor([0]))
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
    chunk_size: int | None = None

    def __post_init__(self):
        check_step_sizes(
            inner_step_size=self.inner_step_size,
            outer_step_size=self.outer_step_size,
            linear_step_size=self.linear_step_size,
        )
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)

    @property
    def draws(self) -> Draws:
        """One batch of each problem."""
        return Draws(1, 1)

    def init(self, problem: BilevelProblem, z: Tree, x: Tree) -> SABAState:
        """The state at the start, with `v` zero, and tables filled there by one pass over all samples."""
        count = start(problem, z, x)
        products, flat_z, flat_x = products_of(problem, z, x)
        v = torch.zeros_like(flat_z)
        everyone = torch.arange(problem.inner_size, device=flat_z.device)
        inner = self._table(lambda i: products.inner_rows(flat_z, flat_x, v, i), everyone)
        _check_mean(inner[:, : flat_z.numel()], products.inner_z(flat_z, flat_x, everyone), "inner")
        everyone = torch.arange(problem.outer_size, device=flat_z.device)
        outer = self._table(lambda j: products.outer_rows(flat_z, flat_x, j), everyone)
        _check_mean(outer, torch.cat(products.outer(flat_z, flat_x, everyone)), "outer")
        return SABAState(z, x, products.unravel_z(v), inner, outer, count)

    def step(self, problem: BilevelProblem, state: SABAState, inner_batch: Tensor, outer_batch: Tensor) -> SABAState:
        """The state after one step on batches of indices; an index may occur more than once."""
        check_state(state, SABAState)
        sizes, rows = (problem.inner_size, problem.outer_size), (state.inner_table.shape[0], state.outer_table.shape[0])
        if sizes != rows:
            raise ValueError(
                f"the tables must have a row for each sample, {sizes}; got {rows}. Call init for this problem."
            )
        (i,), (j,) = open_batches(problem, self.draws, inner_batch, outer_batch)
        products, z, x = products_of(problem, state.z, state.x)
        v = tree.ravel(state.v)[0]
        inner, inner_table = _reduced(products.inner_rows(z, x, v, i), state.inner_table, i)
        outer, outer_table = _reduced(products.outer_rows(z, x, j), state.outer_table, j)
        n = z.numel()
        slope, hessian_v, cross_v = inner.split([n, n, x.numel()])
        outer_z, outer_x = outer.split([n, x.numel()])
        linear = self.inner_step_size if self.linear_step_size is None else self.linear_step_size
        z = z - current(self.inner_step_size, state.count, z, "inner_step_size") * slope
        v = v - current(linear, state.count, z, "linear_step_size") * (hessian_v + outer_z)
        x = x - current(self.outer_step_size, state.count, x, "outer_step_size") * (cross_v + outer_x)
        z, x, v = products.unravel_z(z), products.unravel_x(x), products.unravel_z(v)
        return SABAState(z, x, v, inner_table, outer_table, state.count + 1)

    def _table(self, rows: Callable[[Tensor], Tensor], everyone: Tensor) -> Tensor:
        return torch.cat([rows(part) for part in everyone.split(self.chunk_size or everyone.shape[0])])


def _reduced(rows: Tensor, table: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of new rows with less noise, and the table with them in it."""
    direction = (rows - table.index_select(0, batch)).mean(0) + table.mean(0)
    return direction, table.index_put((batch,), rows)  # equal indices have equal rows


def _check_mean(rows: Tensor, whole: Tensor, name: str) -> None:
    if torch.compiler.is_compiling():
        return
    gap, scale = (rows.mean(0) - whole).abs().amax(), rows.abs().amax() + whole.abs().amax()
    if any_lane(gap > torch.finfo(rows.dtype).eps ** 0.5 * scale):
        raise ValueError(
            f"`{name}` must be the mean over the samples of a batch, for SABA takes it of single samples; its slope "
            "over all is not the mean of theirs. Take .mean() over the leading axis, not .sum()."
        )
