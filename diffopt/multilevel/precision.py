r"""Half precision for the gradients of a level, and the scale that keeps float16 ones in range.

.. math:: g = \frac{1}{s} \nabla (s L), \qquad s \leftarrow \begin{cases} s / 2 & g \text{ is not finite} \\
          2 s & \text{2000 finite steps in a row} \end{cases}
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.typing import Tree

__all__ = ["LossScale", "autocast", "first_scale", "next_scale"]

_START, _GROWTH_INTERVAL = 2.0**16, 2000


class LossScale(NamedTuple):
    """The factor of the loss, and the finite steps since it last changed."""

    scale: Tensor
    good: Tensor


def autocast(precision: torch.dtype | None, params: Tree) -> contextlib.AbstractContextManager:
    """The context in which a loss is evaluated in half precision; none if `precision` is None."""
    if precision is None:
        return contextlib.nullcontext()
    return torch.autocast(tree.leaves(params)[0].device.type, dtype=precision)


def first_scale(precision: torch.dtype | None, params: Tree) -> LossScale | tuple[()]:
    """Where the scale starts; none is kept unless the precision is float16."""
    if precision is not torch.float16:
        return ()
    device = tree.leaves(params)[0].device
    return LossScale(torch.full((), _START, device=device), torch.zeros((), dtype=torch.int64, device=device))


def next_scale(loss_scale: LossScale, finite: Tensor) -> LossScale:
    """The scale after a step whose gradient was finite, or was not."""
    good = torch.where(finite, loss_scale.good + 1, 0)
    grown = good >= _GROWTH_INTERVAL
    scale = torch.where(finite, torch.where(grown, loss_scale.scale * 2, loss_scale.scale), loss_scale.scale / 2)
    return LossScale(scale, torch.where(grown, 0, good))
