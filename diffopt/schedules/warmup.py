"""A rise along a line to a peak, then a constant or an exponential decay."""

from diffopt.schedules.join import join_schedules
from diffopt.schedules.polynomial import exponential_decay, linear_schedule
from diffopt.typing import Numeric, Schedule

__all__ = ["warmup_constant_schedule", "warmup_exponential_decay_schedule"]


def warmup_constant_schedule(init_value: Numeric, peak_value: Numeric, warmup_steps: Numeric) -> Schedule:
    r"""Rise along a line, then stay.

    .. math:: s(t) = v_0 + (v_p - v_0) \min(t / T_w, 1)

    Args:
        init_value: The first value :math:`v_0`; like all three a number or a 0-d tensor.
        peak_value: The last value :math:`v_p`.
        warmup_steps: The length :math:`T_w` of the warm-up in steps, above 0.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> warmup_constant_schedule(0.0, 1.0, warmup_steps=2)(torch.arange(4))
        tensor([0.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    return linear_schedule(init_value, peak_value, warmup_steps)


def warmup_exponential_decay_schedule(
    init_value: Numeric,
    peak_value: Numeric,
    warmup_steps: Numeric,
    transition_steps: Numeric,
    decay_rate: Numeric,
    *,
    transition_begin: Numeric = 0,
    staircase: bool = False,
    end_value: Numeric | None = None,
) -> Schedule:
    r"""Rise along a line, then decay exponentially.

    .. math::
        s(t) = v_0 + (v_p - v_0)\, t / T_w \ (t < T_w), \qquad v_p\, r^{\max((t - T_w - t_0) / T,\, 0)}

    Args:
        init_value: The first value :math:`v_0`; like all a number or a 0-d tensor.
        peak_value: The value :math:`v_p` at the end of the warm-up.
        warmup_steps: The length :math:`T_w` of the warm-up in steps, above 0.
        transition_steps: The number T of steps in which the value is multiplied by r once, above 0.
        decay_rate: The rate r, above 0.
        transition_begin: The step :math:`t_0` after the warm-up at which the decay begins, at least 0.
        staircase: Whether to round the exponent down.
        end_value: The value at which to stop, as in `exponential_decay`. Default: none.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> import torch
        >>> warmup_exponential_decay_schedule(0.0, 1.0, 2, 1, 0.5)(torch.arange(5))
        tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    rise = linear_schedule(init_value, peak_value, warmup_steps)
    decay = exponential_decay(
        peak_value, transition_steps, decay_rate, transition_begin, staircase=staircase, end_value=end_value
    )
    return join_schedules([rise, decay], [warmup_steps])
