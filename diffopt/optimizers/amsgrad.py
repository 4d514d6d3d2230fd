"""AMSGrad: Adam whose steps never grow for want of large gradients."""

from diffopt.transforms import GradientTransformation, chain, scale_by_amsgrad, scale_by_learning_rate
from diffopt.typing import Numeric, Schedule

__all__ = ["amsgrad"]


def amsgrad(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
) -> GradientTransformation:
    r"""Descend as Adam does, with the largest mean square so far.

    .. math::
        \theta_{t+1} = \theta_t - \alpha\,
        \frac{\mu_t / (1 - b_1^t)}{\sqrt{\max_{s \le t} \nu_s / (1 - b_2^t) + \epsilon_\text{root}} + \epsilon}

    with Adam's running means :math:`\mu, \nu`.

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like those below.
        b2: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0; above 0, derivatives through a zero gradient are finite.

    Returns:
        A transformation; with the same hyperparameters it takes the steps of `torch.optim.Adam` with ``amsgrad=True``.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = amsgrad(0.1), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.9000, -1.9000])

    References:
        Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, algorithm 2.
    """
    return chain(scale_by_amsgrad(b1, b2, eps, eps_root), scale_by_learning_rate(learning_rate))
