"""Updates times a scalar: a constant, a learning rate, or a schedule of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from diffopt import tree
from diffopt.transforms.base import EmptyState, GradientTransformation
from diffopt.transforms.leaves import as_dtype, check_hyperparameter, flatten_floating, precise_dtype, zero_count
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["ScaleByScheduleState", "scale", "scale_by_learning_rate", "scale_by_schedule"]


class ScaleByScheduleState(NamedTuple):
    """The state of `scale_by_schedule`, and of `scale_by_learning_rate` with a schedule.

    Attributes:
        count: Steps taken, an int64 0-d tensor.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


def scale(step_size: Numeric) -> GradientTransformation:
    r"""Multiply the updates by a scalar: :math:`u_t = c\, g_t`.

    Args:
        step_size: The scalar c, a number or a 0-d tensor.

    Returns:
        A stateless transformation, whose updates keep their dtypes.

    Raises:
        TypeError: If step_size is neither a number nor a floating-point tensor.
        ValueError: If step_size is a tensor with dimensions.

    Example:
        >>> import torch
        >>> scale(-0.5).update(torch.ones(2), EmptyState())
        (tensor([-0.5000, -0.5000]), EmptyState())
    """
    check_hyperparameter("step_size", step_size)

    def init(params: Tree) -> EmptyState:
        flatten_floating(params, "params")
        return EmptyState()

    def update(updates: Tree, state: EmptyState, params: Tree | None = None, **extra: Any) -> tuple[Tree, EmptyState]:
        return _scaled(updates, step_size), state

    return GradientTransformation(init, update)


def scale_by_learning_rate(learning_rate: Numeric | Schedule) -> GradientTransformation:
    r"""Multiply the updates by minus the learning rate: :math:`u_t = -\alpha_t\, g_t`.

    A negative learning rate ascends.

    Args:
        learning_rate: The rate, a number or a 0-d tensor; or a schedule, a function of the steps taken so far
            (an int64 0-d tensor that starts at 0).

    Returns:
        A transformation that is stateless, or with a schedule has `ScaleByScheduleState`.

    Raises:
        TypeError: If the rate is neither a number nor a floating-point tensor.
        ValueError: If the rate is a tensor with dimensions.

    Example:
        >>> import torch
        >>> halving = scale_by_learning_rate(lambda count: 0.5**count)
        >>> state = halving.init(torch.ones(1))
        >>> for _ in range(3):
        ...     updates, state = halving.update(torch.ones(1), state)
        >>> updates, state.count
        (tensor([-0.2500]), tensor(3))
    """
    if not callable(learning_rate):
        check_hyperparameter("learning_rate", learning_rate)
        return scale(-learning_rate)
    return _scale_by_schedule(learning_rate, -1, "learning_rate")


def scale_by_schedule(step_size: Schedule) -> GradientTransformation:
    r"""Multiply the updates by a scalar that depends on the step: :math:`u_t = c(t)\, g_t`.

    Args:
        step_size: The schedule c, a function of the steps taken so far (an int64 0-d tensor that starts at 0).

    Returns:
        A transformation with `ScaleByScheduleState`, whose updates keep their dtypes.

    Raises:
        TypeError: If step_size is not callable; in update, if it gives neither a number nor a floating-point tensor.
        ValueError: In update, if the schedule gives a tensor with dimensions.

    Example:
        >>> import torch
        >>> halving = scale_by_schedule(lambda count: 0.5**count)
        >>> halving.update(torch.ones(1), ScaleByScheduleState(torch.tensor(2)))[0]
        tensor([0.2500])
    """
    if not callable(step_size):
        raise TypeError(f"`step_size` must be a schedule; got {type(step_size).__name__}. Use `scale` for a constant.")
    return _scale_by_schedule(step_size, 1, "step_size")


def _scale_by_schedule(schedule: Callable[[Tensor], Numeric], sign: int, name: str) -> GradientTransformation:
    def init(params: Tree) -> ScaleByScheduleState:
        return ScaleByScheduleState(zero_count(flatten_floating(params, "params")[0]))

    def update(
        updates: Tree, state: ScaleByScheduleState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ScaleByScheduleState]:
        rate = schedule(state.count)
        check_hyperparameter(f"{name}(count)", rate)
        return _scaled(updates, sign * rate), ScaleByScheduleState(state.count + 1)

    return GradientTransformation(init, update)


def _scaled(updates: Tree, factor: Numeric) -> Tree:
    leaves, treespec = flatten_floating(updates, "updates")
    scaled = []
    for leaf in leaves:
        dtype = precise_dtype(leaf.dtype)
        scaled.append((leaf.to(dtype) * as_dtype(factor, dtype)).to(leaf.dtype))
    return tree.unflatten(treespec, scaled)
