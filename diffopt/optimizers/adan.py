"""Adan: Nesterov momentum from the gradient's own changes."""

from collections.abc import Callable

from diffopt.transforms import GradientTransformation, add_decayed_weights, chain, scale_by_adan, scale_by_learning_rate
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["adan"]


def adan(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.98,
    b2: Numeric = 0.92,
    b3: Numeric = 0.99,
    eps: Numeric = 1e-8,
    *,
    eps_root: Numeric = 0.0,
    weight_decay: Numeric = 0.0,
    mask: Tree | Callable[[Tree], Tree] | None = None,
) -> GradientTransformation:
    r"""Descend by Adan's rule, and shrink the weights beside it.

    .. math::
        \theta_{t+1} = \theta_t - \alpha (u_t + \lambda \theta_t)

    with the update u of `scale_by_adan`. (The paper divides by :math:`1 + \alpha \lambda` instead, which is equal to
    first order.)

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like those below.
        b2: Decay of the mean change, in [0, 1).
        b3: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0; above 0, derivatives through a zero gradient are finite.
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
        >>> optimizer, x = adan(0.1), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.9000, -1.9000])

    References:
        Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
        TPAMI 2024, algorithm 1.
    """
    return chain(
        scale_by_adan(b1, b2, b3, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
