r"""Members in pairs about the mean, and steps of an optimizer along what they say.

.. math:: x + \delta_i, \quad x - \delta_i, \qquad i = 1, \ldots, m/2

The first half of a population holds the sums, the second the differences.
"""

from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms import GradientTransformation, step
from diffopt.typing import Tree

__all__ = ["descend", "halves", "mirrored"]


def mirrored(x: Tensor, offsets: Tensor) -> Tensor:
    """Make members of a mean and their offsets from it.

    Args:
        x: The mean, shape (n,).
        offsets: Shape (m / 2, n).

    Returns:
        The members, shape (m, n).

    Example:
        >>> mirrored(torch.tensor([1.0]), torch.tensor([[0.5]]))
        tensor([[1.5000],
                [0.5000]])
    """
    return torch.cat([x + offsets, x - offsets])


def halves(members: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take pairs apart.

    Args:
        members: Shape (m, n).
        losses: Anything by member, shape (m,).

    Returns:
        The offsets, half the difference of each pair, shape (m / 2, n), and both halves of the losses.

    Example:
        >>> halves(torch.tensor([[1.5], [0.5]]), torch.tensor([3.0, 4.0]))
        (tensor([[0.5000]]), tensor([3.]), tensor([4.]))
    """
    (plus, minus), (first, second) = members.chunk(2), losses.chunk(2)
    return (plus - minus) / 2, first, second


def descend(optimizer: GradientTransformation, gradient: Tensor, state: Any, mean: Tree) -> tuple[Tensor, Any]:
    """Take a step of an optimizer, which sees the tree of parameters, along a flat gradient.

    Args:
        optimizer: The optimizer.
        gradient: Shape (n,).
        state: The optimizer's state.
        mean: The parameters.

    Returns:
        The parameters after the step, flat, and the optimizer's state.
    """
    params, state = step(optimizer, tree.ravel(mean)[1](gradient), state, mean)
    return tree.ravel(params)[0], state
