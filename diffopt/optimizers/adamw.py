"""AdamW: Adam with decoupled weight decay."""

from collections.abc import Callable

from diffopt.transforms import (
    GradientTransformation,
    add_decayed_weights,
    chain,
    scale_by_adam,
    scale_by_learning_rate,
)
from diffopt.transforms.fusion import fuse
from diffopt.typing import Numeric, Schedule, Tree
from diffopt_kernels.steps import ADAM

__all__ = ["adamw"]


def adamw(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    *,
    weight_decay: Numeric = 1e-4,
    mask: Tree | Callable[[Tree], Tree] | None = None,
    nesterov: bool = False,
) -> GradientTransformation:
    r"""Descend as Adam does, and shrink the weights beside it.

    .. math::
        \theta_{t+1} = \theta_t - \alpha \left(
        \frac{\mu_t / (1 - b_1^t)}{\sqrt{\nu_t / (1 - b_2^t) + \epsilon_\text{root}} + \epsilon}
        + \lambda \theta_t \right)

    with the running means :math:`\mu, \nu` of `scale_by_adam`, whose docstring says when to use `eps_root`.

    Args:
        learning_rate: The rate :math:`\alpha`, a number, a 0-d tensor or a schedule. It scales the decay too.
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like those below.
        b2: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0; above 0, derivatives through a zero gradient are finite.
        weight_decay: The multiple :math:`\lambda` of the weights, at least 0. (torch's default is 1e-2.)
        mask: Which leaves decay, as in `add_decayed_weights`. Default: all.
        nesterov: Whether to use Nesterov momentum.

    Returns:
        A transformation, whose update needs ``params``; with the same hyperparameters it takes the steps of
        `torch.optim.AdamW`.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor, or the mask has entries
            that are not bools.
        ValueError: If a number is out of range, a tensor has dimensions, or the mask is no prefix of params.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> optimizer = adamw(0.1, weight_decay=0.5, mask={"weight": True, "bias": False})
        >>> params = {"weight": torch.ones(1), "bias": torch.ones(1)}
        >>> step(optimizer, params, optimizer.init(params), params)[0]
        {'weight': tensor([0.8500]), 'bias': tensor([0.9000])}

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.
    """
    transformation = chain(
        scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
    if nesterov:
        return transformation
    hyperparameters = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "weight_decay": weight_decay}
    return fuse(transformation, ADAM, learning_rate, hyperparameters, mask)
