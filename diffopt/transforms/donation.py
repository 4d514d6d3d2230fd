"""Donated arguments: tensors whose memory a step may write over, and when it must not.

PyTorch's fused optimizer functions and Triton kernels write in place without telling autograd. So before a donated
step every tensor is looked at, and after it the version counters of what was written go up: a graph that saved one of
them raises in its backward pass, and does not answer wrongly.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffopt.autodiff.levels import derivative_possible, transforms_active

__all__ = ["check_donation", "mark_written"]


def check_donation(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> None:
    """Raise unless tensors may be written in place.

    Args:
        written: The tensors to write: parameters and moments.
        read: Those read meanwhile: gradients and hyperparameters.

    Raises:
        RuntimeError: If a transform is live, or a derivative may be asked for: a tensor requires grad in grad mode.
        ValueError: If a written tensor overlaps itself (an expanded one), another (a tied leaf) or a read one.

    Example:
        >>> weight = torch.ones(3)
        >>> check_donation([weight, torch.ones(3)])
        >>> check_donation([weight, weight[1:]])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: `donate=True` needs tensors that share no memory; two overlap, such as tied leaves or views...
    """
    if transforms_active():
        raise RuntimeError(
            "`donate=True` under a live transform would write over values that the transform still needs: leave donate "
            "out there."
        )
    if derivative_possible((*written, *read)):
        raise RuntimeError(
            "`donate=True` with a tensor that requires grad would lose its derivative: call it under torch.no_grad(), "
            "or leave donate out."
        )
    if not all(map(Tensor.is_contiguous, written)) and not all(map(_is_dense, written)):
        raise ValueError(
            "`donate=True` needs tensors whose entries have memory of their own; one is expanded or overlaps itself. "
            "Clone it first, or leave donate out."
        )
    if _overlap(written, read):
        raise ValueError(
            "`donate=True` needs tensors that share no memory; two overlap, such as tied leaves or views. "
            "Clone it first, or leave donate out."
        )


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Raise the version counters of tensors that were written in place, so that graphs which saved them notice.

    Args:
        tensors: The tensors.

    Example:
        >>> x = torch.ones(1)
        >>> mark_written([x])
        >>> x._version
        1
    """
    if any(map(Tensor.is_inference, tensors)):
        tensors = [x for x in tensors if not x.is_inference()]
    torch.autograd.graph.increment_version(tensors)


def _is_dense(x: Tensor) -> bool:
    """Whether no two entries share memory: each dimension steps over all that the smaller ones span."""
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride < reach:
            return x.numel() == 0
        reach = max(reach, stride * (size - 1) + reach)
    return True


def _overlap(written: Sequence[Tensor], read: Sequence[Tensor]) -> bool:
    """Whether the memory of a written tensor meets that of any other, by the ranges that they span."""
    tensors = [*written, *read]
    starts = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    spans = np.fromiter(map(_span, tensors), np.int64, len(tensors))
    kept = spans > 0
    # Sorted by start, a range meets an earlier one if it starts before the furthest end so far.
    order = np.argsort(starts[kept], kind="stable")
    first, last = starts[kept][order], (starts + spans)[kept][order]
    is_written = (np.arange(len(tensors)) < len(written))[kept][order]
    reach = np.maximum.accumulate(np.concatenate([[0], last]))[:-1]
    reach_of_written = np.maximum.accumulate(np.concatenate([[0], np.where(is_written, last, 0)]))[:-1]
    return bool(np.any(first < np.where(is_written, reach, reach_of_written)))


def _span(x: Tensor) -> int:
    if x.is_contiguous():
        return x.nbytes
    if x.numel() == 0:
        return 0
    return (1 + sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))) * x.itemsize
