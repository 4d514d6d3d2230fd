"""Masks and labels: a value for each leaf, from a tree, a prefix of one, or a function of the parameters."""

from typing import Any

import optree
from optree import PyTreeSpec

from diffopt import tree
from diffopt.typing import Tree

__all__ = ["broadcast", "mask_leaves"]


def mask_leaves(mask: Any, params: Tree) -> list[bool]:
    """Give one bool a leaf of the parameters: by a tree, a prefix or a function; None holds everywhere."""
    mask = True if mask is None else mask(params) if callable(mask) else mask
    return broadcast(mask, tree.flatten(params)[1], bool, "mask")


def broadcast(mask: Any, params: PyTreeSpec, kind: type, name: str, path: str = "") -> list[Any]:
    """Give one value of a kind, such as bool, a leaf of the parameters, from a tree or a prefix of one."""
    # By hand: torch.compile traces neither optree's broadcast_prefix nor a flatten of Python constants.
    if isinstance(mask, kind):
        return [mask] * params.num_leaves
    if params.is_leaf():
        raise TypeError(f"`{name}{path}` must be a {kind.__name__}; got {type(mask).__name__}: {mask!r:.60}.")
    children, keys = _children(mask, kind, name, path), params.entries()
    if len(children) != len(keys) or any(key not in children for key in keys):
        raise ValueError(
            f"`{name}` must have the structure of `params`, or be a prefix of it. "
            f"`params{path}` has the keys {keys}; `{name}{path}` has {list(children)}."
        )
    specs = zip(keys, params.children(), strict=True)
    return [value for key, spec in specs for value in broadcast(children[key], spec, kind, name, f"{path}[{key!r}]")]


def _children(mask: Any, kind: type, name: str, path: str) -> dict[Any, Any]:
    if isinstance(mask, dict):
        return mask
    if isinstance(mask, (list, tuple)):
        return dict(enumerate(mask))
    if mask is None:
        return {}
    if optree.tree_is_leaf(mask):
        word = kind.__name__
        raise TypeError(
            f"`{name}{path}` must be a {word} or a tree of {word}s; got {type(mask).__name__}: {mask!r:.60}."
        )
    children, _, keys, _ = optree.tree_flatten_one_level(mask)
    return dict(zip(keys, children, strict=True))
