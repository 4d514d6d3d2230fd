r"""The evolution paths of CMA-ES: sums of the mean's steps, which set the step size and the rank-one update.

.. math:: p_\sigma \leftarrow (1 - c_\sigma) p_\sigma + \sqrt{c_\sigma (2 - c_\sigma) \mu_\text{eff}}\, C^{-1/2} y,
          \qquad p_c \leftarrow (1 - c_c) p_c + h_\sigma \sqrt{c_c (2 - c_c) \mu_\text{eff}}\, y
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.zero_order.strategies.cma_rates import Rates

__all__ = ["Paths", "follow"]


class Paths(NamedTuple):
    """What follows from a step of the mean.

    Attributes:
        sigma: The step size, a 0-d tensor.
        step_path: The path of the step size, shape (n,).
        covariance_path: The path of the covariance, shape (n,).
        decay: By what the old covariance is multiplied, a 0-d tensor, before the sum of weights is taken off.
    """

    sigma: Tensor
    step_path: Tensor
    covariance_path: Tensor
    decay: Tensor


def follow(
    found: Rates,
    y: Tensor,
    white: Tensor,
    generation: Tensor,
    sigma: Tensor,
    step_path: Tensor,
    covariance_path: Tensor,
) -> Paths:
    """Lengthen both paths by a step of the mean, and set the step size by the length of the first.

    Args:
        found: The constants.
        y: The step over sigma, shape (n,).
        white: The step in the coordinates of the standard normal, C^(-1/2) y, shape (n,).
        generation: How many came before.
        sigma: The step size.
        step_path: The path of the step size, shape (n,).
        covariance_path: The path of the covariance, shape (n,).

    Returns:
        The paths, the step size, and the decay of the covariance.

    References:
        Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, figure 6.
    """
    c_s, c_c = found.c_sigma, found.c_c
    step_path = (1 - c_s) * step_path + math.sqrt(c_s * (2 - c_s) * found.mu_eff) * white
    length = torch.linalg.vector_norm(step_path)
    steady = torch.sqrt(1 - (1 - c_s) ** (2 * (generation + 1).to(y.dtype)))
    short = (length / steady < (1.4 + 2 / (y.shape[0] + 1)) * found.chi_n).to(y.dtype)
    covariance_path = (1 - c_c) * covariance_path + short * math.sqrt(c_c * (2 - c_c) * found.mu_eff) * y
    decay = 1 - found.c_1 + (1 - short) * found.c_1 * c_c * (2 - c_c)
    sigma = sigma * torch.exp(c_s / found.d_sigma * (length / found.chi_n - 1))
    return Paths(sigma, step_path, covariance_path, decay)
