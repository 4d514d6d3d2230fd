"""RAdam: Adam that waits until its mean square can be trusted."""

from diffopt.transforms import GradientTransformation, chain, scale_by_learning_rate, scale_by_radam
from diffopt.typing import Numeric, Schedule

__all__ = ["radam"]


def radam(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    *,
    threshold: Numeric = 5.0,
) -> GradientTransformation:
    r"""Descend as Adam does, rectified for the few gradients that the mean square has seen.

    .. math::
        \theta_{t+1} = \theta_t - \alpha\, u_t

    with the update u of `scale_by_radam`: the plain mean at first, then Adam's step times a factor below 1.

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like those below.
        b2: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0; above 0, derivatives through a zero gradient are finite.
        threshold: The length of the approximated average above which the mean square is used, at least 4.

    Returns:
        A transformation; with the same hyperparameters it takes the steps of `torch.optim.RAdam`.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = radam(0.1), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.8000, -1.6000])

    References:
        Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", ICLR 2020, algorithm 2.
    """
    return chain(scale_by_radam(b1, b2, eps, eps_root, threshold=threshold), scale_by_learning_rate(learning_rate))
