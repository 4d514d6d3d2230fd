r"""The two passes of clipping by global norm, and those of its backward pass, on lists of leaves.

With s = sum of squares over all leaves and a factor f(s), clipping is `scale(leaves, f(sum_of_squares(leaves)))`, and

    cotangent of the leaves of `sum_of_squares` under c:   scale(leaves, 2 c)
    cotangent of the leaves of `scale` under v:            scale(v, factor)
    cotangent of the factor of `scale` under v:            dot(v, leaves)

so that each of the three is differentiated by the others. Each is one launch and stands beside its reference.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt_kernels.launch import Columns, finish, launch, lay_out, scalar_table

__all__ = ["dot", "dot_reference", "scale", "scale_reference", "sum_of_squares", "sum_of_squares_reference"]

WIDTH = 4096  # elements a program works on, with 256 threads


def sum_of_squares_reference(leaves: Sequence[Tensor], *, lanes: int | None = None) -> Tensor:
    """Reference of `sum_of_squares`.

    Example:
        >>> sum_of_squares_reference([torch.tensor([1.0, 2.0]), torch.tensor(3.0)])
        tensor(14.)
    """
    return dot_reference(leaves, leaves, lanes=lanes)


def sum_of_squares(leaves: Sequence[Tensor], *, lanes: int | None = None) -> Tensor:
    """Sum the squares of all elements of a list of leaves in one launch.

    Args:
        leaves: Tensors of any shapes and strides, of one floating dtype.
        lanes: The leading dimension of every leaf, which is not summed over, or None.

    Returns:
        The sum, in float32 or wider, shape () or (lanes,). Sums run in a fixed order, so equal calls give equal bits.

    Raises:
        ValueError: If a leaf has not `lanes` lanes, or leaves are on more than one device.
        TypeError: If the leaves are not of one floating dtype.
    """
    return _dot([leaves], lanes)


def dot_reference(leaves: Sequence[Tensor], others: Sequence[Tensor], *, lanes: int | None = None) -> Tensor:
    """Reference of `dot`.

    Example:
        >>> dot_reference([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
        tensor(11.)
    """
    layout = lay_out([leaves, others], lanes)
    real = _real([leaves, others])
    total = torch.zeros(() if lanes is None else (lanes,), dtype=real, device=layout.device)
    for leaf, other in zip(leaves, others, strict=True):
        product = leaf.to(real) * other.to(real)
        total = total + (product.sum() if lanes is None else product[:, None].flatten(1).sum(1))
    return total


def dot(leaves: Sequence[Tensor], others: Sequence[Tensor], *, lanes: int | None = None) -> Tensor:
    """Sum the products of all elements of two lists of leaves in one launch.

    Args:
        leaves: As for `sum_of_squares`.
        others: Tensors of the shapes of `leaves`, of one floating dtype.
        lanes: As for `sum_of_squares`.

    Returns:
        The sum, in float32 or wider, shape () or (lanes,), as that of `sum_of_squares`.

    Raises:
        ValueError: If the lists do not fit together, or as for `sum_of_squares`.
        TypeError: As for `sum_of_squares`.
    """
    return _dot([leaves, others], lanes)


def scale_reference(leaves: Sequence[Tensor], factor: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Reference of `scale`.

    Example:
        >>> scale_reference([torch.tensor([1.0, 2.0])], torch.tensor(0.5))
        [tensor([0.5000, 1.0000])]
    """
    lay_out([leaves], _check_factor(leaves, factor, out), None if out is None else [out])
    real = _real([leaves])
    scaled = []
    for leaf in leaves:
        spread = factor.reshape(factor.shape + (1,) * (leaf.ndim - 1)) if factor.ndim else factor
        scaled.append((leaf.to(real) * spread.to(real)).to(leaf.dtype))
    return scaled if out is None else [o.copy_(value) for o, value in zip(out, scaled, strict=True)]


def scale(leaves: Sequence[Tensor], factor: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Multiply a list of leaves by a factor in one launch.

    Args:
        leaves: Tensors of any shapes and strides, of one floating dtype.
        factor: Floating, on their device, of shape () or (lanes,); then every leaf has that leading dimension.
        out: Tensors of the shapes and the dtype of `leaves` to write to, or None. May be the leaves themselves.

    Returns:
        The products, computed in float32 or wider and rounded to the dtype of the leaves.

    Raises:
        ValueError: If `factor` or `out` do not fit the leaves, or leaves are on more than one device.
        TypeError: If the leaves are not of one floating dtype, or `out` not of theirs, or `factor` not floating.
    """
    lanes = _check_factor(leaves, factor, out)
    layout = lay_out([leaves], lanes, None if out is None else [out])
    if not leaves:
        return []
    from diffopt_kernels import clip_kernel

    dtype = leaves[0].dtype
    written = layout.targets(out, dtype)
    columns = [layout.laid(leaves), written]
    table = scalar_table([factor], lanes)
    launch(clip_kernel.scale, layout, columns, [dtype, dtype], table, real=_real([leaves]), width=WIDTH)
    return finish(out, written)


def _dot(columns: Columns, lanes: int | None) -> Tensor:
    layout = lay_out(columns, lanes)
    real = _real(columns)
    if not columns[0]:
        return torch.zeros(() if lanes is None else (lanes,), dtype=real)
    from diffopt_kernels import clip_kernel

    options: dict[str, Any] = {"real": real, "width": WIDTH, "sums": 1, "sum_dtype": real, "COLUMNS": len(columns)}
    table = torch.empty(1, 0, dtype=torch.float64, device=layout.device)
    dtypes = [column[0].dtype for column in columns]
    totals = launch(clip_kernel.dot, layout, [layout.laid(c) for c in columns], dtypes, table, **options)[:, 0]
    return totals[0] if lanes is None else totals


def _real(columns: Columns) -> torch.dtype:
    double = any(column and column[0].dtype == torch.float64 for column in columns)
    return torch.float64 if double else torch.float32


def _check_factor(leaves: Sequence[Tensor], factor: Tensor, out: Sequence[Tensor] | None) -> int | None:
    if factor.ndim > 1:
        raise ValueError(f"`factor` needs shape () or (lanes,); got {tuple(factor.shape)}")
    if not factor.is_floating_point():
        raise TypeError(f"`factor` needs a floating dtype; got {factor.dtype}")
    if leaves and factor.device != leaves[0].device:
        raise ValueError(f"`factor` is on {factor.device}, the leaves on {leaves[0].device}; move it there once")
    if out is not None and {leaf.dtype for leaf in out} != {leaf.dtype for leaf in leaves}:
        raise TypeError("`out` needs the dtype of the leaves")
    return factor.shape[0] if factor.ndim else None
