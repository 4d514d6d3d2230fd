"""Donated steps one after the other: what was checked of the tensors is not checked again while they stay the same.

With a thousand small leaves the checks of donation take longer than the step. Between two steps of a loop only the
gradients are new, so a step remembers, by weak references, which tensors it wrote and what it knows of them.
"""

import operator
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from optree import PyTreeSpec
from torch import Tensor

from diffopt.autodiff.levels import derivative_possible, transforms_active

__all__ = ["Checked", "remember", "still_holds"]

Columns = Sequence[Sequence[Tensor]]

_shape = operator.attrgetter("shape")
_kind = operator.attrgetter("dtype", "device")


class Checked(NamedTuple):
    """What a donated step knew of its tensors: contiguous, of one dtype, on one device, none overlapping another.

    Attributes:
        treespec: The structure of the parameters, the gradients and the moments.
        refs: Weak references to the written tensors, parameters first.
        pointers: Where their memory starts, shape (written,).
        shapes: The shapes of the parameters.
        nbytes: Their sizes in bytes, shape (leaves,).
        kind: The dtype and device of all.
        ranges: The written memory as sorted starts and ends, without empty tensors.
    """

    treespec: PyTreeSpec
    refs: list[weakref.ref]
    pointers: np.ndarray
    shapes: list[torch.Size]
    nbytes: np.ndarray
    kind: tuple[torch.dtype, torch.device]
    ranges: tuple[np.ndarray, np.ndarray]


def remember(treespec: PyTreeSpec, columns: Columns) -> Checked | None:
    """Record tensors that passed the checks of donation.

    Args:
        treespec: The structure of the columns.
        columns: Parameters, gradients and moments.

    Returns:
        The record; None where they are not all contiguous and of one dtype and device.
    """
    written = [x for j, column in enumerate(columns) if j != 1 for x in column]
    kinds = set(map(_kind, written)) | set(map(_kind, columns[1]))
    if len(kinds) != 1 or not all(map(Tensor.is_contiguous, written)) or any(map(Tensor.is_inference, written)):
        return None
    pointers, nbytes = _pointers(written), np.array([x.nbytes for x in columns[0]], np.int64)
    ends = pointers + np.tile(nbytes, len(columns) - 1)
    filled = ends > pointers
    ranges = np.sort(pointers[filled]), np.sort(ends[filled])
    refs = list(map(weakref.ref, written))
    return Checked(treespec, refs, pointers, list(map(_shape, columns[0])), nbytes, kinds.pop(), ranges)


def still_holds(checked: Checked, treespecs: Sequence[PyTreeSpec], columns: Columns) -> bool:
    """Tell whether the written tensors are those of a record, and new gradients fit them.

    Args:
        checked: The record.
        treespecs: The structure of each column.
        columns: Parameters, gradients and moments.

    Returns:
        A bool; False where the checks must be made anew, and may raise.
    """
    if not checked.refs or not columns[0] or checked.refs[0]() is not columns[0][0]:
        return False
    grads, written = columns[1], [x for j, column in enumerate(columns) if j != 1 for x in column]
    if any(spec != checked.treespec for spec in treespecs) or transforms_active():
        return False
    if not all(map(operator.is_, map(operator.call, checked.refs), written)):
        return False
    if not set(map(type, grads)) <= {Tensor} or list(map(_shape, grads)) != checked.shapes:
        return False
    if set(map(_kind, grads)) != {checked.kind} or not all(map(Tensor.is_contiguous, grads)):
        return False
    if not np.array_equal(_pointers(written), checked.pointers):
        return False
    return not derivative_possible([*written, *grads]) and not _meet(grads, checked)


def _pointers(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))


def _meet(grads: Sequence[Tensor], checked: Checked) -> bool:
    """Whether the memory of gradients meets the written ranges, which do not meet each other."""
    first, last = checked.ranges
    starts = _pointers(grads)
    # As many ranges start before the end of a tensor as end before its start, unless one meets it.
    return bool(np.any(np.searchsorted(first, starts + checked.nbytes) > np.searchsorted(last, starts, side="right")))
