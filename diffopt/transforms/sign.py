"""Updates of sizes one: the sign of the gradient, and of Lion's mean."""

from typing import NamedTuple

import torch

from diffopt.transforms.base import EmptyState, GradientTransformation
from diffopt.transforms.leafwise import leafwise
from diffopt.transforms.leaves import check_hyperparameter
from diffopt.typing import Numeric, Tree

__all__ = ["ScaleByLionState", "scale_by_lion", "scale_by_sign"]


class ScaleByLionState(NamedTuple):
    """The state of `scale_by_lion`.

    Attributes:
        mu: Running mean of the gradient, a tree like the parameters.
    """

    mu: Tree


def scale_by_sign() -> GradientTransformation:
    r"""Keep the sign of each entry: :math:`u_t = \text{sign}(g_t)`, with derivative 0.

    Returns:
        A stateless transformation, whose updates keep their dtypes.

    Example:
        >>> scale_by_sign().update(torch.tensor([3.0, -0.1, 0.0]), EmptyState())[0]
        tensor([ 1., -1.,  0.])

    References:
        Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018, algorithm 1.
    """
    return leafwise(EmptyState, lambda g: (torch.sign(g),), lambda count: ())


def scale_by_lion(b1: Numeric = 0.9, b2: Numeric = 0.99) -> GradientTransformation:
    r"""Take the sign of a mix of the gradient and its mean.

    .. math:: u_t = \text{sign}(b_1 \mu_{t-1} + (1 - b_1) g_t), \qquad \mu_t = b_2 \mu_{t-1} + (1 - b_2) g_t

    The sign is flat: derivatives of the update, in b1 and b2 too, are 0.

    Args:
        b1: Weight of the mean in the update, in [0, 1), a number or a 0-d tensor.
        b2: Decay of the mean, in [0, 1), likewise.

    Returns:
        A transformation with `ScaleByLionState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_lion()
        >>> t.update(torch.tensor([3.0, -0.1]), t.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])

    References:
        Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023, algorithm 2.
    """
    check_hyperparameter("b1", b1, at_least=0.0, below=1.0)
    check_hyperparameter("b2", b2, at_least=0.0, below=1.0)

    def rule(g, mu, b1, rest1, b2, rest2):
        return torch.sign(b1 * mu + rest1 * g), b2 * mu + rest2 * g

    return leafwise(ScaleByLionState, rule, lambda count: (b1, 1 - b1, b2, 1 - b2))
