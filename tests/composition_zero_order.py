"""Rows of the composition matrix: the noise of zero-order methods."""

import torch

from diffopt import random
from diffopt.zero_order import accumulate, noise, perturb

__all__ = ["ZERO_ORDER_ROWS"]

KEY = random.key(5)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def perturb_row(scale):
    """A perturbed vector, through a nonlinear function of it."""
    member = noise(KEY, 3, 1, start=4, dtype=torch.float64)[0]
    return (
        lambda x, sigma: torch.tanh(perturb(KEY, x, sigma, 4)),
        (f64(0.5, -0.4, 0.8), scale),
        lambda x, sigma: torch.tanh(x + sigma * member),
        None,
    )


def accumulate_row():
    """A weighted sum of noises, through a nonlinear function of it."""
    members = noise(KEY, 3, 2, start=4, dtype=torch.float64)
    return (
        lambda weights: torch.tanh(accumulate(KEY, weights, 3, start=4)),
        (f64(0.5, -0.4),),
        lambda weights: torch.tanh(weights @ members),
        None,
    )


ZERO_ORDER_ROWS = {
    "perturb": lambda: perturb_row(f64(0.3)[0]),
    "perturb, sigma of each element": lambda: perturb_row(f64(0.3, 0.2, 0.7)),
    "accumulate": accumulate_row,
}
