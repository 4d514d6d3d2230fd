"""LAMB: Adam with steps in proportion to each leaf's weights."""

from collections.abc import Callable

from diffopt.transforms import (
    GradientTransformation,
    add_decayed_weights,
    chain,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_trust_ratio,
)
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["lamb"]


def lamb(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-6,
    eps_root: Numeric = 0.0,
    *,
    weight_decay: Numeric = 0.0,
    mask: Tree | Callable[[Tree], Tree] | None = None,
) -> GradientTransformation:
    r"""Descend as AdamW does, with each leaf's step scaled to the size of its parameters.

    .. math::
        u = \frac{\mu_t / (1 - b_1^t)}{\sqrt{\nu_t / (1 - b_2^t) + \epsilon_\text{root}} + \epsilon} + \lambda \theta_t,
        \qquad \theta_{t+1} = \theta_t - \alpha \frac{\lVert \theta_t \rVert}{\lVert u \rVert} u

    with Adam's running means :math:`\mu, \nu`.

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like those below.
        b2: Decay of the mean square, in [0, 1).
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
        >>> optimizer, x = lamb(0.1), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.8419, -1.8419])

    References:
        You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020, algorithm 2.
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )
