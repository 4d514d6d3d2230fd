r"""Clipping by global norm in two launches, each differentiable by the other.

.. math:: u = f g, \ f = \min\left(1, \frac{c}{\sqrt{g^\top g}}\right), \qquad
    (\bar x, \bar y) = (\bar s\, y, \bar s\, x) \text{ for } s = x^\top y, \qquad
    (\bar g, \bar f) = (f v, v^\top g) \text{ for } u = f g
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffopt.autodiff.custom_derivative import Rules, by_rule, rules_of
from diffopt.autodiff.fused_op import Columns, Launch, Layout, fold, fused_by_rule
from diffopt_kernels import clip

__all__ = ["dot", "scale"]


def dot(leaves: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Sum the products of all entries of two lists of leaves, in one launch.

    Args:
        leaves: Tensors of one floating-point dtype, on a GPU.
        others: Tensors of the same shapes and dtype.

    Returns:
        The sum, 0-d, in float32 or wider.
    """
    layout, real = Layout(len(leaves), 2, 1), torch.promote_types(leaves[0].dtype, torch.float32)

    def launch(columns: Columns, scalars: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (clip.dot(*columns, lanes=_lanes(scalars)),)

    def plain(*inputs: Tensor) -> tuple[Tensor, ...]:
        xs, ys = layout.split(inputs)[0]
        return (torch.stack([(x.to(real) * y.to(real)).sum() for x, y in zip(xs, ys, strict=True)]).sum(),)

    def vjp(inputs, outputs, cotangents, wanted):
        xs, ys = layout.split(inputs)[0]
        size = len(xs)
        pulled = [scale(ys, cotangents[0]) if any(wanted[:size]) else [None] * size]
        pulled.append(scale(xs, cotangents[0]) if any(wanted[size:]) else [None] * size)
        return (*pulled[0], *pulled[1], None)

    # The scalar stands for the lanes of a vmap: it has one entry for each.
    lane = torch.ones((), dtype=real, device=leaves[0].device)
    op = by_rule(Rules(Launch(launch, layout, 1), vjp, rules_of(plain)[1], fold, forgets_outputs=True), plain)
    return op(*leaves, *others, lane)[0]


def scale(leaves: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """Multiply a list of leaves by a factor, in one launch.

    Args:
        leaves: Tensors of one floating-point dtype, on a GPU.
        factor: A 0-d tensor, in float32 or wider.

    Returns:
        The products, in the dtype of the leaves.
    """
    return _scale([leaves], [factor])[0]


def _reference(leaf: Tensor, factor: Tensor) -> tuple[Tensor]:
    return ((leaf.to(factor.dtype) * factor).to(leaf.dtype),)


def _forward(columns: Columns, scalars: Sequence[Tensor]) -> tuple[list[Tensor]]:
    return (clip.scale(columns[0], scalars[0]),)


def _backward(
    columns: Columns, scalars: Sequence[Tensor], cotangents: Columns, wanted: tuple[bool, ...], scalars_wanted: bool
) -> tuple[tuple[list[Tensor] | None], list[Tensor] | None]:
    leaves, seeds = columns[0], cotangents[0]
    sums = [clip.dot(seeds, leaves, lanes=_lanes(scalars)).to(scalars[0].dtype)] if scalars_wanted else None
    return (clip.scale(seeds, scalars[0]) if wanted[0] else None,), sums


_scale = fused_by_rule(_reference, _forward, _backward)


def _lanes(scalars: Sequence[Tensor]) -> int | None:
    return scalars[0].shape[0] if scalars[0].ndim else None
