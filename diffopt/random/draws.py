"""Draws: arrays of random numbers, each a pure function of a key.

Number i of the flattened draw is lane i % 4 of Philox counter i // 4, whatever the shape, so that ``start``
gives any part of a whole draw on its own.
"""

import math

import torch
from torch import Tensor

from diffopt.random.dispatch import BITS, GUMBEL, NORMAL, RADEMACHER, UNIFORM, Sampler, draw
from diffopt.random.keys import check_key
from diffopt.typing import Shape
from diffopt_kernels.philox import UNIFORM_BITS

__all__ = ["bits", "gumbel", "normal", "permutation", "rademacher", "uniform"]


def bits(key: Tensor, shape: Shape = (), *, dtype: torch.dtype | None = None, start: int = 0) -> Tensor:
    """Draw 32 random bits a number: the words of Philox4x32-10 themselves.

    Args:
        key: A key, int64, shape (2,).
        shape: The shape of the result.
        dtype: int64 (default: values in [0, 2^32)) or int32 (the same bits, two's complement).
        start: Where in the flattened whole draw the result starts.

    Returns:
        The words, of that shape and dtype, on the key's device.

    Raises:
        TypeError: If the key is not an int64 tensor, the dtype is another, or sizes are not ints.
        ValueError: If the key is not of shape (2,), or sizes or ``start`` are negative.

    Example:
        >>> [hex(word) for word in bits(torch.tensor([0, 0]), (4,))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']

    References:
        Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    dtype = torch.int64 if dtype is None else dtype
    if dtype not in (torch.int64, torch.int32):
        raise TypeError(f"`bits` needs dtype torch.int64 or torch.int32; got {dtype}.")
    return _draw(BITS, key, shape, dtype, start)


def uniform(key: Tensor, shape: Shape = (), *, dtype: torch.dtype | None = None, start: int = 0) -> Tensor:
    """Draw uniform numbers in [0, 1).

    They are multiples of 2^-m, exact in the dtype: m is 24 for float32, 32 for float64, 11 for float16 and 8
    for bfloat16.

    Args:
        key: A key, int64, shape (2,).
        shape: The shape of the result.
        dtype: A floating dtype. Default: torch's default dtype.
        start: Where in the flattened whole draw the result starts.

    Returns:
        The numbers, of that shape and dtype, on the key's device.

    Raises:
        TypeError: If the key is not an int64 tensor, the dtype not floating, or sizes are not ints.
        ValueError: If the key is not of shape (2,), or sizes or ``start`` are negative.

    Example:
        >>> key = torch.tensor([42, 0])
        >>> bool((uniform(key, (3,), start=2) == uniform(key, (5,))[2:]).all())
        True
    """
    return _draw(UNIFORM, key, shape, _floating("uniform", dtype), start)


def normal(key: Tensor, shape: Shape = (), *, dtype: torch.dtype | None = None, start: int = 0) -> Tensor:
    """Draw standard normal numbers, by the Box-Muller transform of pairs of words.

    z = sqrt(-2 log u) cos(2 pi v) and sqrt(-2 log u) sin(2 pi v), with u in (0, 1] of 32 bits, so that ``|z|`` is
    at most 6.66. Half precision is computed in float32 and rounded.

    Args:
        key: A key, int64, shape (2,).
        shape: The shape of the result.
        dtype: A floating dtype. Default: torch's default dtype.
        start: Where in the flattened whole draw the result starts.

    Returns:
        The numbers, of that shape and dtype, on the key's device.

    Raises:
        TypeError: If the key is not an int64 tensor, the dtype not floating, or sizes are not ints.
        ValueError: If the key is not of shape (2,), or sizes or ``start`` are negative.

    Example:
        >>> keys = torch.tensor([[42, 0], [43, 0]])
        >>> torch.func.vmap(lambda key: normal(key, (3,)))(keys).shape
        torch.Size([2, 3])

    References:
        Box and Muller, "A note on the generation of random normal deviates", 1958.
    """
    return _draw(NORMAL, key, shape, _floating("normal", dtype), start)


def gumbel(key: Tensor, shape: Shape = (), *, dtype: torch.dtype | None = None, start: int = 0) -> Tensor:
    """Draw standard Gumbel numbers, -log(-log(1 - u)) with u in (0, 1) of 32 bits; none is infinite.

    The argmax of logits plus Gumbels is a draw from the softmax of the logits.

    Args:
        key: A key, int64, shape (2,).
        shape: The shape of the result.
        dtype: A floating dtype. Default: torch's default dtype.
        start: Where in the flattened whole draw the result starts.

    Returns:
        The numbers, of that shape and dtype, on the key's device.

    Raises:
        TypeError: If the key is not an int64 tensor, the dtype not floating, or sizes are not ints.
        ValueError: If the key is not of shape (2,), or sizes or ``start`` are negative.

    Example:
        >>> logits = torch.tensor([0.0, 50.0])
        >>> (logits + gumbel(torch.tensor([42, 0]), (2,))).argmax()
        tensor(1)
    """
    return _draw(GUMBEL, key, shape, _floating("gumbel", dtype), start)


def rademacher(key: Tensor, shape: Shape = (), *, dtype: torch.dtype | None = None, start: int = 0) -> Tensor:
    """Draw signs: +1 or -1, with probability one half each.

    Args:
        key: A key, int64, shape (2,).
        shape: The shape of the result.
        dtype: A floating dtype. Default: torch's default dtype.
        start: Where in the flattened whole draw the result starts.

    Returns:
        The signs, of that shape and dtype, on the key's device.

    Raises:
        TypeError: If the key is not an int64 tensor, the dtype not floating, or sizes are not ints.
        ValueError: If the key is not of shape (2,), or sizes or ``start`` are negative.

    Example:
        >>> rademacher(torch.tensor([42, 0]), (100,)).abs().sum()
        tensor(100.)
    """
    return _draw(RADEMACHER, key, shape, _floating("rademacher", dtype), start)


def permutation(key: Tensor, n: int) -> Tensor:
    """Draw a random order of 0, ..., n - 1: the order that sorts n random words of 63 bits.

    Args:
        key: A key, int64, shape (2,).
        n: How many.

    Returns:
        The permutation, int64, shape (n,), on the key's device.

    Raises:
        TypeError: If the key is not an int64 tensor, or n not an int.
        ValueError: If the key is not of shape (2,), or n is negative.

    Example:
        >>> permutation(torch.tensor([42, 0]), 5).sort().values
        tensor([0, 1, 2, 3, 4])
    """
    words = bits(key, (n, 2))
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)


def _draw(sampler: Sampler, key: Tensor, shape: Shape, dtype: torch.dtype, start: int) -> Tensor:
    check_key(key)
    if not isinstance(shape, tuple | list) or not all(isinstance(size, int | torch.SymInt) for size in shape):
        raise TypeError(f"`shape` must be a tuple of ints; got {shape!r}.")
    if any(size < 0 for size in shape):
        raise ValueError(f"`shape` must not have negative sizes; got {tuple(shape)}.")
    if not isinstance(start, int | torch.SymInt):
        raise TypeError(f"`start` must be an int; got {type(start).__name__}.")
    if start < 0:
        raise ValueError(f"`start` must be at least 0; got {start}.")
    return draw(sampler, key, math.prod(shape), start, dtype).reshape(shape)


def _floating(name: str, dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in UNIFORM_BITS:
        allowed = ", ".join(str(kind) for kind in UNIFORM_BITS)
        raise TypeError(f"`{name}` needs one of the dtypes {allowed}; got {dtype}.")
    return dtype
