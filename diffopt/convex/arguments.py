"""What projections and proxes take: points as vectors or leaves, hyperparameters of many shapes, and how they fail."""

from collections.abc import Callable

import torch
from optree import PyTreeSpec
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import any_lane
from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.transforms.leaves import flatten_floating
from diffopt.typing import Numeric, Tree

__all__ = [
    "ProjectionError",
    "check_matrix",
    "check_tensor",
    "check_vector",
    "detached",
    "flatten_floating",
    "flatten_vector",
    "like_vector",
    "norm",
    "report",
    "scalar",
    "spread",
    "spread_vector",
    "unless",
]


class ProjectionError(RuntimeError):
    """A projection has no solution, or its iterations did not reach it."""


def flatten_vector(x: Tree, name: str) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """Ravel a tree of floating-point tensors, and raise unless it has at least one entry."""
    flatten_floating(x, name)
    vector, unravel = tree.ravel(x)
    if vector.numel() == 0:
        raise ValueError(f"`{name}` must have at least one entry; got none.")
    return vector, unravel


def like_vector(value: Tree, x: Tree, vector: Tensor, name: str) -> Tensor:
    """Ravel a tree that must be shaped like `x`, in the dtype of its vector."""
    flatten_floating(value, name)
    tree.check_same_structure(value, x, name=name, reference_name="x")
    for path, leaf, like in zip(tree.paths(x), tree.leaves(value), tree.leaves(x), strict=True):
        if leaf.shape != like.shape:
            raise ValueError(
                f"`{name}{path}` must have shape {tuple(like.shape)}, as `x{path}` has; got {tuple(leaf.shape)}."
            )
    return tree.ravel(value)[0].to(vector.dtype)


def scalar(value: Numeric, name: str, like: Tensor, *, at_least: float | None = None, above: float | None = None):
    """Check a number or a 0-d tensor, and cast a tensor to the dtype of the arithmetic."""
    check_hyperparameter(name, value, at_least=at_least, above=above)
    return value.to(like.dtype) if isinstance(value, Tensor) else float(value)


def spread(
    value: Tree, leaves: list[Tensor], treespec: PyTreeSpec, name: str, *, at_least: float | None = None
) -> list[Numeric]:
    """One hyperparameter for each leaf: from a number, a tensor that broadcasts to every leaf, or a tree of those."""
    if isinstance(value, (int, float, Tensor)):
        values = [value] * len(leaves)
    else:
        tree.check_same_structure(value, tree.unflatten(treespec, leaves), name=name, reference_name="x")
        values = tree.leaves(value)
    return [_spread_leaf(v, leaf, name, at_least) for v, leaf in zip(values, leaves, strict=True)]


def _spread_leaf(value, leaf, name, at_least):
    if not isinstance(value, Tensor) or value.ndim == 0:
        return scalar(value, name, leaf, at_least=at_least)
    check_tensor(value, name)
    ends = leaf.shape[leaf.ndim - value.ndim :]
    if value.ndim > leaf.ndim or any(v not in (1, n) for v, n in zip(value.shape, ends, strict=True)):
        raise ValueError(
            f"`{name}` must broadcast to the shape {tuple(leaf.shape)} of `x`; got {tuple(value.shape)}. Map over "
            "several values with torch.func.vmap."
        )
    return value.to(leaf.dtype)


def spread_vector(value: Tree, x: Tree, name: str) -> Tensor:
    """One hyperparameter for each entry of the raveled tree."""
    leaves, treespec = tree.flatten(x)
    values = spread(value, leaves, treespec, name)
    full = [v.expand(t.shape) if isinstance(v, Tensor) else torch.full_like(t.detach(), v) for v, t in
            zip(values, leaves, strict=True)]  # fmt: skip
    return torch.cat([v.reshape(-1) for v in full])


def check_tensor(value: Tensor, name: str) -> None:
    """Raise unless a value is a floating-point tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor; got {found}.")


def check_matrix(value: Tensor, name: str, columns: int | None = None) -> None:
    """Raise unless a value is a floating-point matrix, with as many columns as there are unknowns."""
    check_tensor(value, name)
    if value.ndim != 2 or (columns is not None and value.shape[1] != columns):
        wanted = "(rows, columns)" if columns is None else f"(rows, {columns}), a column for each entry of `x`"
        raise ValueError(
            f"`{name}` must be a matrix of shape {wanted}; got {tuple(value.shape)}. Map over several matrices with "
            "torch.func.vmap."
        )


def check_vector(value: Tensor, name: str, size: int) -> None:
    """Raise unless a value is a floating-point vector of that size."""
    check_tensor(value, name)
    if value.shape != (size,):
        raise ValueError(f"`{name}` must have shape ({size},); got {tuple(value.shape)}.")


def unless(sound: Tensor, message: str) -> None:
    """Raise a `ValueError` unless a condition on values holds in every lane; a compiled call cannot look."""
    if not torch.compiler.is_compiling() and any_lane(~sound):
        raise ValueError(message)


def report(converged: Tensor, value: Tensor, throw: bool, message: str) -> Tensor:
    """The value of an iteration; where it failed, raise, or give NaN in a compiled call, unless told not to throw."""
    if not throw:
        return value
    if torch.compiler.is_compiling():
        return torch.where(converged, value, torch.nan)
    if any_lane(~converged):
        raise ProjectionError(f"{message} Pass throw=False to take the result as it is.")
    return value


def detached(value):
    """The values of a tensor without its derivatives, to find an active set by; a number is itself."""
    return value.detach() if isinstance(value, Tensor) else value


def norm(x: Tensor) -> Tensor:
    """The 2-norm of a vector of any magnitude, with derivatives of every order 0 at 0."""
    size = x.detach().abs().amax()
    size = torch.where(size > 0, size, 1.0)  # held constant: the norm does not depend on it
    squares = ((x / size) ** 2).sum()
    zero = squares == 0  # not so of NaN, which stays
    return size * torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
