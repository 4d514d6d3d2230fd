"""Decoupled weight decay, for all parameters or the masked ones."""

from collections.abc import Callable
from typing import Any

from diffopt import tree
from diffopt.transforms.base import EmptyState, GradientTransformation
from diffopt.transforms.leafwise import need_params
from diffopt.transforms.leaves import (
    as_dtype,
    check_hyperparameter,
    flatten_floating,
    flatten_like,
    precise_dtype,
)
from diffopt.transforms.masks import mask_leaves
from diffopt.typing import Numeric, Tree

__all__ = ["add_decayed_weights"]


def add_decayed_weights(
    weight_decay: Numeric, mask: Tree | Callable[[Tree], Tree] | None = None
) -> GradientTransformation:
    r"""Add a multiple of the parameters to the updates: :math:`u_t = g_t + \lambda \theta_t` where the mask holds.

    Args:
        weight_decay: The multiple :math:`\lambda`, at least 0, a number or a 0-d tensor.
        mask: Which leaves decay: a tree of bools with the structure of the parameters, a prefix of one (a bool
            stands for the whole subtree in its place), or a function from the parameters to either, as in `masked`.
            Default: all.

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
        mask_leaves(mask, params)
        return EmptyState()

    def update(updates: Tree, state: EmptyState, params: Tree | None = None, **extra: Any) -> tuple[Tree, EmptyState]:
        params = need_params(params, "add_decayed_weights")
        grads, treespec = flatten_floating(updates, "updates")
        leaves = flatten_like(params, grads, treespec, name="params")
        out = []
        for g, p, decays in zip(grads, leaves, mask_leaves(mask, params), strict=True):
            dtype = precise_dtype(g.dtype)
            decayed = (g.to(dtype) + as_dtype(weight_decay, dtype) * p.to(dtype)).to(g.dtype) if decays else g
            out.append(decayed)
        return tree.unflatten(treespec, out), state

    return GradientTransformation(init, update)
