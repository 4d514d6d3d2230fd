"""Adam: steps of a size that does not depend on the scale of the gradient."""

from diffopt.transforms import GradientTransformation, chain, scale_by_adam, scale_by_learning_rate
from diffopt.transforms.fusion import fuse
from diffopt.typing import Numeric, Schedule
from diffopt_kernels.steps import ADAM

__all__ = ["adam"]


def adam(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    r"""Descend along the mean of the gradient over the root of its mean square.

    .. math::
        \theta_{t+1} = \theta_t - \alpha\,
        \frac{\mu_t / (1 - b_1^t)}{\sqrt{\nu_t / (1 - b_2^t) + \epsilon_\text{root}} + \epsilon}

    with the running means :math:`\mu, \nu` of `scale_by_adam`, whose docstring says when to use `eps_root`.

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like those below.
        b2: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0; above 0, derivatives through a zero gradient are finite.
        nesterov: Whether to use Nesterov momentum.

    Returns:
        A transformation; with the same hyperparameters it takes the steps of `torch.optim.Adam`.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = adam(0.1), torch.tensor([1.0, -2.0])
        >>> x, state = step(optimizer, 2 * x, optimizer.init(x), x)
        >>> x
        tensor([ 0.9000, -1.9000])

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1.
    """
    transformation = chain(
        scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov), scale_by_learning_rate(learning_rate)
    )
    if nesterov:
        return transformation
    hyperparameters = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "weight_decay": 0.0}
    return fuse(transformation, ADAM, learning_rate, hyperparameters)
