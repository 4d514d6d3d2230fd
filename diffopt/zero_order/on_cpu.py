"""Noise on the CPU: plain tensors, in chunks that are made, used and dropped.

Many numbers at once come from a compiled body, which works on 32-bit lanes: the instructions of most processors
multiply vectors of those, and not of 64 bits.
"""

import math

import torch
from torch import Tensor

from diffopt.autodiff import compiled_body
from diffopt.random.dispatch import NORMAL, RADEMACHER, draw
from diffopt_kernels import perturb as kernel
from diffopt_kernels.philox import MASK, MULTIPLIERS, UNIFORM_BITS, WEYL

__all__ = ["COMPILE_FROM", "accumulate", "noise", "perturb", "project"]

COMPILE_FROM = 1 << 17
"""Populations, and chunks of a vector, of at least this many numbers are drawn by the compiled body.

Less than for `diffopt.random`, since a population is drawn again at every step. The size of a draw alone decides, so
that the same draw takes the same path every time.
"""

CHUNK = 1 << 20
"""How many numbers are made at a time."""

BODY = 1 << 17
"""How many numbers the compiled body makes; its only size, and little enough for the cache."""

SAMPLERS = {"normal": NORMAL, "rademacher": RADEMACHER}


def noise(keys: Tensor, members: Tensor, size: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """Make the noise of one member of each lane; arguments as for `diffopt_kernels.perturb.noise_reference`.

    Raises:
        ValueError: If a member is negative.
    """
    lanes, blocks = len(members), -(-size // 4)
    if lanes == 0 or size == 0:
        return torch.empty(lanes, size, dtype=dtype)
    _check_members(members)
    if _consecutive(keys, members):
        numbers = _contiguous(keys[0], int(members[0]) * blocks, lanes * 4 * blocks, dtype, distribution)
        return numbers.view(lanes, 4 * blocks)[:, :size]
    if 4 * blocks >= COMPILE_FROM:
        pairs = zip(keys, members.tolist(), strict=True)
        rows = [_contiguous(key, member * blocks, size, dtype, distribution) for key, member in pairs]
        return torch.stack(rows)
    return kernel.noise_reference(keys, members, size, dtype, distribution)


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
    for lane, member in enumerate(members.tolist()):
        for begin in range(0, size, CHUNK):
            columns = slice(begin, min(begin + CHUNK, size))
            first = member * blocks + begin // 4
            numbers = _contiguous(keys[lane], first, columns.stop - begin, dtype, distribution)
            yield slice(lane, lane + 1), columns, numbers[None]


def _shared(keys: Tensor, starts: Tensor) -> list[slice]:
    """The lanes in runs that share one population."""
    if len(starts) == 0:
        return []
    same = (keys == keys[:1]).all() and (starts == starts[:1]).all()
    return [slice(0, len(starts))] if bool(same) else [slice(i, i + 1) for i in range(len(starts))]


def _consecutive(keys: Tensor, members: Tensor) -> bool:
    return len(members) == 1 or bool((members.diff() == 1).all() and (keys == keys[:1]).all())


def _check_members(members: Tensor) -> None:
    if len(members) and int(members.min()) < 0:
        raise ValueError(f"members must be at least 0; got {int(members.min())}.")


def _contiguous(key: Tensor, first: int, size: int, dtype: torch.dtype, distribution: str) -> Tensor:
    """Draw numbers from the first lane of a counter on."""
    if size < COMPILE_FROM:
        return draw(SAMPLERS[distribution], key, size, 4 * first, dtype)
    out = torch.empty(size, dtype=dtype)
    for begin in range(0, size, BODY):
        # Half precision is rounded afterwards, so that two dtypes are all that compile.
        body = normal_body if distribution == "normal" else rademacher_body
        numbers = compiled_body.run(body, key, torch.tensor(first + begin // 4), kernel.compute_dtype(dtype))
        if numbers is None:
            return draw(SAMPLERS[distribution], key, size, 4 * first, dtype)
        part = out[begin : begin + BODY]
        part.copy_(numbers[: len(part)])
    return out


def normal_body(key: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw BODY normals from a counter on, equal to those of `philox.normal_pair`."""
    a, b, c, d = _words(key, first)
    return torch.stack((*_normals(a, b, dtype), *_normals(c, d, dtype)), dim=-1).reshape(-1)


def rademacher_body(key: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw BODY signs from a counter on, equal to those of `philox.rademacher_pair`."""
    return torch.stack([1 + 2 * (word >> 31).to(dtype) for word in _words(key, first)], dim=-1).reshape(-1)


def _normals(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # The halves are exact in the dtype, so that their sum rounds once, as the whole word would.
    u = (_high(a).to(dtype) * 65536.0 + (_low(a).to(dtype) + 1.0)) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(u))
    m = UNIFORM_BITS[dtype]
    v = _high(b).to(dtype) * 65536.0 + _low(b).to(dtype) if m == 32 else ((b >> 8) & 0xFFFFFF).to(dtype)
    angle = v * (2.0 * math.pi * 2.0**-m)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _words(key: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of Philox4x32-10 as int32 of the same bits."""
    k0, k1 = _signed(key[0]), _signed(key[1])
    low, high = _signed(first), _signed(first >> 32)
    c0 = low + torch.arange(BODY // 4, dtype=torch.int32)
    c1 = high + ((c0 ^ -0x80000000) < (low ^ -0x80000000)).to(torch.int32)
    c2 = c3 = torch.zeros_like(c0)
    for turn in range(10):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            high1 ^ c1 ^ (k0 + _wrap(turn * WEYL[0])),
            low1,
            high0 ^ c3 ^ (k1 + _wrap(turn * WEYL[1])),
            low0,
        )
    return c0, c1, c2, c3


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and low words of a 64-bit product, by products of halves, each of which fits its 32 bits."""
    m1, m0 = multiplier >> 16, multiplier & 0xFFFF
    w1, w0 = _high(word), _low(word)
    middle = w1 * m0 + _high(w0 * m0)
    other = w0 * m1 + _low(middle)
    return w1 * m1 + _high(middle) + _high(other), word * _wrap(multiplier)


def _high(word: Tensor) -> Tensor:
    return (word >> 16) & 0xFFFF


def _low(word: Tensor) -> Tensor:
    return word & 0xFFFF


def _wrap(word: int) -> int:
    return ((word & MASK) ^ 0x80000000) - 0x80000000


def _signed(word: Tensor) -> Tensor:
    return (((word & MASK) ^ 0x80000000) - 0x80000000).to(torch.int32)
