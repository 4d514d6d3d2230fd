"""AdaMax: Adam with a maximum norm."""

from diffopt.transforms import GradientTransformation, chain, scale_by_adamax, scale_by_learning_rate
from diffopt.typing import Numeric, Schedule

__all__ = ["adamax"]


def adamax(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
) -> GradientTransformation:
    r"""Descend along the mean of the gradient over its decaying maximum.

    .. math::
        \nu_t = \max(b_2 \nu_{t-1}, |g_t| + \epsilon), \qquad
        \theta_{t+1} = \theta_t - \frac{\alpha\, \mu_t}{(1 - b_1^t)\, \nu_t}

    with Adam's running mean :math:`\mu`.

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like those below.
        b2: Decay of the maximum, in [0, 1).
        eps: Added to the size of the gradient, at least 0.

    Returns:
        A transformation; with the same hyperparameters it takes the steps of `torch.optim.Adamax`.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = adamax(0.1), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.9000, -1.9000])

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 2.
    """
    return chain(scale_by_adamax(b1, b2, eps), scale_by_learning_rate(learning_rate))
