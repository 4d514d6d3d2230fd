"""Optimizers that step each entry on its own, taken apart: what a computation holds is then that of one piece."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.fusion.steps import FusedStep
from diffopt.typing import Tree

__all__ = ["Piece", "by_pieces"]

MOST = 2**18
"""The entries of a piece."""


class Piece(NamedTuple):
    """Some entries of a leaf: what an optimizer's `update` takes, each tree a list of one vector."""

    gradient: list[Tensor]
    state: Any
    params: list[Tensor]


def by_pieces(
    fn: Callable[[Piece, Tensor], Tensor],
    optimizer: GradientTransformation,
    gradient: Tree,
    state: Any,
    params: Tree,
    other: Tree,
) -> Tree | None:
    """Map a function over the pieces of a step.

    Args:
        fn: Takes a piece, and the entries of `other` in its place, and returns a vector like them.
        optimizer: The optimizer.
        gradient: A tree.
        state: The optimizer's state.
        params: A tree like the gradient.
        other: A tree like the gradient.

    Returns:
        What it returned, a tree like `other`; None where it is not known that entries do not depend on each other.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> optimizer, x = sgd(0.5, momentum=0.9), [torch.ones(1), torch.ones(2)]
        >>> by_pieces(lambda p, y: y * optimizer.update(*p)[0][0], optimizer, x, optimizer.init(x), x, [x[0], 2 * x[1]])
        [tensor([-0.5000]), tensor([-1., -1.])]
    """
    if not isinstance(optimizer.step, FusedStep) or optimizer.step.mask is not None:
        return None
    first, *rest = state
    names = [name for name in first._fields if name != "count"]
    leaves, treespec = tree.flatten(other)
    columns = [tree.leaves(each) for each in (gradient, params, *(getattr(first, name) for name in names))]

    def piece(gradient: Tensor, params: Tensor, *moments: Tensor) -> Piece:
        own = {name: [moment] for name, moment in zip(names, moments, strict=True)}
        return Piece([gradient], (first._replace(**own), *rest), [params])

    def mapped(leaf: Tensor, *row: Tensor) -> Tensor:
        cut = zip(*(x.reshape(-1).split(MOST) for x in (leaf, *row)), strict=True)
        return torch.cat([fn(piece(*parts), part) for part, *parts in cut]).reshape(leaf.shape)

    return tree.unflatten(treespec, [mapped(leaf, *row) for leaf, *row in zip(leaves, *columns, strict=True)])
