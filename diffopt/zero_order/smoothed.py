r"""Smoothed functions: their values, and derivatives that are estimated from values alone.

.. math:: F_\sigma(x) = \mathbb{E}_u\, f(x + \sigma u)
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import hoist
from diffopt.autodiff.levels import derivative_possible
from diffopt.random.keys import check_key
from diffopt.zero_order.differences import leave_one_out, mean_of_sides, shape_differences
from diffopt.zero_order.first_order import refuse
from diffopt.zero_order.members import Evaluate, Members
from diffopt.zero_order.options import (
    Losses,
    Method,
    Options,
    check_options,
    flatten_sigma,
    joined,
    kept,
    probe,
)
from diffopt.zero_order.reduction import sum_over_ranks, take_to_ranks
from diffopt.zero_order.samplers import Sampler, gaussian
from diffopt.zero_order.weights import first_order_alone, weight_changes

__all__ = ["smoothed"]


def smoothed(
    f: Callable[..., Any],
    sigma: Any,
    num_samples: int,
    *,
    method: Method = "antithetic",
    sampler: Sampler | None = None,
    value: Literal["smoothed", "f"] = "smoothed",
    argnums: int | tuple[int, ...] = 0,
    baseline: Literal["leave_one_out"] | None = None,
    control: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    clip: float | None = None,
    sign: bool = False,
    nan: Literal["propagate", "drop", "raise"] = "propagate",
    chunk_size: int | None = None,
    batching: Evaluate = "vmap",
    start: int = 0,
    reduce: Callable[[Tensor], Tensor] | None = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    r"""Smooth a function by noise, with derivatives that need none of its own.

    .. math:: F_\sigma(x) = \mathbb{E}_{u \sim N(0, I)}\, f(x + \sigma u), \qquad
              \nabla F_\sigma(x) = \mathbb{E}\, \frac{f(x + \sigma u) - f(x - \sigma u)}{2 \sigma}\, u

    The value is a mean over samples, and its derivatives, taken by any transform, are the estimates: of every order for
    normal directions (`gaussian`, `orthogonal`), of the first order for others, where the second raises. They do not
    look at derivatives of f in x. Arguments that are not in `argnums`, and tensors that f captured, get the mean of the
    samples' own derivatives. A tensor sigma gets its derivative where directions are normal.

    Args:
        f: Returns a number, a tensor or a tree of them; it need not be differentiable, nor be a function of tensors
            alone.
        sigma: The scale of the noise: a number, a 0-d tensor, or a tree like x of them, for scales of each leaf or each
            number.
        num_samples: How many members are evaluated; an even number for antithetic ones.
        method: "antithetic" probes both sides of each direction; "forward" subtracts f(x), one evaluation more;
            "naive" subtracts nothing, and has a variance that grows with :math:`f^2 / \sigma^2`.
        sampler: The directions. Default: `gaussian()`.
        value: "smoothed" returns the mean over samples, "f" returns f(x), with the same derivatives.
        argnums: The arguments to perturb, trees of floating-point tensors.
        baseline: "leave_one_out" subtracts the mean of the other directions' values. It lowers the variance of "naive",
            and with antithetic samples that of second derivatives and of sigma's.
        control: `(h, mean)`: a function of the same arguments whose smoothed value `mean` is known; `f - h` is
            smoothed, and `mean` added. The closer h is to f, the smaller the variance.
        clip: The largest difference of values (of a pair, or from the baseline) that counts. Biased; first order.
        sign: Whether only the signs of differences count. Biased; first order.
        nan: "propagate" NaN and infinite values, "drop" the directions that gave one and average over the others, or
            "raise".
        chunk_size: How many members to evaluate at once. None evaluates all, and keeps their directions for the
            backward pass; in chunks they are made again.
        batching: "vmap" maps f over members; "sequential" calls it for one after the other, with plain tensors, so that
            it may use `.item()` or NumPy; "batched" calls it once, with a leading dimension of members on the perturbed
            arguments, and of its value.
        start: The first sample, where the population is spread: the rank r takes num_samples from r * num_samples.
        reduce: Sums a tensor over ranks, out of place; with it, values and gradients are those of the whole population
            on every rank.
        has_aux: Whether f returns `(value, aux)`; the tensors of aux come back with a leading dimension of members,
            first those of plus sides, without derivative.

    Returns:
        `F(key, *args, **kwargs)`, the estimate of the smoothed function, or `(F, aux)`. The same key gives the same
        noise: use it again for common random numbers, and `random.fold_in` the step for fresh ones.

    Raises:
        TypeError: If an option or x is of the wrong type, such as integers.
        ValueError: If sigma is not positive, antithetic samples are odd, or options do not fit together.
        FloatingPointError: With nan="raise", if a value is NaN or infinite.
        RuntimeError: When a derivative is asked for that the sampler does not have.

    Example:
        >>> F = smoothed(lambda x: (x > 0).sum(), 1.0, 10_000)  # a step, whose smoothed slope at 0 is 0.3989
        >>> torch.func.grad(F, argnums=1)(torch.tensor([42, 0]), torch.tensor([0.0])).round(decimals=1)
        tensor([0.4000])

    References:
        Nesterov and Spokoiny, "Random gradient-free minimization of convex functions", 2017, eq. 26. Mohamed et al.,
        "Monte Carlo gradient estimation in machine learning", 2020, sections 4 and 7.
    """
    options = Options(
        sigma, num_samples, gaussian() if sampler is None else sampler, method, baseline, clip, sign, nan, chunk_size,
        batching, start, reduce,
    )  # fmt: skip
    check_options(options)
    if value not in ("smoothed", "f"):
        raise ValueError(f'`value` must be "smoothed" or "f"; got {value!r}')
    if control is not None:
        return _controlled(f, control, has_aux, functools.partial(_smooth, options, value, argnums))
    return _smooth(options, value, argnums, f, has_aux)


def _smooth(options: Options, value: str, argnums: Any, f: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    @functools.wraps(f)
    def estimate(key: Tensor, *args: Any, **kwargs: Any) -> Any:
        check_key(key)
        args, kwargs = _shared(options, f, args, kwargs)
        members = Members(f, args, kwargs, argnums=argnums, batching=options.batching, has_aux=has_aux)
        sigma = take_to_ranks(flatten_sigma(options.sigma, members), options.reduce)
        row, aux = _estimate(options, members, key, sigma)
        if value == "f":
            row = _center(members).detach() + (row - row.detach())
        out = members.restore(row)
        return (out, aux) if has_aux else out

    return estimate


def _estimate(options: Options, members: Members, key: Tensor, sigma: float | Tensor) -> tuple[Tensor, Any]:
    """The mean of the values, with the estimates as its derivatives, shape (k,), and the aux."""
    found, directions = [], None
    for directions, losses in probe(options, members, key, sigma):  # noqa: B007
        found.append(losses)
    losses, keep = kept(options, joined(found))
    sums = (keep * mean_of_sides(losses)).sum(0)
    held = [members.vector, *options.sampler.tensors, *([sigma] if isinstance(sigma, Tensor) else [])]
    if torch.compiler.is_compiling() or derivative_possible(held):
        weights = weight_changes(options, members, key, sigma, directions if len(found) == 1 else None)
        sums = sums + (keep * _moves(options, members, losses, keep, weights)).sum(0)
    total = sum_over_ranks(torch.cat([sums, keep.sum(0)]), options.reduce)
    row = total[:-1] / total[-1]
    if first_order_alone(options):
        row = refuse(row, *held[1:], message=_NO_DERIVATIVE)
    return row, losses.aux


def _moves(options: Options, members: Members, losses: Losses, keep: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """What carries the derivative: zeros, of the differences of values times the weights' changes."""
    plus, minus = losses.plus, losses.minus
    if not first_order_alone(options):
        base = _baseline(options, members, losses, keep)
        changes = [w.to(plus.dtype)[:, None] for w in weights]
        if minus is None:
            return (plus - base) * changes[0]
        return ((plus - base) * changes[0] + (minus - base) * changes[1]) / 2
    difference = plus - (_baseline(options, members, losses, keep) if minus is None else minus)
    shaped = shape_differences(options, difference) / (1 if minus is None else 2)
    return shaped * weights[0].to(plus.dtype)[:, None]


def _baseline(options: Options, members: Members, losses: Losses, keep: Tensor) -> Tensor | float:
    if options.method == "forward":
        return _center(members)
    return 0.0 if options.baseline is None else leave_one_out(options, mean_of_sides(losses), keep)


def _center(members: Members) -> Tensor:
    """The value at x itself, of which no derivative passes to x."""
    return members(members.vector.detach()[None])[0][0]


def _controlled(f, control, has_aux, smooth) -> Callable[..., Any]:
    h, mean = control

    @functools.wraps(f)
    def difference(*args: Any, **kwargs: Any) -> Any:
        out = f(*args, **kwargs)
        value, aux = out if has_aux else (out, None)
        value = tree.map(lambda a, b: a - b, value, h(*args, **kwargs))
        return (value, aux) if has_aux else value

    estimate = smooth(difference, has_aux)

    @functools.wraps(f)
    def controlled(key: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = estimate(key, *args, **kwargs)
        value, aux = out if has_aux else (out, None)
        value = tree.map(torch.add, value, mean(*args, **kwargs))
        return (value, aux) if has_aux else value

    return controlled


def _shared(options: Options, f: Callable[..., Any], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments, whose gradients on all ranks are summed."""
    if options.reduce is None:
        return args, kwargs
    if hoist(f).captured:
        raise ValueError(
            "with `reduce`, the function may not capture tensors that carry gradient or a batch dimension: each rank "
            "would see its share of their gradient alone. Pass them as arguments"
        )
    tensors, merge = tree.partition((args, kwargs))
    return merge([take_to_ranks(x, options.reduce) for x in tensors])


_NO_DERIVATIVE = (
    "this estimate has no derivative in sigma, or in a tensor of its sampler: detach it, or use sampler=gaussian() or "
    "orthogonal() without `clip` and `sign` for that in sigma"
)
