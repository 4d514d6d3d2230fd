r"""Gradients from values alone, as plain functions: evolution strategies and simultaneous perturbation.

.. math:: \hat g = \frac{c}{m} \sum_{i=1}^m \frac{f(x + \sigma u_i) - f(x - \sigma u_i)}{2 \sigma}\, u_i
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffopt.random.keys import check_key
from diffopt.zero_order.differences import leave_one_out, mean_of_sides, shape_differences
from diffopt.zero_order.first_order import without_derivative
from diffopt.zero_order.members import Evaluate, Members
from diffopt.zero_order.options import Losses, Method, Options, check_options, draw, flatten_sigma, kept, probe
from diffopt.zero_order.samplers import Sampler, gaussian, rademacher

__all__ = ["EstimateInfo", "es_grad", "spsa_grad"]


class EstimateInfo(NamedTuple):
    """What a population tells beside the gradient: 0-d tensors.

    `loss` is the mean of the values, `variance` the trace of the estimate's covariance, estimated as if directions
    were independent (NaN for one direction), and `signal_to_noise` the norm of the estimate over its deviation.
    """

    loss: Tensor
    variance: Tensor
    signal_to_noise: Tensor


def es_grad(
    f: Callable[..., Any],
    sigma: Any,
    num_samples: int,
    *,
    method: Method = "antithetic",
    sampler: Sampler | None = None,
    argnums: int | tuple[int, ...] = 0,
    baseline: Literal["leave_one_out"] | None = None,
    clip: float | None = None,
    sign: bool = False,
    nan: Literal["propagate", "drop", "raise"] = "propagate",
    chunk_size: int | None = None,
    batching: Evaluate = "vmap",
    start: int = 0,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Callable[..., tuple[Any, EstimateInfo]]:
    r"""Make a function that estimates the gradient of a smoothed function from values alone.

    .. math:: \hat g = \frac{1}{m} \sum_{i=1}^m \frac{f(x + \sigma u_i) - f(x - \sigma u_i)}{2 \sigma}\, u_i

    The gradient of `smoothed`, without a graph. In chunks, no more than a chunk of members is in memory, whatever
    num_samples is: directions are made again from the key when their weights are known.

    Args:
        f: Returns a number, or a tensor of one element.
        sigma: As in `smoothed`.
        num_samples: As in `smoothed`.
        method: As in `smoothed`.
        sampler: As in `smoothed`.
        argnums: As in `smoothed`.
        baseline: As in `smoothed`.
        clip: As in `smoothed`.
        sign: As in `smoothed`.
        nan: As in `smoothed`.
        chunk_size: How many members to evaluate at once. Default: all.
        batching: As in `smoothed`.
        start: As in `smoothed`.
        reduce: Sums a tensor over ranks; called once, with one vector (twice for a leave-one-out baseline).

    Returns:
        `g(key, *args, **kwargs) -> (gradient, info)`: a tree like the argument, or a tuple of them where `argnums` is
        one, and an `EstimateInfo`. Both are constants; under a transform, a derivative of them raises.

    Raises:
        TypeError: If f returns more than one number, or as in `smoothed`.
        ValueError: As in `smoothed`.
        FloatingPointError: With nan="raise", if a value is NaN or infinite.

    Example:
        >>> g = es_grad(lambda x: (x.round() ** 2).sum(), 1.0, 10_000)
        >>> gradient, info = g(torch.tensor([42, 0]), torch.tensor([3.0]))
        >>> gradient.round(), info.signal_to_noise > 10
        (tensor([6.]), tensor(True))

    References:
        Salimans, Ho, Chen, Sidor and Sutskever, "Evolution strategies as a scalable alternative to reinforcement
        learning", 2017, algorithm 2.
    """
    options = Options(
        sigma, num_samples, gaussian() if sampler is None else sampler, method, baseline, clip, sign, nan, chunk_size,
        batching, start, reduce,
    )  # fmt: skip
    check_options(options)

    @functools.wraps(f)
    def gradient(key: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, EstimateInfo]:
        check_key(key)
        members = Members(f, args, kwargs, argnums=argnums, batching=batching)
        held = (args, tuple(kwargs.values()), options.sigma, options.sampler.tensors)
        # a function that is called alone may take derivatives of its own by backward()
        with contextlib.nullcontext() if batching == "sequential" else torch.no_grad():
            found, info = _estimate(options, members, key)
        found, info = without_derivative((found, info), f, *held, message=_NO_DERIVATIVE)
        return members.unravel(found), info

    return gradient


def spsa_grad(
    f: Callable[..., Any],
    sigma: Any,
    num_samples: int = 2,
    *,
    argnums: int | tuple[int, ...] = 0,
    nan: Literal["propagate", "drop", "raise"] = "propagate",
    chunk_size: int | None = None,
    batching: Evaluate = "vmap",
    start: int = 0,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Callable[..., tuple[Any, EstimateInfo]]:
    r"""Make a function that estimates a gradient by simultaneous perturbation: two values, whatever the dimension.

    .. math:: \hat g = \frac{f(x + \sigma u) - f(x - \sigma u)}{2 \sigma}\, u, \qquad u \in \{-1, 1\}^n

    Args:
        f: As in `es_grad`.
        sigma: The step, as in `smoothed`.
        num_samples: How many members are evaluated: an even number, two for each random direction.
        argnums: As in `es_grad`.
        nan: As in `es_grad`.
        chunk_size: As in `es_grad`.
        batching: As in `es_grad`.
        start: As in `es_grad`.
        reduce: As in `es_grad`.

    Returns:
        As in `es_grad`. For a quadratic function the estimate is unbiased.

    Raises:
        TypeError: As in `es_grad`.
        ValueError: As in `es_grad`.
        FloatingPointError: As in `es_grad`.

    Example:
        >>> gradient, info = spsa_grad(lambda x: (x**2).sum(), 0.1)(torch.tensor([42, 0]), torch.tensor([3.0]))
        >>> gradient.round(decimals=3)
        tensor([6.])

    References:
        Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", 1992,
        eq. 2.2.
    """
    return es_grad(
        f, sigma, num_samples, sampler=rademacher(), argnums=argnums, nan=nan, chunk_size=chunk_size,
        batching=batching, start=start, reduce=reduce,
    )  # fmt: skip


def summarize(total: Tensor, scale: float | Tensor) -> tuple[Tensor, EstimateInfo]:
    r"""The estimate and what is known of it, from sums over directions.

    Args:
        total: :math:`\sum w_i u_i,\ \sum w_i^2 |u_i / \sigma|^2,\ \sum f_i` and the number of directions, in one
            vector, shape (n + 3,).
        scale: The scale sigma.

    Returns:
        The estimate, shape (n,), and the info.
    """
    sums, squares, losses, count = total[:-3], total[-3], total[-2], total[-1]
    found = sums / count / scale
    square = found @ found
    spread = ((squares / count - square) / (count - 1)).clamp(min=0)
    variance = torch.where(count > 1, spread, torch.nan)  # of one direction it is 0/0 but for rounding
    return found, EstimateInfo(losses / count, variance, (square / variance).sqrt())


def _estimate(options: Options, members: Members, key: Tensor) -> tuple[Tensor, EstimateInfo]:
    sigma = flatten_sigma(options.sigma, members)
    scale = sigma.detach() if isinstance(sigma, Tensor) else sigma
    losses, norms, directions = _probe_all(options, members, key, sigma, scale)
    losses, keep = kept(options, losses)
    loss = keep[:, 0] * members.scalar(mean_of_sides(losses), "es_grad")
    c = options.sampler.scale(members.vector.shape[0])
    weights = (c * keep * _differences(options, members, losses, keep))[:, 0].to(members.vector.dtype)
    sums = _sum(options, members, key, weights, directions)
    squares = (weights * weights) @ norms
    total = torch.cat([sums, torch.stack([squares, loss.sum().to(sums.dtype), keep.sum().to(sums.dtype)])])
    total = total.detach()
    return summarize(total if options.reduce is None else options.reduce(total), scale)


def _probe_all(
    options: Options, members: Members, key: Tensor, sigma: float | Tensor, scale: float | Tensor
) -> tuple[Losses, Tensor, Tensor | None]:
    """The values of all members, the squared norms of all steps, and the directions if they are in one chunk."""
    whole: list[Tensor] = []
    begin, count = 0, options.directions
    for directions, losses in probe(options, members, key, sigma):
        steps = directions / scale
        parts = [side for side in ((steps * steps).sum(1), *losses[:2]) if side is not None]
        if len(directions) == count:
            return losses, parts[0], directions
        # Small tensors that live on between large ones that do not would split the heap: its size would grow.
        whole = whole or [part.new_empty((count, *part.shape[1:])) for part in parts]
        for part, target in zip(parts, whole, strict=True):
            target[begin : begin + len(directions)] = part.detach()
        begin += len(directions)
    return Losses(whole[1], whole[2] if len(whole) > 2 else None, None), whole[0], None


def _differences(options: Options, members: Members, losses: Losses, keep: Tensor) -> Tensor:
    """How much each direction counts, shape (p, 1)."""
    if losses.minus is not None:
        return shape_differences(options, losses.plus - losses.minus) / 2
    if options.method == "forward":
        base: Tensor | float = members(members.vector.detach()[None])[0]
    else:
        base = 0.0 if options.baseline is None else leave_one_out(options, losses.plus, keep)
    return shape_differences(options, losses.plus - base)


def _sum(options: Options, members: Members, key: Tensor, weights: Tensor, directions: Tensor | None) -> Tensor:
    """The weighted sum of all directions, shape (n,)."""
    if directions is not None:
        return weights @ directions
    total = torch.zeros_like(members.vector.detach())
    begin = options.start // 2 if options.paired else options.start
    for first, count in options.chunks():
        part = weights[first - begin : first - begin + count]
        if options.sampler.sum is None:
            total = total + part @ draw(options, members, key, first, count)
        else:
            total = total + options.sampler.sum(key, members.shapes, part, first)
    return total


_NO_DERIVATIVE = (
    "an estimate made of values alone has no derivative: use `smoothed`, whose derivatives of every order are estimates"
)
