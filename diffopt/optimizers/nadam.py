"""NAdam: Adam with Nesterov momentum that warms up."""

from diffopt.transforms import GradientTransformation, chain, scale_by_learning_rate, scale_by_nadam
from diffopt.typing import Numeric, Schedule

__all__ = ["nadam"]


def nadam(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    *,
    momentum_decay: Numeric = 4e-3,
) -> GradientTransformation:
    r"""Descend as Adam does, one step ahead.

    .. math::
        \theta_{t+1} = \theta_t - \alpha\, u_t

    with the update u of `scale_by_nadam`. For a constant momentum, use ``adam(nesterov=True)``.

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like those below.
        b2: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0; above 0, derivatives through a zero gradient are finite.
        momentum_decay: The speed of the momentum's warm-up, at least 0.

    Returns:
        A transformation; with the same hyperparameters it takes the steps of `torch.optim.NAdam`.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = nadam(0.1, momentum_decay=0.0), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.8944, -1.8944])

    References:
        Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop 2016.
    """
    return chain(
        scale_by_nadam(b1, b2, eps, eps_root, momentum_decay=momentum_decay), scale_by_learning_rate(learning_rate)
    )
