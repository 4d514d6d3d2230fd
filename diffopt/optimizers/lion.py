"""Lion: the sign of momentum."""

from collections.abc import Callable

from diffopt.transforms import (
    GradientTransformation,
    add_decayed_weights,
    chain,
    scale_by_learning_rate,
    scale_by_lion,
)
from diffopt.transforms.fusion import fuse
from diffopt.typing import Numeric, Schedule, Tree
from diffopt_kernels.steps import LION

__all__ = ["lion"]


def lion(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.99,
    weight_decay: Numeric = 1e-3,
    *,
    mask: Tree | Callable[[Tree], Tree] | None = None,
) -> GradientTransformation:
    r"""Descend by the sign of a mix of the gradient and its mean, and shrink the weights beside it.

    .. math::
        \theta_{t+1} = \theta_t - \alpha \left(\text{sign}(b_1 \mu_{t-1} + (1 - b_1) g_t) + \lambda \theta_t\right),
        \qquad \mu_t = b_2 \mu_{t-1} + (1 - b_2) g_t

    The sign is flat: the derivative in b1 and b2 is 0.


    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        b1: Weight of the mean in the update, in [0, 1), a number or a 0-d tensor like those below.
        b2: Decay of the mean, in [0, 1).
        weight_decay: The multiple :math:`\lambda` of the weights, at least 0.
        mask: Which leaves decay, as in `add_decayed_weights`. Default: all.

    Returns:
        A transformation, whose update needs ``params``.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = lion(0.1, weight_decay=0.0), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.9000, -1.9000])

    References:
        Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2.
    """
    transformation = chain(
        scale_by_lion(b1, b2), add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate)
    )
    return fuse(transformation, LION, learning_rate, {"b1": b1, "b2": b2, "weight_decay": weight_decay}, mask)
