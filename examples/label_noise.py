"""Labels of ten classes, some of them wrong."""

import torch
from torch import Tensor

from diffopt import random


def flip_labels(labels: Tensor, share: float, which: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Give a share of the examples, drawn by one key, one of the nine other labels, drawn by another.

    Returns:
        The new labels, and which of them are wrong.
    """
    wrong = random.uniform(which, labels.shape) < share
    others = (labels + 1 + (9 * random.uniform(shift, labels.shape)).long()) % 10
    return torch.where(wrong, others, labels), wrong
