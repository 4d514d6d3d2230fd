"""The one-cycle policy: up to a peak, down again, and on to nearly nothing."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.schedules.polynomial import progress
from diffopt.typing import Numeric, Schedule

__all__ = ["cosine_onecycle_schedule", "linear_onecycle_schedule"]


def linear_onecycle_schedule(
    transition_steps: Numeric,
    peak_value: Numeric,
    pct_start: Numeric = 0.3,
    pct_final: Numeric = 0.85,
    *,
    div_factor: Numeric = 25.0,
    final_div_factor: Numeric = 1e4,
) -> Schedule:
    r"""Follow a one-cycle policy of three lines.

    .. math:: s:\quad v / d \ (t = 0), \quad v \ (t = p_s T), \quad v / d \ (t = p_f T), \quad v / (d f) \ (t \ge T)

    The boundaries are not rounded to whole steps, so that the schedule is differentiable in them.

    Args:
        transition_steps: The length T of the cycle in steps, above 0; like all six a number or a 0-d tensor.
        peak_value: The peak v.
        pct_start: The fraction :math:`p_s` of the cycle at which the peak is reached, in (0, 1).
        pct_final: The fraction :math:`p_f` at which the first value is reached again, above pct_start and below 1.
        div_factor: The peak over the first value, d, above 0.
        final_div_factor: The first value over the last, f, above 0.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> linear_onecycle_schedule(4, 1.0, 0.25, 0.75, div_factor=2, final_div_factor=5)(torch.arange(5))
        tensor([0.5000, 1.0000, 0.7500, 0.5000, 0.1000], dtype=torch.float64)

    References:
        Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018.
    """
    _check(transition_steps, peak_value, pct_start, div_factor, final_div_factor)
    check_hyperparameter("pct_final", pct_final, above=0.0, below=1.0)
    check_hyperparameter("pct_final - pct_start", pct_final - pct_start, above=0.0)
    first, last = peak_value / div_factor, peak_value / (div_factor * final_div_factor)
    steps = (0, pct_start * transition_steps, pct_final * transition_steps, transition_steps)
    return _interpolate(lambda t: t, (first, peak_value, first, last), steps)


def cosine_onecycle_schedule(
    transition_steps: Numeric,
    peak_value: Numeric,
    pct_start: Numeric = 0.3,
    *,
    div_factor: Numeric = 25.0,
    final_div_factor: Numeric = 1e4,
) -> Schedule:
    r"""Follow a one-cycle policy of two half cosines.

    .. math:: s:\quad v / d \ (t = 0), \quad v \ (t = p_s T), \quad v / (d f) \ (t \ge T)

    The boundary is not rounded to a whole step, so that the schedule is differentiable in it.

    Args:
        transition_steps: The length T of the cycle in steps, above 0; like all five a number or a 0-d tensor.
        peak_value: The peak v.
        pct_start: The fraction :math:`p_s` of the cycle at which the peak is reached, in (0, 1).
        div_factor: The peak over the first value, d, above 0.
        final_div_factor: The first value over the last, f, above 0.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> cosine_onecycle_schedule(4, 1.0, 0.5, div_factor=2, final_div_factor=5)(torch.arange(5))
        tensor([0.5000, 0.7500, 1.0000, 0.5500, 0.1000], dtype=torch.float64)

    References:
        Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018.
    """
    _check(transition_steps, peak_value, pct_start, div_factor, final_div_factor)
    values = (peak_value / div_factor, peak_value, peak_value / (div_factor * final_div_factor))
    steps = (0, pct_start * transition_steps, transition_steps)
    return _interpolate(lambda t: 0.5 * (1 - torch.cos(math.pi * t)), values, steps)


def _check(
    transition_steps: Numeric,
    peak_value: Numeric,
    pct_start: Numeric,
    div_factor: Numeric,
    final_div_factor: Numeric,
) -> None:
    check_hyperparameter("transition_steps", transition_steps, above=0.0)
    check_hyperparameter("peak_value", peak_value)
    check_hyperparameter("pct_start", pct_start, above=0.0, below=1.0)
    check_hyperparameter("div_factor", div_factor, above=0.0)
    check_hyperparameter("final_div_factor", final_div_factor, above=0.0)


def _interpolate(ease: Callable[[Tensor], Tensor], values: Sequence[Numeric], steps: Sequence[Numeric]) -> Schedule:
    def schedule(count: Tensor) -> Tensor:
        out = torch.zeros_like(count, dtype=torch.float64) + values[0]
        for i in range(len(values) - 1):
            out = out + (values[i + 1] - values[i]) * ease(progress(count, steps[i], steps[i + 1] - steps[i]))
        return out

    return schedule
