"""Sums over ranks that derivatives pass: a sum forward, and the sum of what the ranks found backward."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffopt.autodiff.custom_derivative import Rules, by_rule

__all__ = ["sum_over_ranks", "take_to_ranks"]

Reduce = Callable[[Tensor], Tensor]


def sum_over_ranks(x: Tensor, reduce: Reduce | None) -> Tensor:
    """Sum a tensor over ranks; every rank goes on with the same sum, and so has the same cotangent.

    Args:
        x: This rank's share.
        reduce: Sums a tensor over ranks, out of place; None where there is one rank.

    Returns:
        The sum.

    Example:
        >>> import torch
        >>> torch.func.grad(lambda x: sum_over_ranks(x, lambda x: 2 * x))(torch.tensor(3.0))
        tensor(1.)
    """
    if reduce is None:
        return x

    def vjp(inputs, outputs, cotangents, wanted):
        return (take_to_ranks(cotangents[0], reduce),)

    def jvp(inputs, outputs, tangents):
        return (sum_over_ranks(tangents[0], reduce),)

    return by_rule(Rules(lambda x: (reduce(x),), vjp, jvp, _folded))(x)[0]


def take_to_ranks(x: Any, reduce: Reduce | None) -> Any:
    """Pass on a tensor that all ranks hold, whose gradient is the sum of what the ranks find.

    Args:
        x: A tensor that is the same on every rank; what is not a floating-point tensor is returned as it is.
        reduce: As in `sum_over_ranks`.

    Returns:
        The tensor.

    Example:
        >>> import torch
        >>> torch.func.grad(lambda x: take_to_ranks(x, lambda x: 2 * x))(torch.tensor(3.0))
        tensor(2.)
    """
    if reduce is None or not (isinstance(x, Tensor) and x.is_floating_point()):
        return x

    def vjp(inputs, outputs, cotangents, wanted):
        return (sum_over_ranks(cotangents[0], reduce),)

    def jvp(inputs, outputs, tangents):
        return (take_to_ranks(tangents[0], reduce),)

    return by_rule(Rules(lambda x: (x.clone(),), vjp, jvp, "vmap"))(x)[0]


def _folded(primal, dims, size):
    """The sum of a batch: one call for all lanes."""

    def run(x):
        return primal(x.expand(size, *x.shape) if dims[0] is None else x.movedim(dims[0], 0))

    return run
