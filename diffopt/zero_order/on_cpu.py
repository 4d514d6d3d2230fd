"""Noise on the CPU: plain tensors, in chunks that are made, used and dropped.

Many numbers at once come from native code, few from NumPy's integers.
"""

import torch
from torch import Tensor

from diffopt.random.dispatch import NORMAL, RADEMACHER, draw
from diffopt.zero_order import native
from diffopt_kernels import perturb as kernel

__all__ = ["NATIVE_FROM", "accumulate", "noise", "perturb", "project"]

NATIVE_FROM = 1 << 12
"""Draws of at least this many numbers, of all lanes together, are made by native code.

The size of a draw alone decides, so that the same draw takes the same path every time.
"""

CHUNK = 1 << 18
"""How many numbers are made at a time."""

SAMPLERS = {"normal": NORMAL, "rademacher": RADEMACHER}


def noise(keys: Tensor, members: Tensor, size: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """Make the noise of one member of each lane; arguments as for `diffopt_kernels.perturb.noise_reference`.

    Raises:
        ValueError: If a member is negative.
    """
    _check_members(members)
    return _part(keys, members, slice(0, size), size, dtype, distribution)


def perturb(
    keys: Tensor, x: Tensor, sigma: Tensor, members: Tensor, distribution: str, out: Tensor | None = None
) -> Tensor:
    """Perturb each lane; arguments as for `diffopt_kernels.perturb.perturb`."""
    _check_members(members)
    real = kernel.compute_dtype(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    for lanes, columns, noises in _pieces(keys, members, x.shape[1], real, distribution):
        part, scale, target = x[lanes, columns], sigma[lanes, columns], out[lanes, columns]
        if x.dtype == sigma.dtype == real:
            torch.addcmul(part, scale, noises, out=target)
        else:
            target.copy_(torch.addcmul(part.to(real), scale.to(real), noises))
    return out


def accumulate(
    keys: Tensor, weights: Tensor, starts: Tensor, size: int, dtype: torch.dtype, distribution: str
) -> Tensor:
    """Sum noises for each lane; arguments as for `diffopt_kernels.perturb.accumulate`."""
    _check_members(starts)
    real = kernel.compute_dtype(dtype)
    weights = weights.to(real)
    out = torch.zeros(len(weights), size, dtype=real)
    for lanes in _shared(keys, starts):
        row, total = lanes.start, out[lanes]
        for members, columns, noises in _population(keys[row], starts[row], weights.shape[1], size, real, distribution):
            total[:, columns].addmm_(weights[lanes, members], noises)
    return out.to(dtype)


def project(keys: Tensor, vectors: Tensor, starts: Tensor, count: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """Take inner products with noises for each lane; arguments as for `diffopt_kernels.perturb.project`."""
    _check_members(starts)
    real = kernel.compute_dtype(vectors.dtype)
    vectors = vectors.to(real)
    out = torch.zeros(len(vectors), count, dtype=real)
    for lanes in _shared(keys, starts):
        row, total = lanes.start, out[lanes]
        for members, columns, noises in _population(
            keys[row], starts[row], count, vectors.shape[1], real, distribution
        ):
            total[:, members].addmm_(vectors[lanes, columns], noises.mT)
    return out.to(dtype)


def _population(key: Tensor, start: Tensor, count: int, size: int, dtype: torch.dtype, distribution: str):
    """The noises of consecutive members, piece by piece."""
    members = start + torch.arange(count)
    return _pieces(key.expand(count, 2), members, size, dtype, distribution)


def _pieces(keys: Tensor, members: Tensor, size: int, dtype: torch.dtype, distribution: str):
    """Yield (lanes, columns, their noises) in pieces of about CHUNK numbers: some whole lanes, or a part of one."""
    blocks = max(-(-size // 4), 1)
    if 4 * blocks <= CHUNK:
        height = CHUNK // (4 * blocks)
        for begin in range(0, len(members), height):
            lanes = slice(begin, min(begin + height, len(members)))
            yield lanes, slice(0, size), noise(keys[lanes], members[lanes], size, dtype, distribution)
        return
    for lane in range(len(members)):
        for begin in range(0, size, CHUNK):
            columns = slice(begin, min(begin + CHUNK, size))
            row = slice(lane, lane + 1)
            yield row, columns, _part(keys[row], members[row], columns, size, dtype, distribution)


def _part(keys: Tensor, members: Tensor, columns: slice, size: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """Some columns, from a multiple of 4 on, of the noise of one member of each lane."""
    lanes, width, blocks = len(members), columns.stop - columns.start, -(-size // 4)
    if lanes * width == 0:
        return torch.empty(lanes, width, dtype=dtype)
    if lanes * width >= NATIVE_FROM:
        real = kernel.compute_dtype(dtype)
        numbers = native.draw(keys, members, blocks, columns.start // 4, width, real, distribution)
        if numbers is not None:
            return numbers.to(dtype)
    if lanes == 1:
        first = 4 * blocks * int(members[0]) + columns.start
        return draw(SAMPLERS[distribution], keys[0], width, first, dtype)[None]
    if _consecutive(keys, members):
        first = 4 * blocks * int(members[0])
        numbers = draw(SAMPLERS[distribution], keys[0], 4 * blocks * lanes, first, dtype)
        return numbers.view(lanes, 4 * blocks)[:, columns]
    return kernel.noise_reference(keys, members, size, dtype, distribution)[:, columns]


def _shared(keys: Tensor, starts: Tensor) -> list[slice]:
    """The lanes in runs that share one population."""
    if len(starts) == 0:
        return []
    same = (keys == keys[:1]).all() and (starts == starts[:1]).all()
    return [slice(0, len(starts))] if bool(same) else [slice(i, i + 1) for i in range(len(starts))]


def _consecutive(keys: Tensor, members: Tensor) -> bool:
    return bool((members.diff() == 1).all() and (keys == keys[:1]).all())


def _check_members(members: Tensor) -> None:
    if len(members) and int(members.min()) < 0:
        raise ValueError(f"members must be at least 0; got {int(members.min())}.")
