"""Where a draw runs: the one place that decides.

Under a transform, inside a compiled function and on other devices, draws are plain torch operations. Else CUDA
draws are one launch of the Triton kernel, large CPU draws a compiled body, and small ones are eager: their
words come from NumPy or, for a few counters, from Python's integers, 4 and 30 times sooner than from torch.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffopt.autodiff.levels import transforms_active
from diffopt.random import compiled
from diffopt_kernels import philox

__all__ = ["BITS", "GUMBEL", "NORMAL", "RADEMACHER", "UNIFORM", "Sampler", "draw", "runs_eagerly"]

COMPILE_FROM = 1 << 20
"""Draws of at least this many numbers are compiled."""

NUMPY_BLOCKS, PYTHON_BLOCKS = 4096, 4

CHUNK = 1 << 16
"""Larger eager draws are made in chunks of this size, which stay in cache."""


class Sampler(NamedTuple):
    """A distribution: its numbers from words, its launcher, its reference and its compiled body."""

    pair: Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]
    launch: Callable[[Tensor, int, int, torch.dtype], Tensor]
    reference: Callable[[Tensor, int, int, torch.dtype], Tensor]
    body: Callable[[Tensor, Tensor, torch.dtype], Tensor]


BITS = Sampler(philox.bits_pair, philox.bits, philox.bits_reference, compiled.bits_chunk)
UNIFORM = Sampler(philox.uniform_pair, philox.uniform, philox.uniform_reference, compiled.uniform_chunk)
NORMAL = Sampler(philox.normal_pair, philox.normal, philox.normal_reference, compiled.normal_chunk)
GUMBEL = Sampler(philox.gumbel_pair, philox.gumbel, philox.gumbel_reference, compiled.gumbel_chunk)
RADEMACHER = Sampler(philox.rademacher_pair, philox.rademacher, philox.rademacher_reference, compiled.rademacher_chunk)


def draw(sampler: Sampler, key: Tensor, size: int, start: int, dtype: torch.dtype) -> Tensor:
    """Draw numbers start, ..., start + size - 1 of a key's whole draw.

    Args:
        sampler: The distribution.
        key: A key, int64, shape (2,).
        size: How many numbers.
        start: Where in the whole draw the first one lies.
        dtype: The dtype of the numbers.

    Returns:
        The numbers, shape (size,).

    Example:
        >>> draw(UNIFORM, torch.tensor([42, 0]), 2, 1, torch.float32).shape
        torch.Size([2])
    """
    if torch.compiler.is_compiling() or transforms_active():
        return sampler.reference(key, size, start, dtype)
    if key.is_cuda and _has_triton():
        return sampler.launch(key, size, start, dtype)
    if not key.is_cpu or size == 0:
        return sampler.reference(key, size, start, dtype)
    # Whole blocks are drawn; the numbers of the first one that come before start are cut off.
    offset = start % 4
    if size >= COMPILE_FROM:
        out = compiled.fill(sampler.body, key, size + offset, start // 4, dtype)
        if out is not None:
            return out[offset:]
    return _eager(sampler, key, size + offset, start // 4, dtype)[offset:]


def runs_eagerly(tensor: Tensor) -> bool:
    """Tell whether a tensor's values may be read on the spot: a CPU tensor, nothing traced or transformed.

    Args:
        tensor: Any tensor.

    Returns:
        A bool.

    Example:
        >>> runs_eagerly(torch.ones(1))
        True
    """
    return not torch.compiler.is_compiling() and tensor.is_cpu and not transforms_active()


def _eager(sampler: Sampler, key: Tensor, size: int, first: int, dtype: torch.dtype) -> Tensor:
    if size <= CHUNK:
        return _numbers(sampler, key, first, -(-size // 4), dtype)[:size]
    out = torch.empty(size, dtype=dtype)
    for begin in range(0, size, CHUNK):
        part = out[begin : begin + CHUNK]
        part.copy_(_numbers(sampler, key, first + begin // 4, -(-len(part) // 4), dtype)[: len(part)])
    return out


def _numbers(sampler: Sampler, key: Tensor, first: int, blocks: int, dtype: torch.dtype) -> Tensor:
    if blocks > NUMPY_BLOCKS:
        return philox.interleave(sampler.pair, philox.words(key, first, blocks), dtype)
    words = _words(key, first, blocks)
    return torch.stack(sampler.pair(words[:, 0::2], words[:, 1::2], dtype), dim=-1).reshape(-1)


def _words(key: Tensor, first: int, blocks: int) -> Tensor:
    """Make the words of a few counters, int64, shape (blocks, 4)."""
    k0, k1 = (word & philox.MASK for word in key.tolist())
    if blocks <= PYTHON_BLOCKS:
        counters = range(first, first + blocks)
        return torch.tensor([philox.philox4x32(c & philox.MASK, c >> 32, 0, 0, k0, k1) for c in counters])
    counter = np.arange(first, first + blocks, dtype=np.int64)
    lanes = philox.philox4x32(counter & philox.MASK, counter >> 32, 0, 0, k0, k1)
    return torch.from_numpy(np.stack(lanes, axis=-1))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
