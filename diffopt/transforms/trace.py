"""Momentum: a decaying sum of past updates."""

from typing import NamedTuple

from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.leafwise import leafwise
from diffopt.transforms.leaves import check_hyperparameter
from diffopt.typing import Numeric, Tree

__all__ = ["TraceState", "trace"]


class TraceState(NamedTuple):
    """The state of `trace`.

    Attributes:
        trace: The decaying sum, a tree like the parameters (float32 for 16-bit leaves).
    """

    trace: Tree


def trace(decay: Numeric, nesterov: bool = False) -> GradientTransformation:
    r"""Accumulate the updates in a decaying sum.

    .. math:: m_t = \gamma m_{t-1} + g_t, \qquad u_t = m_t \ \text{ or, with Nesterov, } \ g_t + \gamma m_t

    The sum starts at 0 and is not divided by :math:`1 - \gamma`: this is the momentum of `torch.optim.SGD`.

    Args:
        decay: The decay :math:`\gamma`, a number or a 0-d tensor. Negative momentum, which helps in games, is
            allowed.
        nesterov: Whether to look one step ahead.

    Returns:
        A transformation with `TraceState`, whose updates keep their dtypes.

    Raises:
        TypeError: If decay is neither a number nor a floating-point tensor.
        ValueError: If decay is a tensor with dimensions; in update, if updates and state do not match.

    Example:
        >>> import torch
        >>> transformation = trace(0.5)
        >>> state = transformation.init(torch.zeros(1))
        >>> for _ in range(3):
        ...     updates, state = transformation.update(torch.ones(1), state)
        >>> updates
        tensor([1.7500])

    References:
        Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
        Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, eqs. 3-4.
    """
    check_hyperparameter("decay", decay)

    def rule(g, m, gamma):
        m = gamma * m + g
        return g + gamma * m if nesterov else m, m

    return leafwise(TraceState, rule, lambda count: (decay,))
