r"""Schedules of powers and exponentials: constant, polynomial, linear, exponential, piecewise constant.

A schedule is a pure function of the step count, an int64 tensor that starts at 0; it returns a float64 tensor of the
count's shape and is differentiable in its own parameters.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.typing import Numeric, Schedule

__all__ = [
    "constant_schedule",
    "exponential_decay",
    "linear_schedule",
    "piecewise_constant_schedule",
    "polynomial_schedule",
    "progress",
    "raised",
]


def constant_schedule(value: Numeric) -> Schedule:
    r"""Keep one value: :math:`s(t) = v`.

    Args:
        value: The value v, a number or a 0-d tensor.

    Returns:
        The schedule.

    Raises:
        TypeError: If value is neither a number nor a floating-point tensor.
        ValueError: If value is a tensor with dimensions.

    Example:
        >>> constant_schedule(0.1)(torch.tensor(7))
        tensor(0.1000, dtype=torch.float64)
    """
    check_hyperparameter("value", value)
    return lambda count: torch.zeros_like(_real(count)) + value


def polynomial_schedule(
    init_value: Numeric,
    end_value: Numeric,
    power: Numeric,
    transition_steps: Numeric,
    transition_begin: Numeric = 0,
) -> Schedule:
    r"""Go from one value to another along a power of the remaining time.

    .. math::
        s(t) = v_1 + (v_0 - v_1) (1 - \tau)^p, \qquad
        \tau = \text{clip}\left(\frac{t - t_0}{T}, 0, 1\right)

    Args:
        init_value: The value :math:`v_0` until the transition begins; like all five a number or a 0-d tensor.
        end_value: The value :math:`v_1` after it.
        power: The power p, above 0.
        transition_steps: The length T of the transition in steps, above 0.
        transition_begin: The step :math:`t_0` at which it begins, at least 0.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> polynomial_schedule(1.0, 0.0, power=2, transition_steps=4)(torch.arange(6))
        tensor([1.0000, 0.5625, 0.2500, 0.0625, 0.0000, 0.0000], dtype=torch.float64)
    """
    check_hyperparameter("init_value", init_value)
    check_hyperparameter("end_value", end_value)
    check_hyperparameter("power", power, above=0.0)
    check_hyperparameter("transition_steps", transition_steps, above=0.0)
    check_hyperparameter("transition_begin", transition_begin, at_least=0.0)

    def schedule(count: Tensor) -> Tensor:
        left = 1 - progress(count, transition_begin, transition_steps)
        return end_value + (init_value - end_value) * raised(left, power)

    return schedule


def linear_schedule(
    init_value: Numeric, end_value: Numeric, transition_steps: Numeric, transition_begin: Numeric = 0
) -> Schedule:
    r"""Go from one value to another along a line.

    .. math:: s(t) = v_0 + (v_1 - v_0)\, \text{clip}\left(\frac{t - t_0}{T}, 0, 1\right)

    Args:
        init_value: The value :math:`v_0` until the transition begins; like all four a number or a 0-d tensor.
        end_value: The value :math:`v_1` after it.
        transition_steps: The length T of the transition in steps, above 0.
        transition_begin: The step :math:`t_0` at which it begins, at least 0.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> linear_schedule(0.0, 1.0, transition_steps=4)(torch.arange(6))
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000, 1.0000], dtype=torch.float64)
    """
    return polynomial_schedule(init_value, end_value, 1, transition_steps, transition_begin)


def exponential_decay(
    init_value: Numeric,
    transition_steps: Numeric,
    decay_rate: Numeric,
    transition_begin: Numeric = 0,
    *,
    staircase: bool = False,
    end_value: Numeric | None = None,
) -> Schedule:
    r"""Multiply by a rate every so many steps.

    .. math:: s(t) = v_0\, r^{\tau}, \qquad \tau = \max\left(\frac{t - t_0}{T}, 0\right)

    Args:
        init_value: The value :math:`v_0` until the decay begins; like all a number or a 0-d tensor.
        transition_steps: The number T of steps in which the value is multiplied by r once, above 0.
        decay_rate: The rate r, above 0.
        transition_begin: The step :math:`t_0` at which the decay begins, at least 0.
        staircase: Whether to round :math:`\tau` down. The derivative in T and :math:`t_0` is then 0.
        end_value: The value at which to stop: a lower bound if r < 1, else an upper bound. Default: none.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> exponential_decay(1.0, transition_steps=2, decay_rate=0.25)(torch.arange(4))
        tensor([1.0000, 0.5000, 0.2500, 0.1250], dtype=torch.float64)
    """
    check_hyperparameter("init_value", init_value)
    check_hyperparameter("transition_steps", transition_steps, above=0.0)
    check_hyperparameter("decay_rate", decay_rate, above=0.0)
    check_hyperparameter("transition_begin", transition_begin, at_least=0.0)
    if end_value is not None:
        check_hyperparameter("end_value", end_value)

    def schedule(count: Tensor) -> Tensor:
        t = ((_real(count) - transition_begin) / transition_steps).clamp(min=0.0)
        rate = torch.zeros_like(t) + decay_rate
        value = init_value * rate ** (t.floor() if staircase else t)
        if end_value is None:
            return value
        end = torch.zeros_like(t) + end_value
        return torch.where(rate < 1, torch.maximum(value, end), torch.minimum(value, end))

    return schedule


def piecewise_constant_schedule(
    init_value: Numeric, boundaries_and_scales: Mapping[int, Numeric] | None = None
) -> Schedule:
    r"""Multiply by a scale at each of some steps.

    .. math:: s(t) = v_0 \prod_{k:\, t \ge b_k} c_k

    Args:
        init_value: The first value :math:`v_0`, a number or a 0-d tensor.
        boundaries_and_scales: From steps :math:`b_k` to scales :math:`c_k`, numbers or 0-d tensors. Default: none.

    Returns:
        The schedule.

    Raises:
        TypeError: If a value is neither a number nor a floating-point tensor.
        ValueError: If a boundary is negative, or a tensor has dimensions.

    Example:
        >>> piecewise_constant_schedule(1.0, {2: 0.5, 4: 0.1})(torch.arange(6))
        tensor([1.0000, 1.0000, 0.5000, 0.5000, 0.0500, 0.0500], dtype=torch.float64)
    """
    check_hyperparameter("init_value", init_value)
    scales = dict(boundaries_and_scales or {})
    for boundary, scale in scales.items():
        check_hyperparameter("boundary", boundary, at_least=0.0)
        check_hyperparameter(f"boundaries_and_scales[{boundary}]", scale)

    def schedule(count: Tensor) -> Tensor:
        value = torch.zeros_like(_real(count)) + init_value
        for boundary, scale in scales.items():
            value = torch.where(count >= boundary, value * scale, value)
        return value

    return schedule


def progress(count: Tensor, begin: Numeric, steps: Numeric) -> Tensor:
    """Give the fraction of a transition that is over, in [0, 1]: clip((t - begin) / steps, 0, 1)."""
    return ((_real(count) - begin) / steps).clamp(0.0, 1.0)


def raised(base: Tensor, exponent: Numeric) -> Tensor:
    """Raise to a power above 0, with derivatives that are 0, not infinite or NaN, where the base is 0."""
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1.0) ** exponent, 0.0)


def _real(count: Tensor) -> Tensor:
    return count.to(torch.float64)
