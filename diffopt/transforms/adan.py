"""Adan's scaling: momentum of the gradient and of its changes."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.leafwise import bias_correction, leafwise
from diffopt.transforms.leaves import check_hyperparameter
from diffopt.typing import Numeric, Tree

__all__ = ["ScaleByAdanState", "scale_by_adan"]


class ScaleByAdanState(NamedTuple):
    """The state of `scale_by_adan`: the count, and trees like the parameters.

    Attributes:
        count: Steps taken, an int64 0-d tensor.
        m: Running mean of the gradient.
        v: Running mean of the gradient's change.
        n: Running mean of the square of the extrapolated gradient.
        grad: The last gradient.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    m: Tree
    v: Tree
    n: Tree
    grad: Tree


def scale_by_adan(
    b1: Numeric = 0.98, b2: Numeric = 0.92, b3: Numeric = 0.99, eps: Numeric = 1e-8, eps_root: Numeric = 0.0
) -> GradientTransformation:
    r"""Scale the updates by Adan's rule: Nesterov momentum from the gradient's own changes.

    .. math::
        d_t = g_t - g_{t-1}\ (d_1 = 0), \quad m_t = b_1 m_{t-1} + (1 - b_1) g_t, \quad
        v_t = b_2 v_{t-1} + (1 - b_2) d_t, \quad n_t = b_3 n_{t-1} + (1 - b_3) (g_t + b_2 d_t)^2, \\
        u_t = \frac{m_t / (1 - b_1^t) + b_2 v_t / (1 - b_2^t)}
        {\sqrt{n_t / (1 - b_3^t) + \epsilon_\text{root}} + \epsilon}

    The decays are one minus the paper's, so that :math:`b_2` is its :math:`1 - \beta_2`. The corrections for bias are
    those of the authors' code.

    Args:
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like all five.
        b2: Decay of the mean change, in [0, 1).
        b3: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0.

    Returns:
        A transformation with `ScaleByAdanState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = scale_by_adan()
        >>> t.update(torch.tensor([3.0, -0.1]), t.init(torch.zeros(2)))[0]
        tensor([ 1., -1.])

    References:
        Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
        TPAMI 2024, algorithm 1.
    """
    for name, decay in {"b1": b1, "b2": b2, "b3": b3}.items():
        check_hyperparameter(name, decay, at_least=0.0, below=1.0)
    check_hyperparameter("eps", eps, at_least=0.0)
    check_hyperparameter("eps_root", eps_root, at_least=0.0)

    def scalars(count: Tensor) -> tuple[Numeric, ...]:
        decays = (b1, b2, b3)
        corrections = (bias_correction(b, count) for b in decays)
        return *decays, *(1 - b for b in decays), *corrections, (count > 1).to(torch.float64), eps, eps_root

    def rule(g, m, v, n, last, b1, b2, b3, rest1, rest2, rest3, c1, c2, c3, known, eps, eps_root):
        change = known * (g - last)
        m, v = b1 * m + rest1 * g, b2 * v + rest2 * change
        n = b3 * n + rest3 * (g + b2 * change) ** 2
        return (m / c1 + b2 * v / c2) / (torch.sqrt(n / c3 + eps_root) + eps), m, v, n, g

    return leafwise(ScaleByAdanState, rule, scalars)
