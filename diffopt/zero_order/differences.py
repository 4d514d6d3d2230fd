"""Differences of a population's values: from a baseline, from the other side, and how much of them counts."""

import torch
from torch import Tensor

from diffopt.zero_order.options import Losses, Options

__all__ = ["leave_one_out", "mean_of_sides", "shape_differences"]


def mean_of_sides(losses: Losses) -> Tensor:
    """The mean of the values on the two sides of each direction, or the values of one side."""
    return losses.plus if losses.minus is None else (losses.plus + losses.minus) / 2


def shape_differences(options: Options, difference: Tensor) -> Tensor:
    """The differences of values as they count: clipped, their signs, or as they are."""
    if options.sign:
        return difference.sign()
    return difference if options.clip is None else difference.clamp(-options.clip, options.clip)


def leave_one_out(options: Options, values: Tensor, keep: Tensor) -> Tensor:
    """For each direction the mean of the values of all others, on all ranks. A constant: no derivative passes."""
    values = (keep * values).detach()
    total = torch.cat([values.sum(0), keep.sum(0)])
    total = total if options.reduce is None else options.reduce(total)
    return (total[:-1] - values) / (total[-1] - keep)
