"""AdaGrad: short steps where gradients have been large."""

from diffopt.transforms import GradientTransformation, chain, scale_by_learning_rate, scale_by_rss
from diffopt.typing import Numeric, Schedule

__all__ = ["adagrad"]


def adagrad(
    learning_rate: Numeric | Schedule,
    initial_accumulator_value: Numeric = 0.0,
    eps: Numeric = 1e-10,
    eps_root: Numeric = 0.0,
) -> GradientTransformation:
    r"""Descend along the gradient over the root of the sum of its squares.

    .. math::
        s_t = s_{t-1} + g_t^2, \qquad
        \theta_{t+1} = \theta_t - \alpha\, \frac{g_t}{\sqrt{s_t + \epsilon_\text{root}} + \epsilon}

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        initial_accumulator_value: The first s, at least 0, a number or a 0-d tensor like those below.
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0; above 0, derivatives through a zero gradient are finite.

    Returns:
        A transformation; with the same hyperparameters it takes the steps of `torch.optim.Adagrad`.
        Its `lr_decay` is the schedule ``lambda count: learning_rate / (1 + lr_decay * count)``.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = adagrad(0.1), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.9000, -1.9000])

    References:
        Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
        JMLR 2011, figure 1.
    """
    return chain(scale_by_rss(initial_accumulator_value, eps, eps_root), scale_by_learning_rate(learning_rate))
