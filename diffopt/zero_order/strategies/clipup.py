"""ClipUp: steps of a known length, which suits gradients of unknown scale."""

from typing import Any, NamedTuple

import torch

from diffopt import tree
from diffopt.transforms import GradientTransformation
from diffopt.transforms.leaves import as_dtype, check_hyperparameter
from diffopt.typing import Numeric, Tree

__all__ = ["ClipUpState", "clipup"]


class ClipUpState(NamedTuple):
    """The state of `clipup`.

    Attributes:
        velocity: The last step, a tree like the parameters.
    """

    velocity: Tree


def clipup(learning_rate: Numeric, max_speed: Numeric | None = None, momentum: Numeric = 0.9) -> GradientTransformation:
    r"""Descend with momentum along the normalized gradient, at a speed that is clipped.

    .. math:: v \leftarrow m v - \alpha \frac{g}{\lVert g \rVert}, \qquad
              v \leftarrow v \min\left(1, \frac{v_{\max}}{\lVert v \rVert}\right), \qquad \theta \leftarrow \theta + v

    with norms over all leaves together. A gradient of 0 has no direction, and adds nothing.

    Args:
        learning_rate: The length :math:`\alpha` that is added each step, above 0, a number or a 0-d tensor.
        max_speed: The greatest length :math:`v_{\max}` of a step, above 0, likewise. Default: twice the learning rate.
        momentum: The share m of the last step that is kept, in [0, 1), likewise.

    Returns:
        A transformation with `ClipUpState`.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> optimizer, x = clipup(0.5), torch.tensor([3.0, 4.0])
        >>> optimizer.update(10 * x, optimizer.init(x))[0]
        tensor([-0.3000, -0.4000])

    References:
        Toklu, Liskowski and Srivastava, "ClipUp: A Simple and Powerful Optimizer for Distribution-based Policy
        Evolution", PPSN 2020, algorithm 1.
    """
    max_speed = 2 * learning_rate if max_speed is None else max_speed
    check_hyperparameter("learning_rate", learning_rate, above=0.0)
    check_hyperparameter("max_speed", max_speed, above=0.0)
    check_hyperparameter("momentum", momentum, at_least=0.0, below=1.0)

    def init(params: Tree) -> ClipUpState:
        return ClipUpState(tree.zeros_like(params))

    def update(updates: Tree, state: ClipUpState, params: Tree | None = None, **extra: Any) -> tuple[Tree, ClipUpState]:
        g, unravel = tree.ravel(updates)
        rate, fastest, kept = (as_dtype(value, g.dtype) for value in (learning_rate, max_speed, momentum))
        length = tree.norm(g)
        v = kept * tree.ravel(state.velocity)[0] - rate * g / torch.where(length > 0, length, 1.0)
        speed = tree.norm(v)
        over = speed > fastest
        v = v * torch.where(over, fastest / torch.where(over, speed, 1.0), 1.0)
        return unravel(v), ClipUpState(unravel(v))

    return GradientTransformation(init, update)
