"""Keys: make one from a seed, and derive independent ones.

A key holds two 32-bit words k0, k1. Children are words 0 and 1 of Philox4x32-10 at counters that no draw uses:
the last word of the counter is 0 for draws, 1 for `split`, 2 for `fold_in`.
"""

import torch
from torch import Tensor

from diffopt.random.dispatch import runs_eagerly
from diffopt_kernels.philox import MASK, philox4x32

__all__ = ["check_key", "fold_in", "key", "split"]

SPLIT, FOLD_IN = 1, 2


def key(seed: int, *, device: torch.device | str | None = None) -> Tensor:
    """Make a key from a seed.

    Args:
        seed: An integer in [-2^63, 2^64); its low and high 32 bits are the two words.
        device: Where the key, and all that is drawn from it, lives. Default: the current default device.

    Returns:
        The key, int64, shape (2,).

    Raises:
        TypeError: If the seed is not an int. (For a tensor use ``fold_in(key(0), tensor)``.)
        ValueError: If the seed is out of range.

    Example:
        >>> key(42)
        tensor([42,  0])
    """
    if not isinstance(seed, int):
        raise TypeError(f"`seed` must be an int; got {type(seed).__name__}. For a tensor use fold_in(key(0), tensor).")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"`seed` must be in [-2**63, 2**64); got {seed}.")
    return torch.tensor([seed & MASK, (seed >> 32) & MASK], dtype=torch.int64, device=device)


def split(key: Tensor, num: int = 2) -> Tensor:
    """Derive new keys from one, independent of each other and of its draws.

    Child j does not depend on ``num``.

    Args:
        key: A key, int64, shape (2,).
        num: How many.

    Returns:
        The keys, int64, shape (num, 2); unpack them, or vmap over them.

    Raises:
        TypeError: If the key is not an int64 tensor, or ``num`` not an int.
        ValueError: If the key is not of shape (2,), or ``num`` is negative.

    Example:
        >>> a, b = split(fold_in(torch.tensor([42, 0]), 7))
        >>> a.shape, bool((a == b).all())
        (torch.Size([2]), False)
    """
    check_key(key)
    if not isinstance(num, int):
        raise TypeError(f"`num` must be an int; got {type(num).__name__}.")
    if num < 0:
        raise ValueError(f"`num` must be at least 0; got {num}.")
    return _children(key, torch.arange(num, device=key.device), SPLIT)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Derive a new key from a key and an integer, such as a step count or a rank.

    Args:
        key: A key, int64, shape (2,).
        data: An integer in [-2^63, 2^63), or an integer tensor of any shape S on the key's device.

    Returns:
        The new key, int64, shape (2,), or ``(*S, 2)`` for a tensor.

    Raises:
        TypeError: If the key is not an int64 tensor, or the data not integers.
        ValueError: If the key is not of shape (2,), or the data out of range.

    Example:
        >>> bool((fold_in(torch.tensor([42, 0]), 3) == fold_in(torch.tensor([42, 0]), torch.tensor(3))).all())
        True
    """
    check_key(key)
    if isinstance(data, Tensor):
        if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool:
            raise TypeError(f"`data` must hold integers; got {data.dtype}.")
        return _children(key, data.to(torch.int64), FOLD_IN)
    if not isinstance(data, int):
        raise TypeError(f"`data` must be an int or an integer tensor; got {type(data).__name__}.")
    if not -(2**63) <= data < 2**63:
        raise ValueError(f"`data` must be in [-2**63, 2**63); got {data}.")
    return _children(key, torch.tensor(data, device=key.device), FOLD_IN)


def check_key(key: Tensor) -> None:
    """Check that a value is a key.

    Args:
        key: The value.

    Raises:
        TypeError: If it is not an int64 tensor.
        ValueError: If it is not of shape (2,).

    Example:
        >>> check_key(torch.tensor([42, 0]))
    """
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        got = key.dtype if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(f"`key` must be an int64 tensor of shape (2,), from random.key(seed); got {got}.")
    if key.shape != (2,):
        raise ValueError(f"`key` must have shape (2,); got {tuple(key.shape)}. For many keys use torch.func.vmap.")


def _children(key: Tensor, counter: Tensor, domain: int) -> Tensor:
    if runs_eagerly(key) and runs_eagerly(counter):
        return _children_eagerly(key, counter, domain)
    low, high, zero = counter & MASK, (counter >> 32) & MASK, torch.zeros_like(counter)
    words = philox4x32(low, high, zero, zero + domain, key[0] & MASK, key[1] & MASK)
    return torch.stack(words[:2], dim=-1)


def _children_eagerly(key: Tensor, counter: Tensor, domain: int) -> Tensor:
    k0, k1 = (word & MASK for word in key.tolist())
    if counter.numel() > 8:
        low, high = (counter & MASK).numpy(), ((counter >> 32) & MASK).numpy()
        words = philox4x32(low, high, 0, domain, k0, k1)
        return torch.stack([torch.from_numpy(word) for word in words[:2]], dim=-1)
    counters = counter.reshape(-1).tolist()
    rows = [philox4x32(c & MASK, (c >> 32) & MASK, 0, domain, k0, k1)[:2] for c in counters]
    return torch.tensor(rows, dtype=torch.int64).reshape(*counter.shape, 2)
