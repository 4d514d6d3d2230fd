"""Large CPU draws: a compiled body of fixed size, run chunk by chunk into the output.

The size of a chunk is the only one that is compiled, and its first counter is a tensor, so that neither the
length of a draw nor where it starts compiles anew.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffopt.autodiff import compiled_body
from diffopt_kernels import philox

__all__ = [
    "bits_chunk",
    "fill",
    "gumbel_chunk",
    "normal_chunk",
    "rademacher_chunk",
    "uniform_chunk",
]

CHUNK = 1 << 18
BLOCKS = CHUNK // 4

Body = Callable[[Tensor, Tensor, torch.dtype], Tensor]


# One function each, and not one that takes the distribution: torch limits the compiled versions of a function.
def bits_chunk(key: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw one chunk of `bits` from a key and its first counter."""
    return philox.interleave(philox.bits_pair, philox.words(key, first, BLOCKS), dtype)


def uniform_chunk(key: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw one chunk of `uniform` from a key and its first counter."""
    return philox.interleave(philox.uniform_pair, philox.words(key, first, BLOCKS), dtype)


def normal_chunk(key: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw one chunk of `normal` from a key and its first counter."""
    return philox.interleave(philox.normal_pair, philox.words(key, first, BLOCKS), dtype)


def gumbel_chunk(key: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw one chunk of `gumbel` from a key and its first counter."""
    return philox.interleave(philox.gumbel_pair, philox.words(key, first, BLOCKS), dtype)


def rademacher_chunk(key: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw one chunk of `rademacher` from a key and its first counter."""
    return philox.interleave(philox.rademacher_pair, philox.words(key, first, BLOCKS), dtype)


def fill(body: Body, key: Tensor, size: int, first: int, dtype: torch.dtype) -> Tensor | None:
    """Draw numbers from the first lane of a counter on, chunk by chunk.

    Args:
        body: One of the functions above; compiled on its first use for a dtype.
        key: A key on the CPU.
        size: How many numbers.
        first: The first counter.
        dtype: The dtype of the numbers.

    Returns:
        The numbers, shape (size,); None where bodies are not compiled.
    """
    out = torch.empty(size, dtype=dtype)
    for begin in range(0, size, CHUNK):
        numbers = compiled_body.run(body, key, torch.tensor(first + begin // 4), dtype)
        if numbers is None:
            return None
        part = out[begin : begin + CHUNK]
        part.copy_(numbers[: len(part)])
    return out
