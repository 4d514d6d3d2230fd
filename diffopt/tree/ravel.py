"""A tree of tensors as one vector, and back."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffopt.tree.structure import check_tensors, flatten, paths, unflatten
from diffopt.typing import Shape, Tree

__all__ = ["ravel"]


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """Concatenate the leaves of a tree into one vector, with the function that undoes it.

    Both directions are differentiable and may be used under any transform. A tree that is one contiguous
    tensor is not copied: the vector shares its memory.

    Args:
        tree: A tree of tensors of any shapes, of one dtype and one device.

    Returns:
        The vector, shape (n,), and ``unravel``: it takes a vector of shape (n,) to a tree of the same
        structure and shapes, whose leaves are views of the vector and have its dtype and device.

    Raises:
        ValueError: If the tree has no leaves, or if ``unravel`` is given another shape.
        TypeError: If a leaf is not a tensor, or if dtypes or devices are mixed.

    Example:
        >>> vector, unravel = ravel({"w": torch.ones(2, 2), "b": torch.zeros(1)})
        >>> vector
        tensor([0., 1., 1., 1., 1.])
        >>> unravel(2 * vector)["w"]
        tensor([[2., 2.],
                [2., 2.]])
    """
    if isinstance(tree, Tensor):
        return _ravel_tensor(tree)
    leaves, treespec = flatten(tree)
    _check_one_kind(tree, leaves)
    shapes = [tuple(leaf.shape) for leaf in leaves]
    sizes = [math.prod(shape) for shape in shapes]
    flat = [leaf if leaf.ndim == 1 else leaf.reshape(-1) for leaf in leaves]
    vector = flat[0] if len(flat) == 1 else torch.cat(flat)
    total = sum(sizes)

    def unravel(vector: Tensor) -> Tree:
        if vector.shape != (total,):
            raise ValueError(f"`unravel` needs a vector of shape ({total},); got {tuple(vector.shape)}.")
        return unflatten(treespec, _pieces(vector, sizes, shapes))

    return vector, unravel


def _ravel_tensor(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    shape, total = tensor.shape, tensor.numel()

    def unravel(vector: Tensor) -> Tensor:
        if vector.shape != (total,):
            raise ValueError(f"`unravel` needs a vector of shape ({total},); got {tuple(vector.shape)}.")
        if len(shape) == 1:
            return vector
        return vector.reshape(shape) if shape else vector.squeeze(0)  # reshape fails in an empty vmap

    return (tensor if len(shape) == 1 else tensor.reshape(-1)), unravel


def _pieces(vector: Tensor, sizes: list[int], shapes: list[Shape]) -> list[Tensor]:
    parts = [vector] if len(sizes) == 1 else vector.split(sizes)
    return [part if len(shape) == 1 else part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _check_one_kind(tree: Tree, leaves: list[Tensor]) -> None:
    if not leaves:
        raise ValueError("`ravel` needs a tree with at least one leaf; got an empty tree.")
    check_tensors(tree)
    first = leaves[0]
    for i, leaf in enumerate(leaves):
        if leaf.dtype == first.dtype and leaf.device == first.device:
            continue
        what = "dtype" if leaf.dtype != first.dtype else "device"
        names = paths(tree)
        raise TypeError(
            f"`ravel` needs leaves of one {what}; `tree{names[0]}` has {getattr(first, what)} and "
            f"`tree{names[i]}` has {getattr(leaf, what)}. Convert them first with "
            f"tree.map(lambda x: x.to(...), tree), or ravel the parts of each {what} on their own."
        )
