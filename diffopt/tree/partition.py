"""The tensors of a tree, apart from its static leaves."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import optree
from torch import Tensor

__all__ = ["partition"]


def partition(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Any]], Any]]:
    """Split a tree into its tensors and a function that puts other values in their places.

    Leaves that are not tensors (numbers, strings, None, functions) are static: they stay where they are.

    Args:
        tree: any pytree.

    Returns:
        The tensors in order, and ``merge(values)``, the tree with one value for each of them.

    Raises:
        ValueError: by ``merge``, if the number of values is not that of the tensors.

    Example:
        >>> import torch
        >>> tensors, merge = partition({"x": torch.ones(2), "steps": 3})
        >>> merge([2 * t for t in tensors])
        {'x': tensor([2., 2.]), 'steps': 3}
    """
    if type(tree) is tuple and all(type(leaf) is Tensor for leaf in tree):
        return list(tree), functools.partial(_as_tuple, len(tree))  # the commonest case, at a fraction of the cost
    leaves, treespec = optree.tree_flatten(tree, none_is_leaf=True)  # pyright: ignore[reportArgumentType]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def merge(values: Sequence[Any]) -> Any:
        filled = list(leaves)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        return treespec.unflatten(filled)

    return [leaves[i] for i in places], merge


def _as_tuple(count: int, values: Sequence[Any]) -> tuple:
    if len(values) != count:
        raise ValueError(f"expected {count} values; got {len(values)}")
    return tuple(values)
