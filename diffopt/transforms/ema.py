"""The running mean of the updates."""

from typing import NamedTuple

from torch import Tensor

from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.leafwise import bias_correction, leafwise
from diffopt.transforms.leaves import check_hyperparameter
from diffopt.typing import Numeric, Tree

__all__ = ["EmaState", "ema"]


class EmaState(NamedTuple):
    """The state of `ema`.

    Attributes:
        count: Steps taken, an int64 0-d tensor.
        ema: Running mean of the updates, a tree like the parameters (float32 for 16-bit leaves).
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    ema: Tree


def ema(decay: Numeric, *, debias: bool = True) -> GradientTransformation:
    r"""Replace the updates by their running mean.

    .. math:: m_t = \gamma m_{t-1} + (1 - \gamma) g_t, \qquad u_t = m_t / (1 - \gamma^t) \ \text{ or } \ m_t

    Args:
        decay: The decay :math:`\gamma`, in [0, 1), a number or a 0-d tensor.
        debias: Whether to divide by :math:`1 - \gamma^t`, as the mean starts at 0.

    Returns:
        A transformation with `EmaState`, whose updates keep their dtypes.

    Raises:
        TypeError: If decay is neither a number nor a floating-point tensor.
        ValueError: If decay is out of range, or a tensor with dimensions.

    Example:
        >>> import torch
        >>> mean = ema(0.5)
        >>> _, state = mean.update(torch.tensor([3.0]), mean.init(torch.zeros(1)))
        >>> mean.update(torch.tensor([0.0]), state)[0]
        tensor([1.])
    """
    check_hyperparameter("decay", decay, at_least=0.0, below=1.0)

    def rule(g, m, decay, rest, correction):
        m = decay * m + rest * g
        return m / correction, m

    return leafwise(EmaState, rule, lambda count: (decay, 1 - decay, bias_correction(decay, count) if debias else 1.0))
