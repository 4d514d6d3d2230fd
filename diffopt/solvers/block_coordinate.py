r"""Block coordinate descent: one block of unknowns after the other, each by a proximal gradient step of its own size.

.. math:: x_b \leftarrow \operatorname{prox}_{\eta_b g_b}(x_b - \eta_b\,\nabla_b f(x)), \qquad b = 1, \dots, B
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import value_and_grad
from diffopt.solvers.objective import Objective
from diffopt.solvers.proximal_gradient import check_step_size, search_step_size

__all__ = ["BlockCoordinateDescent", "BlockCoordinateState"]


class BlockCoordinateState(NamedTuple):
    """The iterate, its residual, whether no step size served a block, and the step sizes of all blocks."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    step_sizes: Tensor


@dataclasses.dataclass(frozen=True)
class BlockCoordinateDescent:
    r"""Cyclic block coordinate descent, for a prox that is separable over the blocks; a step is one sweep.

    .. math:: x_b \leftarrow \operatorname{prox}_{\eta_b g_b}(x_b - \eta_b\,\nabla_b f(x)), \qquad b = 1, \dots, B

    Each block goes by its own curvature, so blocks of different scale do not slow each other. The given prox or
    projection must treat each block on its own, such as `prox_lasso` for any blocks, or the rows' `projection_simplex`
    for blocks of rows; this is not checked.

    Args:
        blocks: None makes each leaf of the tree a block; an int the size of all blocks; or the sizes of each, in the
            order of the raveled tree.
        step_size: :math:`\eta_b`, a number, or a tensor with one entry for each block; None searches for them by
            backtracking.
        max_backtracks: The most halvings of the step size of a block in a sweep.

    Raises:
        ValueError: If sizes, or the step size, are not positive, or, when run, the sizes do not sum to the unknowns.

    Example:
        >>> from diffopt.solvers import minimize
        >>> loss = lambda x: ((x["a"] - 3) ** 2).sum() + 100 * ((x["b"] - x["a"].sum()) ** 2).sum()
        >>> start = {"a": torch.zeros(2), "b": torch.zeros(1)}
        >>> minimize(loss, start, bounds=(0, 4), solver=BlockCoordinateDescent()).value
        {'a': tensor([2.0050, 2.0050]), 'b': tensor([4.])}

    References:
        Beck and Tetruashvili (2013), On the convergence of block coordinate descent type methods, eq. 3.1. Tseng and
        Yun (2009), A coordinate gradient descent method for nonsmooth separable minimization, section 2.
    """

    blocks: int | Sequence[int] | None = None
    step_size: float | Tensor | None = None
    max_backtracks: int = 60

    handles = ("prox", "bounds")

    def __post_init__(self):
        check_step_size(self.step_size, self.max_backtracks)
        given = [self.blocks] if isinstance(self.blocks, int) else self.blocks
        if given is not None and not (len(given) and all(isinstance(size, int) and size > 0 for size in given)):
            raise ValueError(f"blocks must be None, a positive int, or a sequence of them; got {self.blocks!r}")

    def init(self, fn: Any, x: Tensor) -> BlockCoordinateState:
        """The state at the start."""
        objective = Objective.of(fn)
        count = len(self._sizes(objective, x))
        given = 1.0 if self.step_size is None else self.step_size
        sizes = torch.as_tensor(given, dtype=x.dtype, device=x.device).expand(count)
        x = objective.clip(x)
        return BlockCoordinateState(x, objective.optimality(x), torch.zeros_like(x.sum(), dtype=torch.bool), sizes)

    def step(self, fn: Any, state: BlockCoordinateState) -> BlockCoordinateState:
        """The state after one sweep over all blocks."""
        objective, x = Objective.of(fn), state.x
        first, taken, failures = 0, [], []
        for index, size in enumerate(self._sizes(objective, x)):
            x, step_size, failed = self._moved(objective, x, slice(first, first + size), state.step_sizes[index])
            first += size
            taken.append(step_size)
            failures.append(failed)
        return BlockCoordinateState(x, objective.optimality(x), torch.stack(failures).any(), torch.stack(taken))

    def _moved(self, objective: Objective, x: Tensor, block: slice, step_size: Tensor):
        """The iterate with one block moved, with the step size taken, and whether none served."""

        def replaced(part):
            return torch.cat([x[: block.start], part, x[block.stop :]])

        part = x[block]
        on_block = value_and_grad(lambda part: objective(replaced(part)))
        value, slope = on_block(part)

        def move(size):
            moved = replaced(part - size * slope)
            return (objective.clip(moved) if objective.prox is None else objective.prox(moved, size))[block]

        if self.step_size is not None:
            return replaced(move(step_size)), step_size, ~step_size.isfinite()
        tried = search_step_size(on_block, move, part, value, slope, 1.5 * step_size, self.max_backtracks)
        return replaced(tried.x), tried.step_size, tried.failed

    def _sizes(self, objective: Objective, x: Tensor) -> Sequence[int]:
        if self.blocks is None:
            return [x.numel()] if objective.unravel is None else [v.numel() for v in tree.leaves(objective.unravel(x))]
        sizes = [self.blocks] * (x.numel() // self.blocks) if isinstance(self.blocks, int) else self.blocks
        if sum(sizes) != x.numel():
            raise ValueError(f"blocks of {self.blocks!r} do not make up the {x.numel()} unknowns")
        return sizes
