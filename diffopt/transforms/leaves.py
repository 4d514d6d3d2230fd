"""Flat lists of leaves, checked once at the door, and the precision in which a transformation computes."""

import operator
from typing import Any

import torch
from optree import PyTreeSpec
from torch import Tensor, nn

from diffopt import tree
from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.typing import Numeric, Tree

__all__ = [
    "as_dtype",
    "check_hyperparameter",
    "check_scalar",
    "flatten_floating",
    "flatten_like",
    "precise_dtype",
    "zero_count",
]


_PLAIN = {Tensor, nn.Parameter}
_shape = operator.attrgetter("shape")


def flatten_floating(leaves_tree: Tree, name: str) -> tuple[list[Tensor], PyTreeSpec]:
    """Flatten a tree and check that every leaf is a real floating-point tensor.

    Args:
        leaves_tree: A tree of tensors.
        name: What error messages call it.

    Returns:
        The leaves and the treespec.

    Raises:
        TypeError: If a leaf is not a tensor, or is of an integer, bool or complex dtype.

    Example:
        >>> flatten_floating([torch.tensor(3)], "params")
        Traceback (most recent call last):
        ...
        TypeError: `params[0]` must be a floating-point tensor; got torch.int64. Convert it with .to(torch.float32).
    """
    leaves, treespec = tree.flatten(leaves_tree)
    if _all_plain(leaves) and all(map(Tensor.is_floating_point, leaves)):
        return leaves, treespec
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            tree.check_tensors(leaves_tree, name=name)
        if not leaf.is_floating_point():
            remedy = "Pass torch.view_as_real of it" if leaf.is_complex() else "Convert it with .to(torch.float32)"
            raise TypeError(
                f"`{name}{tree.paths(leaves_tree)[i]}` must be a floating-point tensor; got {leaf.dtype}. {remedy}."
            )
    return leaves, treespec


def flatten_like(
    other: Tree, leaves: list[Tensor], treespec: PyTreeSpec, *, name: str, reference_name: str = "updates"
) -> list[Tensor]:
    """Flatten a tree and check that it has the structure and the shapes of one that is flat already.

    Args:
        other: The tree to flatten.
        leaves: The leaves of the reference.
        treespec: The structure of the reference.
        name: What error messages call the tree.
        reference_name: What they call the reference.

    Returns:
        The leaves of the tree, as many as the reference has.

    Raises:
        ValueError: If structures or shapes differ; the message names the path.
        TypeError: If a leaf is not a tensor.

    Example:
        >>> flatten_like([torch.ones(3)], *tree.flatten([torch.ones(2)]), name="params")
        Traceback (most recent call last):
        ...
        ValueError: `params[0]` must have shape (2,), as `updates[0]` has; got (3,).
    """
    found, spec = tree.flatten(other)
    if spec != treespec:
        reference = tree.unflatten(treespec, leaves)
        tree.check_same_structure(other, reference, name=name, reference_name=reference_name)
    if _all_plain(found) and list(map(_shape, found)) == list(map(_shape, leaves)):
        return found
    for i, (leaf, like) in enumerate(zip(found, leaves, strict=True)):
        if not isinstance(leaf, Tensor):
            tree.check_tensors(other, name=name)
        if leaf.shape != like.shape:
            path = tree.paths(other)[i]
            raise ValueError(
                f"`{name}{path}` must have shape {tuple(like.shape)}, as `{reference_name}{path}` has; "
                f"got {tuple(leaf.shape)}."
            )
    return found


def _all_plain(leaves: list[Tensor]) -> bool:
    """Whether all are tensors and no loop over them is needed, which for thousands of leaves takes most of a step."""
    return not torch.compiler.is_compiling() and set(map(type, leaves)) <= _PLAIN


def precise_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype in which a leaf's arithmetic and moments are kept: float32 for 16 bits, else its own.

    In bfloat16, 0.999 rounds to 1, and a running mean stops moving once a step changes it by less than 0.4%.

    Args:
        dtype: A leaf's floating-point dtype.

    Returns:
        The dtype.

    Example:
        >>> precise_dtype(torch.bfloat16), precise_dtype(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def as_dtype(value: Numeric, dtype: torch.dtype) -> Numeric:
    """Cast a hyperparameter to the dtype of the arithmetic, so that it cannot promote a leaf.

    Args:
        value: A number, returned as it is, or a 0-d tensor.
        dtype: The dtype of the leaf's arithmetic.

    Returns:
        The hyperparameter; a tensor keeps its gradient.

    Example:
        >>> as_dtype(torch.tensor(0.5, dtype=torch.float64), torch.float32).dtype
        torch.float32
    """
    return value.to(dtype) if isinstance(value, Tensor) else value


def zero_count(leaves: list[Tensor]) -> Tensor:
    """Make a step count of zero on the device of the leaves.

    Args:
        leaves: The leaves of the parameters; there may be none.

    Returns:
        An int64 0-d tensor.

    Example:
        >>> zero_count([])
        tensor(0)
    """
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device if leaves else None)


def check_scalar(value: Any, source: str) -> Tensor:
    """Return a value if it is a number to minimize, and raise if not.

    Args:
        value: What a function returned.
        source: The function, as error messages call it.

    Returns:
        The value, a 0-d floating-point tensor.

    Raises:
        TypeError: If it is anything else.

    Example:
        >>> check_scalar(torch.ones(2), "`loss`")
        Traceback (most recent call last):
        ...
        TypeError: `loss` must return a 0-d floating-point tensor; got shape (2,) of torch.float32. Reduce it, for ...
    """
    if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point():
        return value
    must = f"{source} must return a 0-d floating-point tensor"
    if not isinstance(value, Tensor):
        raise TypeError(f"{must}; got {type(value).__name__}.")
    raise TypeError(f"{must}; got shape {tuple(value.shape)} of {value.dtype}. Reduce it, for example by .mean().")
