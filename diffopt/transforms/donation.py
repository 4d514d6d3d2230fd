"""Donated arguments: tensors whose memory a step may write over, and when it must not.

PyTorch's fused optimizer functions and Triton kernels write in place without telling autograd. So before a donated
step every tensor is looked at, and after it the version counters of what was written go up: a graph that saved one of
them raises in its backward pass, and does not answer wrongly.
"""

import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffopt.autodiff.levels import derivative_possible, transforms_active

__all__ = ["check_donation", "mark_written"]

_stride = operator.methodcaller("stride")


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


def mark_written(tensors: Iterable[Tensor]) -> None:
    """Raise the version counters of tensors that were written in place, so that graphs which saved them notice.

    Args:
        tensors: The tensors.

    Example:
        >>> x = torch.ones(1)
        >>> mark_written([x])
        >>> x._version
        1
    """
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


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
    tensors = [x for x in (*written, *read) if x.numel()]
    starts = list(map(Tensor.data_ptr, tensors))
    ends = [start + _span(x) for start, x in zip(starts, tensors, strict=True)]
    count = sum(1 for x in written if x.numel())
    # Sorted by start, a range meets an earlier one if it starts before the furthest end so far.
    order = sorted(range(len(tensors)), key=starts.__getitem__)
    reach_written = reach_any = 0
    for i in order:
        if starts[i] < (reach_any if i < count else reach_written):
            return True
        reach_any = max(reach_any, ends[i])
        if i < count:
            reach_written = max(reach_written, ends[i])
    return False


def _span(x: Tensor) -> int:
    if x.is_contiguous():
        return x.nbytes
    return (1 + sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))) * x.itemsize
