"""AdaBelief: short steps where the gradient is not what was expected."""

from diffopt.transforms import GradientTransformation, chain, scale_by_adabelief, scale_by_learning_rate
from diffopt.typing import Numeric, Schedule

__all__ = ["adabelief"]


def adabelief(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-16,
    eps_root: Numeric = 1e-16,
) -> GradientTransformation:
    r"""Descend along the mean of the gradient over the root of its mean squared error.

    .. math::
        \nu_t = b_2 \nu_{t-1} + (1 - b_2) (g_t - \mu_t)^2 + \epsilon_\text{root}, \qquad
        \theta_{t+1} = \theta_t - \alpha\, \frac{\mu_t / (1 - b_1^t)}{\sqrt{\nu_t / (1 - b_2^t)} + \epsilon}

    with Adam's running mean :math:`\mu`.

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like those below.
        b2: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added to the mean squared error in each step, at least 0.

    Returns:
        A transformation.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = adabelief(0.1, b1=0.5), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.8000, -1.8000])

    References:
        Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients",
        NeurIPS 2020, algorithm 2.
    """
    return chain(scale_by_adabelief(b1, b2, eps, eps_root), scale_by_learning_rate(learning_rate))
