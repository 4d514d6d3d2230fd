"""Noise of populations, made from counters where it is used and never stored.

Element j of member i's noise is number i * stride + j of a key's draw, with stride = 4 ceil(size / 4), so that each
member begins at a Philox counter of its own. Lanes are independent rows: a key, a first member and operands each.
"""

import torch
from torch import Tensor

from diffopt_kernels import philox

__all__ = ["accumulate_reference", "compute_dtype", "noise_reference", "perturb_reference"]

PAIRS = {"normal": philox.normal_pair, "rademacher": philox.rademacher_pair}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def noise_reference(keys: Tensor, members: Tensor, size: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """Make the noise of one member of each lane.

    Args:
        keys: int64, shape (lanes, 2).
        members: int64, shape (lanes,).
        size: How many numbers a member has.
        dtype: The dtype of the numbers.
        distribution: "normal" or "rademacher".

    Returns:
        The noises, shape (lanes, size).
    """
    blocks = -(-size // 4)
    counter = members[:, None] * blocks + torch.arange(blocks, device=keys.device)
    zero = torch.zeros_like(counter)
    k0, k1 = keys[:, :1] & philox.MASK, keys[:, 1:] & philox.MASK
    words = philox.philox4x32(counter & philox.MASK, counter >> 32, zero, zero, k0, k1)
    numbers = philox.interleave(PAIRS[distribution], words, dtype)
    return numbers.reshape(members.shape[0], 4 * blocks)[:, :size]


def perturb_reference(keys: Tensor, x: Tensor, sigma: Tensor, members: Tensor, distribution: str) -> Tensor:
    """Reference of `perturb`."""
    real = compute_dtype(x.dtype)
    noises = noise_reference(keys, members, x.shape[1], real, distribution)
    return (x.to(real) + sigma.to(real) * noises).to(x.dtype)


def accumulate_reference(
    keys: Tensor, weights: Tensor, starts: Tensor, size: int, dtype: torch.dtype, distribution: str
) -> Tensor:
    """Reference of `accumulate`."""
    lanes, count = weights.shape
    real = compute_dtype(dtype)
    members = starts[:, None] + torch.arange(count, device=keys.device)
    rows = keys[:, None].expand(lanes, count, 2).reshape(lanes * count, 2)
    noises = noise_reference(rows, members.reshape(-1), size, real, distribution)
    return (weights.to(real)[:, :, None] * noises.reshape(lanes, count, size)).sum(1).to(dtype)
