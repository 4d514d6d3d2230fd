"""Decoupled weight decay, for all parameters or the masked ones."""

from collections.abc import Callable
from typing import Any

import optree
from optree import PyTreeSpec

from diffopt import tree
from diffopt.transforms.base import EmptyState, GradientTransformation
from diffopt.transforms.leaves import (
    as_dtype,
    check_hyperparameter,
    flatten_floating,
    flatten_like,
    precise_dtype,
)
from diffopt.typing import Numeric, Tree

__all__ = ["add_decayed_weights"]


def add_decayed_weights(
    weight_decay: Numeric, mask: Tree | Callable[[Tree], Tree] | None = None
) -> GradientTransformation:
    r"""Add a multiple of the parameters to the updates: :math:`u_t = g_t + \lambda \theta_t` where the mask holds.

    Args:
        weight_decay: The multiple :math:`\lambda`, at least 0, a number or a 0-d tensor.
        mask: Which leaves decay: a tree of bools with the structure of the parameters, a prefix of one (a bool
            stands for the whole subtree in its place), or a function from the parameters to either. Default:
            all.

    Returns:
        A stateless transformation, whose update needs ``params`` and keeps the updates' dtypes.

    Raises:
        TypeError: If weight_decay is neither a number nor a floating-point tensor; in init and update, if an
            entry of the mask is not a bool.
        ValueError: If weight_decay is a negative number or a tensor with dimensions; in init and update, if
            the mask is no prefix of the parameters, or if update gets no params.

    Example:
        >>> import torch
        >>> params = {"weight": torch.ones(2), "bias": torch.ones(1)}
        >>> decay = add_decayed_weights(0.1, mask={"weight": True, "bias": False})
        >>> decay.update(tree.zeros_like(params), decay.init(params), params)[0]
        {'weight': tensor([0.1000, 0.1000]), 'bias': tensor([0.])}

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2, line 12.
    """
    check_hyperparameter("weight_decay", weight_decay, at_least=0.0)

    def init(params: Tree) -> EmptyState:
        flatten_floating(params, "params")
        _mask_leaves(mask, params)
        return EmptyState()

    def update(updates: Tree, state: EmptyState, params: Tree | None = None, **extra: Any) -> tuple[Tree, EmptyState]:
        if params is None:
            raise ValueError(
                "`add_decayed_weights` needs the parameters: call update(grads, state, params), or `step`."
            )
        grads, treespec = flatten_floating(updates, "updates")
        leaves = flatten_like(params, grads, treespec, name="params")
        out = []
        for g, p, decays in zip(grads, leaves, _mask_leaves(mask, params), strict=True):
            dtype = precise_dtype(g.dtype)
            decayed = (g.to(dtype) + as_dtype(weight_decay, dtype) * p.to(dtype)).to(g.dtype) if decays else g
            out.append(decayed)
        return tree.unflatten(treespec, out), state

    return GradientTransformation(init, update)


def _mask_leaves(mask: Any, params: Tree) -> list[bool]:
    """Give one bool a leaf of the parameters."""
    return _broadcast(True if mask is None else mask(params) if callable(mask) else mask, tree.flatten(params)[1])


def _broadcast(mask: Any, params: PyTreeSpec, path: str = "") -> list[bool]:
    # By hand: torch.compile traces neither optree's broadcast_prefix nor a flatten of Python constants.
    if isinstance(mask, bool):
        return [mask] * params.num_leaves
    if params.is_leaf():
        raise TypeError(f"`mask{path}` must be a bool; got {type(mask).__name__}: {mask!r:.60}.")
    children, keys = _children(mask, path), params.entries()
    if len(children) != len(keys) or any(key not in children for key in keys):
        raise ValueError(
            "`mask` must have the structure of `params`, or be a prefix of it. "
            f"`params{path}` has the keys {keys}; `mask{path}` has {list(children)}."
        )
    specs = zip(keys, params.children(), strict=True)
    return [value for key, spec in specs for value in _broadcast(children[key], spec, f"{path}[{key!r}]")]


def _children(mask: Any, path: str) -> dict[Any, Any]:
    if isinstance(mask, dict):
        return mask
    if isinstance(mask, (list, tuple)):
        return dict(enumerate(mask))
    if mask is None:
        return {}
    if optree.tree_is_leaf(mask):
        raise TypeError(f"`mask{path}` must be a bool or a tree of bools; got {type(mask).__name__}: {mask!r:.60}.")
    children, _, keys, _ = optree.tree_flatten_one_level(mask)
    return dict(zip(keys, children, strict=True))
