"""Large CPU draws: a compiled body of fixed size, run chunk by chunk into the output.

The size of a chunk is the only one that is compiled, and its first counter is a tensor, so that neither the
length of a draw nor where it starts compiles anew.
"""

import functools
import os
import shutil
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from diffopt_kernels import philox

__all__ = [
    "available",
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

_broken: set[Body] = set()


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


def available() -> bool:
    """Tell whether draws may be compiled: not switched off, and a C++ compiler found.

    ``DIFFOPT_COMPILE_DRAWS=0`` in the environment switches it off; it is read at each large draw.

    Returns:
        A bool. The first time that there is no compiler, a RuntimeWarning says so.

    Example:
        >>> os.environ["DIFFOPT_COMPILE_DRAWS"] = "0"
        >>> available()
        False
        >>> del os.environ["DIFFOPT_COMPILE_DRAWS"]
    """
    return os.environ.get("DIFFOPT_COMPILE_DRAWS", "1") != "0" and _has_compiler()


def fill(body: Body, key: Tensor, size: int, first: int, dtype: torch.dtype) -> Tensor | None:
    """Draw numbers from the first lane of a counter on, chunk by chunk.

    Args:
        body: One of the functions above; compiled on its first use for a dtype.
        key: A key on the CPU.
        size: How many numbers.
        first: The first counter.
        dtype: The dtype of the numbers.

    Returns:
        The numbers, shape (size,); None where compiling fails, with a RuntimeWarning the first time.
    """
    if body in _broken:
        return None
    out = torch.empty(size, dtype=dtype)
    # no_grad as well as plain tensors: the mode that a body was compiled in is part of what it may be used for.
    with torch.no_grad():
        for begin in range(0, size, CHUNK):
            counter = torch.tensor(first + begin // 4)
            try:
                numbers = _compiled(body)(key, counter, dtype)
            except Exception as error:
                _broken.add(body)
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                _warn(f"compiling a draw failed ({reason})")
                return None
            part = out[begin : begin + CHUNK]
            part.copy_(numbers[: len(part)])
    return out


@functools.cache
def _compiled(body: Body) -> Body:
    return torch.compile(body, fullgraph=True, dynamic=False, options={"cpp.dynamic_threads": True})


@functools.cache
def _has_compiler() -> bool:
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    found = shutil.which(os.environ.get("CXX", default)) is not None
    if not found:
        _warn("no C++ compiler was found")
    return found


def _warn(cause: str) -> None:
    warnings.warn(
        f"{cause}: large random draws on the CPU stay eager, about four times slower. Set "
        "DIFFOPT_COMPILE_DRAWS=0 to keep them so without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )
