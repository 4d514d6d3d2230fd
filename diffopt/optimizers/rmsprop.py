"""RMSProp: the gradient over its root mean square."""

from diffopt.transforms import (
    GradientTransformation,
    chain,
    scale_by_learning_rate,
    scale_by_rms,
    scale_by_stddev,
    trace,
)
from diffopt.transforms.fusion import fuse
from diffopt.typing import Numeric, Schedule
from diffopt_kernels.steps import RMSPROP

__all__ = ["rmsprop"]


def rmsprop(
    learning_rate: Numeric | Schedule,
    decay: Numeric = 0.9,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    *,
    initial_scale: Numeric = 0.0,
    centered: bool = False,
    momentum: Numeric | None = None,
    nesterov: bool = False,
) -> GradientTransformation:
    r"""Descend along the gradient over its root mean square, or its standard deviation.

    .. math::
        \nu_t = \gamma \nu_{t-1} + (1 - \gamma) g_t^2, \qquad
        \theta_{t+1} = \theta_t - \alpha\, \frac{g_t}{\sqrt{\nu_t + \epsilon_\text{root}} + \epsilon}

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule.
        decay: The decay :math:`\gamma`, in [0, 1), a number or a 0-d tensor like those below. (torch's is 0.99.)
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0; above 0, derivatives through a zero gradient are finite.
        initial_scale: The first :math:`\nu`, at least 0.
        centered: Whether to subtract the square of the mean, as in `scale_by_stddev`.
        momentum: Decay of the momentum of the scaled gradients. Default: no momentum.
        nesterov: Whether to use Nesterov momentum.

    Returns:
        A transformation; with the same hyperparameters it takes the steps of `torch.optim.RMSprop`.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, a tensor has dimensions, or nesterov is asked for without momentum.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer, x = rmsprop(0.1, decay=0.75), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.8000, -1.8000])

    References:
        Tieleman and Hinton, "Lecture 6.5, RMSProp", Coursera, 2012.
        Graves, "Generating Sequences With Recurrent Neural Networks", 2013, eqs. 38-45, for the centered form.
    """
    scaled = (scale_by_stddev if centered else scale_by_rms)(decay, eps, eps_root, initial_scale=initial_scale)
    if momentum is None:
        if nesterov:
            raise ValueError("`nesterov=True` needs a momentum, such as momentum=0.9.")
        transformation = chain(scaled, scale_by_learning_rate(learning_rate))
        if centered:
            return transformation
        return fuse(transformation, RMSPROP, learning_rate, {"decay": decay, "eps": eps, "eps_root": eps_root})
    return chain(scaled, trace(momentum, nesterov), scale_by_learning_rate(learning_rate))
