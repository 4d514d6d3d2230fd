"""LARS: momentum with steps in proportion to each leaf's weights."""

from collections.abc import Callable

from diffopt.transforms import (
    GradientTransformation,
    add_decayed_weights,
    chain,
    masked,
    scale_by_learning_rate,
    scale_by_trust_ratio,
    trace,
)
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["lars"]


def lars(
    learning_rate: Numeric | Schedule,
    weight_decay: Numeric = 0.0,
    *,
    trust_coefficient: Numeric = 1e-3,
    eps: Numeric = 0.0,
    momentum: Numeric = 0.9,
    nesterov: bool = False,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    trust_ratio_mask: Tree | Callable[[Tree], Tree] | None = None,
) -> GradientTransformation:
    r"""Descend with momentum, with each leaf's gradient scaled to the size of its parameters.

    .. math::
        u = g + \lambda \theta_t, \qquad
        m_t = \gamma m_{t-1} + \alpha \frac{c \lVert \theta_t \rVert}{\lVert u \rVert + \epsilon} u, \qquad
        \theta_{t+1} = \theta_t - m_t

    (The paper divides by :math:`\lVert g \rVert + \lambda \lVert \theta_t \rVert`, which is no less.)

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        weight_decay: The multiple :math:`\lambda` of the weights, at least 0.
        trust_coefficient: The factor c, a number or a 0-d tensor like those below.
        eps: Added to the norm of the gradient, at least 0.
        momentum: The decay :math:`\gamma`.
        nesterov: Whether to use Nesterov momentum.
        mask: Which leaves decay, as in `add_decayed_weights`. Default: all.
        trust_ratio_mask: Which leaves are scaled. Default: all.

    Returns:
        A transformation, whose update needs ``params``.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = lars(0.1, trust_coefficient=1.0), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.9000, -1.8000])

    References:
        You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017, algorithm 1.
    """
    ratio = scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps)
    return chain(
        add_decayed_weights(weight_decay, mask),
        ratio if trust_ratio_mask is None else masked(ratio, trust_ratio_mask),
        scale_by_learning_rate(learning_rate),
        trace(momentum, nesterov),
    )
