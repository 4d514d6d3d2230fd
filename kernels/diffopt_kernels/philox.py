"""Counter-based random numbers: Philox4x32-10, one launch for a whole flat draw.

Counter i and a key of two 32-bit words give four 32-bit words, the lanes. Number j of a draw comes from lane
j % 4 of counter j // 4, so any part of a draw can be made on its own. With ten rounds of

    hi, lo = 64-bit product of a counter word and a constant
    c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0

the words are those of Random123 and of `triton.language.randint4x`. Each launcher here (`normal`, ...) stands
beside its reference in plain torch (`normal_reference`, ...), of the same signature.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "bits",
    "bits_pair",
    "bits_reference",
    "gumbel",
    "gumbel_pair",
    "gumbel_reference",
    "interleave",
    "normal",
    "normal_pair",
    "normal_reference",
    "philox4x32",
    "rademacher",
    "rademacher_pair",
    "rademacher_reference",
    "uniform",
    "uniform_pair",
    "uniform_reference",
    "words",
]

Pair: TypeAlias = tuple[Tensor, Tensor]

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
UNIFORM_BITS = {torch.float64: 32, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def philox4x32(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Encrypt a counter of four 32-bit words by a key of two, in ten rounds.

    Args:
        c0: Words in [0, 2^32): Python ints, int64 NumPy arrays or int64 tensors, that broadcast together.
        c1: As c0.
        c2: As c0.
        c3: As c0.
        k0: As c0.
        k1: As c0.

    Returns:
        Four words, each of the type and the broadcast shape of the arguments.

    Example:
        >>> [hex(word) for word in philox4x32(0, 0, 0, 0, 0, 0)]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    for _ in range(10):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _product(word: Any, multiplier: int) -> tuple[Any, Any]:
    # word * multiplier overflows int64, but word * (multiplier - 2^32) does not, and lacks word * 2^32 only.
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & MASK


def words(key: Tensor, first: int | Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make the four lanes of consecutive counters.

    Args:
        key: int64, shape (2,), words in [0, 2^32).
        first: The first counter: an int or a 0-d int64 tensor.
        blocks: How many counters.

    Returns:
        Four int64 tensors of shape (blocks,), with values in [0, 2^32).
    """
    counter = torch.arange(blocks, device=key.device) + first
    zero = torch.zeros_like(counter)
    return philox4x32(counter & MASK, counter >> 32, zero, zero, key[0] & MASK, key[1] & MASK)


def bits_pair(a: Tensor, b: Tensor, dtype: torch.dtype) -> Pair:
    """Give two words as integers: themselves in int64, the same 32 bits in int32."""
    if dtype == torch.int64:
        return a, b
    return tuple(((word ^ 0x80000000) - 0x80000000).to(dtype) for word in (a, b))  # type: ignore[return-value]


def uniform_pair(a: Tensor, b: Tensor, dtype: torch.dtype) -> Pair:
    """Turn two words into uniforms in [0, 1): the top m bits over 2^m, exact in the dtype."""
    m = UNIFORM_BITS[dtype]
    return (a >> (32 - m)).to(dtype) * 2.0**-m, (b >> (32 - m)).to(dtype) * 2.0**-m


def normal_pair(a: Tensor, b: Tensor, dtype: torch.dtype) -> Pair:
    """Turn two words into two normals: Box-Muller, r = sqrt(-2 log u) with u in (0, 1], angle 2 pi v."""
    wide = _compute_dtype(dtype)
    m = UNIFORM_BITS[wide]
    radius = torch.sqrt(-2.0 * torch.log((a + 1).to(wide) * 2.0**-32))
    angle = (b >> (32 - m)).to(wide) * (2.0 * math.pi * 2.0**-m)
    return (radius * torch.cos(angle)).to(dtype), (radius * torch.sin(angle)).to(dtype)


def gumbel_pair(a: Tensor, b: Tensor, dtype: torch.dtype) -> Pair:
    """Turn two words into standard Gumbels, -log(-log(1 - u)), with u in (0, 1) so that all are finite."""
    return _gumbel(a, dtype), _gumbel(b, dtype)


def _gumbel(word: Tensor, dtype: torch.dtype) -> Tensor:
    wide = _compute_dtype(dtype)
    u = (2 * word + 1).to(wide) * 2.0**-33
    # In float32 the largest u rounds to 1, whose Gumbel is -inf.
    return -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24))).to(dtype)


def rademacher_pair(a: Tensor, b: Tensor, dtype: torch.dtype) -> Pair:
    """Turn two words into signs, +1 or -1 by the top bit."""
    return (1 - 2 * (a >> 31)).to(dtype), (1 - 2 * (b >> 31)).to(dtype)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def interleave(
    pair: Callable[[Tensor, Tensor, torch.dtype], Pair],
    lanes: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Turn lanes 0, 1 and lanes 2, 3 into numbers and lay them out in the order of a draw.

    Args:
        pair: `normal_pair` or another of its kind.
        lanes: Four int64 tensors of shape (blocks,).
        dtype: The dtype of the numbers.

    Returns:
        The numbers, shape (4 blocks,).
    """
    return torch.stack((*pair(*lanes[:2], dtype), *pair(*lanes[2:], dtype)), dim=-1).reshape(-1)


def _reference(
    pair: Callable[[Tensor, Tensor, torch.dtype], Pair], key: Tensor, size: int, start: int, dtype: torch.dtype
) -> Tensor:
    first = start // 4
    blocks = -(-(start + size) // 4) - first
    offset = start - 4 * first
    return interleave(pair, words(key, first, blocks), dtype)[offset : offset + size]


def _launch(distribution: str, key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    import triton  # costs 0.3 s to import

    from diffopt_kernels import philox_kernel

    out = torch.empty(size, dtype=dtype, device=key.device)
    first = start // 4
    blocks = -(-(start + size) // 4) - first
    if size == 0:
        return out
    # On the CPU, where only the interpreter runs, a program costs milliseconds whatever its size.
    width = 512 if key.is_cuda else triton.next_power_of_2(min(blocks, 1 << 17))
    kernel: Any = philox_kernel.draw[(triton.cdiv(blocks, width),)]
    resolution = UNIFORM_BITS.get(dtype, 32)
    with torch.cuda.device_of(key):
        kernel(out, key, first, start % 4, size, DISTRIBUTION=distribution, BITS=resolution, BLOCK=width)
    return out


def bits_reference(key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    """Reference of `bits`."""
    return _reference(bits_pair, key, size, start, dtype)


def bits(key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    """Draw 32-bit words in one launch.

    Args:
        key: int64, shape (2,).
        size: How many numbers.
        start: Where in the whole draw the first one lies.
        dtype: int64 (values in [0, 2^32)) or int32 (the same bits).

    Returns:
        Numbers start, ..., start + size - 1 of the draw, shape (size,).
    """
    return _launch("bits", key, size, start, dtype)


def uniform_reference(key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    """Reference of `uniform`."""
    return _reference(uniform_pair, key, size, start, dtype)


def uniform(key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    """Draw uniforms in [0, 1) in one launch; arguments as for `bits`, with a floating dtype."""
    return _launch("uniform", key, size, start, dtype)


def normal_reference(key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    """Reference of `normal`."""
    return _reference(normal_pair, key, size, start, dtype)


def normal(key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    """Draw standard normals in one launch; arguments as for `bits`, with a floating dtype."""
    return _launch("normal", key, size, start, dtype)


def gumbel_reference(key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    """Reference of `gumbel`."""
    return _reference(gumbel_pair, key, size, start, dtype)


def gumbel(key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    """Draw standard Gumbels in one launch; arguments as for `bits`, with a floating dtype."""
    return _launch("gumbel", key, size, start, dtype)


def rademacher_reference(key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    """Reference of `rademacher`."""
    return _reference(rademacher_pair, key, size, start, dtype)


def rademacher(key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    """Draw signs +1 and -1 in one launch; arguments as for `bits`, with a floating dtype."""
    return _launch("rademacher", key, size, start, dtype)
