r"""Noise of populations, regenerated from counters and never stored.

The noise :math:`\epsilon_i \in \mathbb{R}^n` of member i of a key's population has the elements

.. math:: \epsilon_{ij} = z_{i s + j}, \qquad s = 4 \lceil n / 4 \rceil,

with z the whole draw of the key by `diffopt.random`: any members are made on their own, on any device and any rank.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diffopt.random.keys import check_key
from diffopt.transforms.donation import check_donation, mark_written
from diffopt.typing import Numeric
from diffopt.zero_order import launch
from diffopt_kernels import perturb as kernel

__all__ = ["Distribution", "accumulate", "noise", "perturb"]

Distribution: TypeAlias = Literal["normal", "rademacher"]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def noise(
    key: Tensor,
    size: int,
    members: int,
    *,
    start: int | Tensor = 0,
    dtype: torch.dtype | None = None,
    distribution: Distribution = "normal",
) -> Tensor:
    r"""Make the noises of consecutive members of a population.

    .. math:: (\epsilon_a, \epsilon_{a + 1}, \ldots, \epsilon_{a + m - 1})

    Args:
        key: A key, int64, shape (2,).
        size: How many numbers n a member has.
        members: How many members m.
        start: The first member a, an int or a 0-d integer tensor.
        dtype: A floating dtype. Default: torch's default dtype.
        distribution: "normal" (standard) or "rademacher" (signs).

    Returns:
        The noises, shape (members, size), on the key's device.

    Raises:
        TypeError: If the key is not an int64 tensor, the dtype not floating, or a size or a member not an integer.
        ValueError: If the key is not of shape (2,), a size or a member is negative, or the distribution another.

    Example:
        >>> key = torch.tensor([42, 0])
        >>> bool((noise(key, 5, 2, start=3) == noise(key, 5, 5)[3:]).all())
        True

    References:
        Salimans, Ho, Chen, Sidor and Sutskever, "Evolution Strategies as a Scalable Alternative to Reinforcement
        Learning", 2017, algorithm 2.
    """
    check_key(key)
    _check_count("size", size)
    _check_count("members", members)
    _check_distribution(distribution)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    _check_dtype("noise", "dtype", dtype)
    first = _member("start", start, key, size, members)
    return launch.noise(key, first, members, size, dtype, distribution)


def perturb(
    key: Tensor,
    x: Tensor,
    sigma: Numeric,
    member: int | Tensor,
    *,
    donate: bool = False,
    distribution: Distribution = "normal",
) -> Tensor:
    r"""Add a member's noise to a vector.

    .. math:: x + \sigma \odot \epsilon_i

    Differentiable in x and sigma; vmap over members makes a population. Half precision is computed in float32 and
    rounded.

    Args:
        key: A key, int64, shape (2,).
        x: The vector, floating-point, shape (n,).
        sigma: The scale, a number, a 0-d tensor or a tensor of shape (n,).
        member: The member i, an int or a 0-d integer tensor.
        donate: Whether to write over x, in constant extra memory. To undo, perturb by -sigma: x returns to rounding.
        distribution: "normal" (standard) or "rademacher" (signs).

    Returns:
        The perturbed vector, of the shape and dtype of x; with donate, x itself.

    Raises:
        TypeError: If the key is not an int64 tensor, x or sigma not floating-point, or the member not an integer.
        ValueError: If the key or a tensor has another shape or lies elsewhere than x, the member is negative, or the
            distribution another; with donate, if entries of x share memory.
        RuntimeError: With donate, under a live transform, or if a tensor requires grad in grad mode.

    Example:
        >>> key, x = torch.tensor([42, 0]), torch.tensor([1.0, -2.0])
        >>> bool((perturb(key, x, 0.1, 3) == x + 0.1 * noise(key, 2, 4)[3]).all())
        True

    References:
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, algorithm 1.
    """
    check_key(key)
    _check_vector("x", x, key)
    _check_distribution(distribution)
    scale = _scale(sigma, x)
    row = _member("member", member, key, x.shape[0], 1)
    if not donate:
        return launch.perturb(key, x, scale, row, distribution)
    if torch.compiler.is_compiling():
        return x.copy_(launch.perturb(key, x, scale, row, distribution))
    check_donation([x], [sigma] if isinstance(sigma, Tensor) else [])
    launch.perturb_in_place(key, x, scale, row, distribution)
    mark_written([x])
    return x


def accumulate(
    key: Tensor,
    weights: Tensor,
    size: int,
    *,
    start: int | Tensor = 0,
    dtype: torch.dtype | None = None,
    distribution: Distribution = "normal",
) -> Tensor:
    r"""Sum the noises of consecutive members with weights, in memory of the order of one member.

    .. math:: \sum_{k=0}^{m-1} w_k\, \epsilon_{a + k}

    Differentiable in the weights.

    Args:
        key: A key, int64, shape (2,).
        weights: The weights w, floating-point, shape (m,).
        size: How many numbers n a member has.
        start: The first member a, an int or a 0-d integer tensor.
        dtype: The dtype of the sum. Default: that of the weights. Half precision is summed in float32 and rounded.
        distribution: "normal" (standard) or "rademacher" (signs).

    Returns:
        The sum, shape (size,).

    Raises:
        TypeError: If the key is not an int64 tensor, weights or dtype not floating, or a size or a member not an
            integer.
        ValueError: If the key is not of shape (2,) or the weights not of one dimension, they lie on two devices, a
            size or a member is negative, or the distribution another.

    Example:
        >>> key, weights = torch.tensor([42, 0]), torch.tensor([0.5, -1.0, 2.0])
        >>> torch.allclose(accumulate(key, weights, 4), weights @ noise(key, 4, 3), atol=1e-6)
        True

    References:
        Salimans, Ho, Chen, Sidor and Sutskever, "Evolution Strategies as a Scalable Alternative to Reinforcement
        Learning", 2017, algorithm 2.
    """
    check_key(key)
    _check_vector("weights", weights, key)
    _check_count("size", size)
    _check_distribution(distribution)
    dtype = weights.dtype if dtype is None else dtype
    _check_dtype("accumulate", "dtype", dtype)
    first = _member("start", start, key, size, weights.shape[0])
    return launch.accumulate(key, weights, first, size, dtype, distribution)


def _check_vector(name: str, x: Tensor, key: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"`{name}` must be a floating-point tensor; got {got}.")
    if x.ndim != 1:
        raise ValueError(f"`{name}` must have one dimension; got shape {tuple(x.shape)}. For trees use tree.ravel.")
    if x.device != key.device:
        raise ValueError(f"`{name}` and `key` must be on one device; got {x.device} and {key.device}. Move the key.")


def _check_count(name: str, count: int) -> None:
    if not isinstance(count, int | torch.SymInt) or isinstance(count, bool):
        raise TypeError(f"`{name}` must be an int; got {type(count).__name__}.")
    if count < 0:
        raise ValueError(f"`{name}` must be at least 0; got {count}.")


def _check_dtype(name: str, argument: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        allowed = ", ".join(map(str, FLOATS))
        raise TypeError(f"`{name}` needs for `{argument}` one of {allowed}; got {dtype}.")


def _check_distribution(distribution: str) -> None:
    if distribution not in kernel.PAIRS:
        allowed = " or ".join(f'"{name}"' for name in kernel.PAIRS)
        raise ValueError(f"`distribution` must be {allowed}; got {distribution!r}.")


def _scale(sigma: Numeric, x: Tensor) -> Tensor:
    """Sigma as a tensor in the dtype of the arithmetic, of shape () or (n,)."""
    real = kernel.compute_dtype(x.dtype)
    if not isinstance(sigma, Tensor):
        if not isinstance(sigma, int | float | torch.SymFloat) or isinstance(sigma, bool):
            raise TypeError(f"`sigma` must be a number or a floating-point tensor; got {type(sigma).__name__}.")
        return torch.full((), sigma, dtype=real, device=x.device)
    if sigma.dtype not in FLOATS:
        raise TypeError(f"`sigma` must be a number or a floating-point tensor; got {sigma.dtype}.")
    if sigma.shape not in ((), x.shape):
        raise ValueError(f"`sigma` must have shape () or that of x, {tuple(x.shape)}; got {tuple(sigma.shape)}.")
    if sigma.ndim and sigma.device != x.device:
        raise ValueError(f"`sigma` and `x` must be on one device; got {sigma.device} and {x.device}.")
    return sigma.to(x.device, real)


def _member(name: str, member: int | Tensor, key: Tensor, size: int, count: int) -> Tensor:
    """A member as an int64 0-d tensor on the key's device."""
    if isinstance(member, Tensor):
        if member.is_floating_point() or member.is_complex() or member.dtype == torch.bool:
            raise TypeError(f"`{name}` must be an int or an integer tensor; got {member.dtype}.")
        if member.ndim:
            raise ValueError(f"`{name}` must be 0-d; got shape {tuple(member.shape)}. For many use torch.func.vmap.")
        return member.to(key.device, torch.int64)
    if not isinstance(member, int | torch.SymInt) or isinstance(member, bool):
        raise TypeError(f"`{name}` must be an int or an integer tensor; got {type(member).__name__}.")
    if member < 0:
        raise ValueError(f"`{name}` must be at least 0; got {member}.")
    if (member + count) * -(-size // 4) >= 1 << 63:
        raise ValueError(f"`{name}` must be below 2**63 / ceil(size / 4); got {member} of size {size}.")
    return torch.full((), member, dtype=torch.int64, device=key.device)
