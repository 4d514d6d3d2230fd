"""Schedule-free descent: an average in place of a schedule."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms import GradientTransformation, identity
from diffopt.transforms.leafwise import need_params
from diffopt.transforms.leaves import (
    as_dtype,
    check_hyperparameter,
    flatten_floating,
    flatten_like,
    precise_dtype,
    zero_count,
)
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["ScheduleFreeState", "schedule_free"]


class ScheduleFreeState(NamedTuple):
    """The state of `schedule_free`.

    Attributes:
        count: Steps taken, an int64 0-d tensor.
        weight_sum: The sum of the weights of the average, a float64 0-d tensor.
        max_rate: The largest learning rate so far, a float64 0-d tensor.
        z: The iterates of the base, a tree like the parameters (float32 for 16-bit leaves).
        x: Their average, likewise: the parameters to evaluate.
        base_state: The state of the base.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    weight_sum: Tensor
    max_rate: Tensor
    z: Tree
    x: Tree
    base_state: Any


def schedule_free(
    learning_rate: Numeric | Schedule,
    b1: Numeric = 0.9,
    *,
    base: GradientTransformation | None = None,
    weight_lr_power: Numeric = 2.0,
) -> GradientTransformation:
    r"""Descend on one sequence, average it, and take gradients between the two.

    .. math::
        z_{t+1} = z_t - \alpha_t\, \text{base}(\nabla f(y_t)), \quad
        x_{t+1} = (1 - c_t) x_t + c_t z_{t+1}, \quad y_{t+1} = (1 - b_1) z_{t+1} + b_1 x_{t+1}, \\
        c_t = \frac{w_t}{\sum_{s \le t} w_s}, \qquad w_t = \left(\max_{s \le t} \alpha_s\right)^p

    The parameters of the training loop are y; those to evaluate are x, in the state. The maximum is that of the
    authors' code: the paper's weights are powers of the rate itself, which is the same until the rate falls.

    Args:
        learning_rate: The rate :math:`\alpha`, above 0, a number, a 0-d tensor or a schedule for the warm-up.
        b1: The weight of the average in y, in [0, 1), a number or a 0-d tensor.
        base: What scales the gradient, without momentum: such as ``scale_by_adam(b1=0.0)`` for the paper's
            AdamW. Default: nothing, for SGD.
        weight_lr_power: The power p of the learning rate in the weights of the average, at least 0.

    Returns:
        A transformation with `ScheduleFreeState`, whose update needs ``params``.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions; in update, if it gets no params.

    Example:
        >>> from diffopt.transforms import step
        >>> optimizer, y = schedule_free(0.1), torch.tensor([1.0])
        >>> y, state = step(optimizer, 2 * y, optimizer.init(y), y)
        >>> y, state.x
        (tensor([0.8000]), tensor([0.8000]))

    References:
        Defazio et al., "The Road Less Scheduled", NeurIPS 2024, algorithm 1.
    """
    if not callable(learning_rate):
        check_hyperparameter("learning_rate", learning_rate, above=0.0)
    check_hyperparameter("b1", b1, at_least=0.0, below=1.0)
    check_hyperparameter("weight_lr_power", weight_lr_power, at_least=0.0)
    inner = identity() if base is None else base

    def init(params: Tree) -> ScheduleFreeState:
        leaves, treespec = flatten_floating(params, "params")
        z, x = (
            tree.unflatten(treespec, [leaf.to(precise_dtype(leaf.dtype), copy=True) for leaf in leaves])
            for _ in range(2)
        )
        count = zero_count(leaves)
        weight_sum, max_rate = (torch.zeros_like(count, dtype=torch.float64) for _ in range(2))
        return ScheduleFreeState(count, weight_sum, max_rate, z, x, inner.init(params))

    def update(
        updates: Tree, state: ScheduleFreeState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ScheduleFreeState]:
        directions, base_state = inner.update(updates, state.base_state, need_params(params, "schedule_free"), **extra)
        grads, treespec = flatten_floating(directions, "updates")
        ys, zs, xs = (
            flatten_like(other, grads, treespec, name=name)
            for name, other in (("params", params), ("state.z", state.z), ("state.x", state.x))
        )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = torch.zeros_like(state.max_rate) + rate
        max_rate = torch.where(rate > state.max_rate, rate, state.max_rate)
        weight = max_rate**weight_lr_power
        weight_sum = state.weight_sum + weight
        # A rate of 0 at the start of a warm-up weighs nothing, and not 0/0.
        c = torch.where(weight_sum > 0, weight / torch.where(weight_sum > 0, weight_sum, 1.0), 0.0)
        out, new_z, new_x = [], [], []
        for g, y, z, x in zip(grads, ys, zs, xs, strict=True):
            alpha, share, b = (as_dtype(s, z.dtype) for s in (rate, c, b1))
            z = z - alpha * g.to(z.dtype)
            x = (1 - share) * x + share * z
            out.append(((1 - b) * z + b * x - y.to(z.dtype)).to(g.dtype))
            new_z.append(z)
            new_x.append(x)
        new = (tree.unflatten(treespec, leaves) for leaves in (out, new_z, new_x))
        out, z, x = new
        return out, ScheduleFreeState(state.count + 1, weight_sum, max_rate, z, x, base_state)

    return GradientTransformation(init, update)
