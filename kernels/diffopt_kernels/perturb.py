"""Noise of populations, made from counters where it is used and never stored.

Element j of member i's noise is number i * stride + j of a key's draw, with stride = 4 ceil(size / 4), so that each
member begins at a Philox counter of its own. Lanes are independent rows: a key, a member and operands each; what lanes
share may be expanded. A negative member, which has no noise, gives NaN.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt_kernels import philox

__all__ = [
    "accumulate",
    "accumulate_reference",
    "compute_dtype",
    "noise",
    "noise_reference",
    "perturb",
    "perturb_reference",
    "project",
    "project_reference",
]

PAIRS = {"normal": philox.normal_pair, "rademacher": philox.rademacher_pair}

PROGRAMS = 1024
"""About how many programs fill a GPU."""

PIECE = 1 << 24
"""About how many numbers `project` holds at a time, or those of one member."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def noise_reference(keys: Tensor, members: Tensor, size: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """Reference of `noise`."""
    blocks = -(-size // 4)
    counter = members[:, None] * blocks + torch.arange(blocks, device=keys.device)
    zero = torch.zeros_like(counter)
    k0, k1 = keys[:, :1] & philox.MASK, keys[:, 1:] & philox.MASK
    words = philox.philox4x32(counter & philox.MASK, (counter >> 32) & philox.MASK, zero, zero, k0, k1)
    numbers = philox.interleave(PAIRS[distribution], words, dtype)
    numbers = numbers.reshape(members.shape[0], 4 * blocks)[:, :size]
    return torch.where(members[:, None] < 0, torch.nan, numbers)


def noise(keys: Tensor, members: Tensor, size: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """Make the noise of one member of each lane in one launch.

    Args:
        keys: int64, shape (lanes, 2).
        members: int64, shape (lanes,).
        size: How many numbers a member has.
        dtype: The dtype of the numbers.
        distribution: "normal" or "rademacher".

    Returns:
        The noises, shape (lanes, size).
    """
    unit = torch.ones((), dtype=dtype, device=keys.device).expand(members.shape[0], size)
    # Minus zero is what leaves every number as it is, also a zero of either sign.
    return perturb(keys, torch.full_like(unit[:1, :1], -0.0).expand_as(unit), unit, members, distribution)


def perturb_reference(
    keys: Tensor, x: Tensor, sigma: Tensor, members: Tensor, distribution: str, out: Tensor | None = None
) -> Tensor:
    """Reference of `perturb`."""
    real = compute_dtype(x.dtype)
    noises = noise_reference(keys, members, x.shape[1], real, distribution)
    moved = (x.to(real) + sigma.to(real) * noises).to(x.dtype)
    return moved if out is None else out.copy_(moved)


def perturb(
    keys: Tensor, x: Tensor, sigma: Tensor, members: Tensor, distribution: str, out: Tensor | None = None
) -> Tensor:
    """Add sigma times its member's noise to each lane in one launch.

    Args:
        keys: int64, shape (lanes, 2).
        x: Floating-point, shape (lanes, size). Half precision is computed in float32 and rounded.
        sigma: The same shape, any floating dtype.
        members: int64, shape (lanes,).
        distribution: "normal" or "rademacher".
        out: Where to write, or None: x itself, or a tensor like it, whose rows are contiguous.

    Returns:
        The perturbed lanes, shape (lanes, size).
    """
    import triton  # costs 0.3 s to import

    from diffopt_kernels import perturb_kernel

    lanes, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if out.numel() == 0:
        return out
    blocks = -(-size // 4)
    width = _width(keys, blocks)
    per_lane = triton.cdiv(blocks, width)
    kernel: Any = perturb_kernel.perturb[(lanes * per_lane,)]
    strides = (out.stride(0), *x.stride(), *sigma.stride(), keys.stride(0), members.stride(0))
    keys = keys if keys.stride(1) == 1 else keys.contiguous()
    strides = (out.stride(0), *x.stride(), *sigma.stride(), keys.stride(0), members.stride(0))
    options = {"DISTRIBUTION": distribution, "DOUBLE": x.dtype == torch.float64, "BLOCK": width}
    with torch.cuda.device_of(x):
        kernel(out, x, sigma, keys, members, size, blocks, per_lane, *strides, **options)
    return out


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


def accumulate(
    keys: Tensor, weights: Tensor, starts: Tensor, size: int, dtype: torch.dtype, distribution: str
) -> Tensor:
    """Sum the noises of consecutive members of each lane with weights; the noises stay in registers.

    Args:
        keys: int64, shape (lanes, 2).
        weights: Floating-point, shape (lanes, count).
        starts: The first members, int64, shape (lanes,).
        size: How many numbers a member has.
        dtype: The dtype of the sums, which are taken in float64 for float64, else in float32.
        distribution: "normal" or "rademacher".

    Returns:
        The sums, shape (lanes, size), in an order that depends on the shapes alone.
    """
    import triton

    from diffopt_kernels import perturb_kernel

    lanes, count = weights.shape
    real = compute_dtype(dtype)
    blocks = -(-size // 4)
    if lanes * count * size == 0:
        return torch.zeros(lanes, size, dtype=dtype, device=keys.device)
    width = _width(keys, blocks)
    per_lane = triton.cdiv(blocks, width)
    # Where one vector fills few processors, shares of the members are summed apart.
    shares = min(count, max(1, PROGRAMS // (lanes * per_lane)))
    share = triton.cdiv(count, shares)
    shares = triton.cdiv(count, share)
    out = torch.empty(lanes, shares, size, dtype=real, device=keys.device)
    kernel: Any = perturb_kernel.accumulate[(lanes * shares * per_lane,)]
    keys = keys if keys.stride(1) == 1 else keys.contiguous()
    sizes = (size, blocks, per_lane, count, share, shares)
    strides = (*weights.stride(), keys.stride(0), starts.stride(0))
    options = {"DISTRIBUTION": distribution, "DOUBLE": real == torch.float64, "BLOCK": width}
    with torch.cuda.device_of(keys):
        kernel(out, weights, keys, starts, *sizes, *strides, **options)
    return out.sum(1).to(dtype)


def project_reference(
    keys: Tensor, vectors: Tensor, starts: Tensor, count: int, dtype: torch.dtype, distribution: str
) -> Tensor:
    """Reference of `project`."""
    return _project(noise_reference, keys, vectors, starts, count, dtype, distribution)


def project(keys: Tensor, vectors: Tensor, starts: Tensor, count: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """Take the inner products of each lane's vector with its noises, the transpose of `accumulate`, piece by piece.

    Args:
        keys: int64, shape (lanes, 2).
        vectors: Floating-point, shape (lanes, size).
        starts: The first members, int64, shape (lanes,).
        count: How many members.
        dtype: The dtype of the products, which are taken in float64 for float64 vectors, else in float32.
        distribution: "normal" or "rademacher".

    Returns:
        The products, shape (lanes, count).
    """
    return _project(noise, keys, vectors, starts, count, dtype, distribution)


def _project(
    make: Callable[..., Tensor],
    keys: Tensor,
    vectors: Tensor,
    starts: Tensor,
    count: int,
    dtype: torch.dtype,
    distribution: str,
) -> Tensor:
    lanes, size = vectors.shape
    vectors = vectors.to(compute_dtype(vectors.dtype))
    height = max(1, PIECE // max(1, lanes * size))
    products = [vectors.new_empty(lanes, 0)]
    for begin in range(0, count, height):
        members = starts[:, None] + torch.arange(begin, min(begin + height, count), device=keys.device)
        rows = keys[:, None].expand(*members.shape, 2).reshape(-1, 2)
        noises = make(rows, members.reshape(-1), size, vectors.dtype, distribution)
        products.append((noises.reshape(*members.shape, size) @ vectors[:, :, None])[:, :, 0])
    return torch.cat(products, dim=1).to(dtype)


def _width(keys: Tensor, blocks: int) -> int:
    """How many counters a program has; on the CPU, where only the interpreter runs, as many as there are."""
    return 256 if keys.is_cuda else 1 << max(min(blocks, 1 << 17) - 1, 0).bit_length()
