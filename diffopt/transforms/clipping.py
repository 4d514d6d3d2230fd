r"""Clipping: by entry, by the norm of everything, by the size of each leaf, and by that of the parameters.

No norm is treated as constant: derivatives pass through it, and are finite at a zero gradient. On a GPU, the global
norm is two launches of a kernel, however many leaves there are.
"""

from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms.base import EmptyState, GradientTransformation
from diffopt.transforms.fusion import clip as fused
from diffopt.transforms.fusion import launch
from diffopt.transforms.leafwise import leafwise
from diffopt.transforms.leaves import as_dtype, check_hyperparameter, flatten_floating, precise_dtype
from diffopt.typing import Numeric, Tree

__all__ = ["adaptive_grad_clip", "clip", "clip_by_block_rms", "clip_by_global_norm"]


def clip(max_delta: Numeric) -> GradientTransformation:
    r"""Clip each entry: :math:`u_t = \min(\max(g_t, -c), c)`.

    Args:
        max_delta: The bound c, at least 0, a number or a 0-d tensor.

    Returns:
        A stateless transformation, whose updates keep their dtypes.

    Raises:
        TypeError: If max_delta is neither a number nor a floating-point tensor.
        ValueError: If max_delta is negative, or a tensor with dimensions.

    Example:
        >>> clip(1.0).update(torch.tensor([3.0, -0.5]), EmptyState())[0]
        tensor([ 1.0000, -0.5000])
    """
    check_hyperparameter("max_delta", max_delta, at_least=0.0)
    return leafwise(EmptyState, lambda g, c: (torch.clamp(g, -c, c),), lambda count: (max_delta,))


def clip_by_global_norm(max_norm: Numeric) -> GradientTransformation:
    r"""Shorten the updates to a norm, taken over all leaves together.

    .. math:: u_t = g_t \min\left(1, \frac{c}{\lVert g_t \rVert}\right)

    Args:
        max_norm: The bound c, above 0, a number or a 0-d tensor.

    Returns:
        A stateless transformation, whose updates keep their dtypes.

    Raises:
        TypeError: If max_norm is neither a number nor a floating-point tensor.
        ValueError: If max_norm is not above 0, or a tensor with dimensions.

    Example:
        >>> clip_by_global_norm(1.0).update({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)}, EmptyState())[0]
        {'a': tensor([0.6000]), 'b': tensor(0.8000)}

    References:
        Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013,
        algorithm 1.
    """
    check_hyperparameter("max_norm", max_norm, above=0.0)

    def init(params: Tree) -> EmptyState:
        flatten_floating(params, "params")
        return EmptyState()

    def update(updates: Tree, state: EmptyState, params: Tree | None = None, **extra: Any) -> tuple[Tree, EmptyState]:
        leaves, treespec = flatten_floating(updates, "updates")
        if launch.by_kernel(leaves):
            squares = fused.dot(leaves, leaves)
            factor = _shrink(_safe_sqrt(squares), as_dtype(max_norm, squares.dtype))
            return tree.unflatten(treespec, fused.scale(leaves, factor)), state
        precise = [leaf.to(precise_dtype(leaf.dtype)) for leaf in leaves]
        norm = tree.norm(precise)
        factor = _shrink(norm, as_dtype(max_norm, norm.dtype))
        out = [(x * factor.to(x.dtype)).to(leaf.dtype) for x, leaf in zip(precise, leaves, strict=True)]
        return tree.unflatten(treespec, out), state

    return GradientTransformation(init, update)


def clip_by_block_rms(threshold: Numeric) -> GradientTransformation:
    r"""Shorten each leaf to a root mean square: :math:`u = g \min(1, c / \text{rms}(g))`.

    Args:
        threshold: The bound c, above 0, a number or a 0-d tensor.

    Returns:
        A stateless transformation, whose updates keep their dtypes.

    Raises:
        TypeError: If threshold is neither a number nor a floating-point tensor.
        ValueError: If threshold is not above 0, or a tensor with dimensions.

    Example:
        >>> clip_by_block_rms(1.0).update([torch.tensor([2.0, -2.0]), torch.tensor(0.5)], EmptyState())[0]
        [tensor([ 1., -1.]), tensor(0.5000)]

    References:
        Shazeer and Stern, "Adafactor", ICML 2018, section 6.
    """
    check_hyperparameter("threshold", threshold, above=0.0)

    def rule(g, threshold):
        return (g * _shrink(tree.norm(g) / max(g.numel(), 1) ** 0.5, threshold),)

    return leafwise(EmptyState, rule, lambda count: (threshold,))


def adaptive_grad_clip(clipping: Numeric, eps: Numeric = 1e-3) -> GradientTransformation:
    r"""Shorten the gradient of each unit to a multiple of the norm of the unit's parameters.

    .. math:: u_i = g_i \min\left(1, \frac{\lambda \max(\lVert \theta_i \rVert, \epsilon)}{\lVert g_i \rVert}\right)

    A unit is a row of a leaf of two or more dimensions (all entries of one index of its first), and otherwise
    the whole leaf.

    Args:
        clipping: The multiple :math:`\lambda`, above 0, a number or a 0-d tensor.
        eps: The least norm of a unit's parameters, above 0, likewise.

    Returns:
        A stateless transformation, whose update needs ``params`` and keeps dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is not above 0, a tensor has dimensions, or update gets no params.

    Example:
        >>> params, grads = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.ones(2, 2)
        >>> adaptive_grad_clip(1.0).update(grads, EmptyState(), params)[0]
        tensor([[1.0000, 1.0000],
                [0.3536, 0.3536]])

    References:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021, eq. 3.
    """
    check_hyperparameter("clipping", clipping, above=0.0)
    check_hyperparameter("eps", eps, above=0.0)

    def rule(g, p, clipping, eps):
        size = _unit_norm(p)
        return (g * _shrink(_unit_norm(g), clipping * torch.where(size > eps, size, eps)),)

    return leafwise(EmptyState, rule, lambda count: (clipping, eps), takes_params="adaptive_grad_clip")


def _shrink(norm: Tensor, bound: Numeric) -> Tensor:
    """Give min(1, bound / norm), with derivative 0 where the norm is 0."""
    over = norm > bound
    return torch.where(over, bound / torch.where(over, norm, 1.0), 1.0)


def _unit_norm(x: Tensor) -> Tensor:
    squares = x * x
    return _safe_sqrt(squares.sum(dim=tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else squares.sum())


def _safe_sqrt(total: Tensor) -> Tensor:
    """Give the root, with derivative 0 where it is 0."""
    positive = total > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, total, 1.0)), 0.0)
