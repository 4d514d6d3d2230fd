"""Stochastic gradient descent, with or without momentum."""

from diffopt.transforms import GradientTransformation, chain, scale_by_learning_rate, trace
from diffopt.transforms.fusion import fuse
from diffopt.typing import Numeric, Schedule
from diffopt_kernels.steps import MOMENTUM, NESTEROV, SGD

__all__ = ["sgd"]


def sgd(
    learning_rate: Numeric | Schedule, momentum: Numeric | None = None, nesterov: bool = False
) -> GradientTransformation:
    r"""Descend along the gradient.

    .. math::
        m_t = \gamma m_{t-1} + g_t, \qquad
        \theta_{t+1} = \theta_t - \alpha m_t \ \text{ or, with Nesterov, } \ \theta_t - \alpha (g_t + \gamma m_t)

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        momentum: The decay :math:`\gamma`, a number or a 0-d tensor. Default: no momentum, and no state.
        nesterov: Whether to use Nesterov momentum.

    Returns:
        A transformation; with the same hyperparameters it takes the steps of `torch.optim.SGD`.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a tensor has dimensions, or if nesterov is asked for without momentum.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> def loss_after_a_step(learning_rate):
        ...     optimizer, x = sgd(learning_rate), torch.tensor([1.0, 2.0])
        ...     return step(optimizer, 2 * x, optimizer.init(x), x)[0].square().sum()
        >>> torch.func.grad(loss_after_a_step)(torch.tensor(0.1))
        tensor(-16.)

    References:
        Robbins and Monro, "A Stochastic Approximation Method", 1951, eq. 8.
        Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, eqs. 1-4.
    """
    if momentum is None:
        if nesterov:
            raise ValueError("`nesterov=True` needs a momentum, such as momentum=0.9.")
        return fuse(chain(scale_by_learning_rate(learning_rate)), SGD, learning_rate, {})
    transformation = chain(trace(momentum, nesterov), scale_by_learning_rate(learning_rate))
    return fuse(transformation, NESTEROV if nesterov else MOMENTUM, learning_rate, {"decay": momentum})
