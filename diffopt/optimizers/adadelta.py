"""AdaDelta: steps in the units of the parameters."""

from collections.abc import Callable

from diffopt.transforms import (
    GradientTransformation,
    add_decayed_weights,
    chain,
    scale_by_adadelta,
    scale_by_learning_rate,
)
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["adadelta"]


def adadelta(
    learning_rate: Numeric | Schedule = 1.0,
    rho: Numeric = 0.9,
    eps: Numeric = 1e-6,
    weight_decay: Numeric = 0.0,
    *,
    mask: Tree | Callable[[Tree], Tree] | None = None,
) -> GradientTransformation:
    r"""Descend by the ratio of the root mean squares of past updates and gradients.

    .. math::
        u_t = \sqrt{\frac{E[u^2]_{t-1} + \epsilon}{E[g^2]_t + \epsilon}}\, g_t, \qquad
        \theta_{t+1} = \theta_t - \alpha u_t


    The decay is added to the gradient.

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        rho: Decay of both means, in [0, 1), a number or a 0-d tensor like those below.
        eps: Added inside both roots, at least 0; above 0, all derivatives are finite.
        weight_decay: The multiple :math:`\lambda` of the weights, at least 0.
        mask: Which leaves decay, as in `add_decayed_weights`. Default: all.

    Returns:
        A transformation; with the same hyperparameters it takes the steps of `torch.optim.Adadelta`.
        Its update needs ``params``.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = adadelta(0.1), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.9997, -1.9997])

    References:
        Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, algorithm 1.
    """
    return chain(
        add_decayed_weights(weight_decay, mask), scale_by_adadelta(rho, eps), scale_by_learning_rate(learning_rate)
    )
