"""What needs the new parameters: a constraint on them, and their average."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms.base import EmptyState, GradientTransformation
from diffopt.transforms.leafwise import leafwise, need_params
from diffopt.transforms.leaves import (
    as_dtype,
    check_hyperparameter,
    flatten_floating,
    flatten_like,
    precise_dtype,
    zero_count,
)
from diffopt.typing import Numeric, Tree

__all__ = ["PolyakAverageState", "keep_params_nonnegative", "polyak_average"]


class PolyakAverageState(NamedTuple):
    """The state of `polyak_average`.

    Attributes:
        count: Steps taken, an int64 0-d tensor.
        average: The average of the parameters, a tree like them (float32 for 16-bit leaves).
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    average: Tree


def keep_params_nonnegative() -> GradientTransformation:
    r"""Shorten updates that would make a parameter negative: :math:`u = \max(g, -\theta)`.

    It belongs at the end of a chain. Parameters that start nonnegative stay so.

    Returns:
        A stateless transformation, whose update needs ``params`` and keeps dtypes.

    Raises:
        ValueError: In update, if it gets no params.

    Example:
        >>> keep_params_nonnegative().update(torch.tensor([-2.0, -0.5]), EmptyState(), torch.ones(2))[0]
        tensor([-1.0000, -0.5000])
    """

    def rule(g, p):
        return (torch.where(p + g < 0, -p, g),)

    return leafwise(EmptyState, rule, lambda count: (), takes_params="keep_params_nonnegative")


def polyak_average(decay: Numeric | None = None) -> GradientTransformation:
    r"""Pass the updates through, and keep the average of the parameters after them in the state.

    .. math::
        \bar\theta_t = \bar\theta_{t-1} + \tfrac1t (\theta_{t-1} + u_t - \bar\theta_{t-1})
        \ \text{ or, with a decay, } \ \gamma \bar\theta_{t-1} + (1 - \gamma) (\theta_{t-1} + u_t),
        \qquad \bar\theta_0 = \theta_0

    It belongs at the end of a chain: ``state[-1].average`` is then the average.

    Args:
        decay: The decay :math:`\gamma`, in [0, 1), a number or a 0-d tensor. Default: the plain mean of all
            parameters after the first step.

    Returns:
        A transformation with `PolyakAverageState`, whose update needs ``params``.

    Raises:
        TypeError: If decay is neither a number nor a floating-point tensor.
        ValueError: If decay is out of range, or a tensor with dimensions; in update, if it gets no params.

    Example:
        >>> t, x = polyak_average(), torch.tensor([2.0])
        >>> _, state = t.update(torch.tensor([1.0]), t.init(x), x)
        >>> t.update(torch.tensor([2.0]), state, x + 1)[1].average
        tensor([4.])

    References:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
        Optimization, 1992.
    """
    if decay is not None:
        check_hyperparameter("decay", decay, at_least=0.0, below=1.0)

    def init(params: Tree) -> PolyakAverageState:
        leaves, treespec = flatten_floating(params, "params")
        start = [leaf.to(precise_dtype(leaf.dtype), copy=True) for leaf in leaves]
        return PolyakAverageState(zero_count(leaves), tree.unflatten(treespec, start))

    def update(
        updates: Tree, state: PolyakAverageState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, PolyakAverageState]:
        grads, treespec = flatten_floating(updates, "updates")
        leaves = flatten_like(need_params(params, "polyak_average"), grads, treespec, name="params")
        averages = flatten_like(state.average, grads, treespec, name="state.average")
        count = state.count + 1
        weight = 1 / count.to(torch.float64) if decay is None else 1 - decay
        new = []
        for g, p, average in zip(grads, leaves, averages, strict=True):
            dtype = average.dtype
            new.append(average + as_dtype(weight, dtype) * (p.to(dtype) + g.to(dtype) - average))
        return updates, PolyakAverageState(count, tree.unflatten(treespec, new))

    return GradientTransformation(init, update)
