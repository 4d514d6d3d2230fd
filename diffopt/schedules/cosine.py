"""Schedules along half a cosine, once or with restarts."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.schedules.join import join_schedules
from diffopt.schedules.polynomial import linear_schedule, progress, raised
from diffopt.typing import Numeric, Schedule

__all__ = ["cosine_decay_schedule", "sgdr_schedule", "warmup_cosine_decay_schedule"]


def cosine_decay_schedule(
    init_value: Numeric, decay_steps: Numeric, alpha: Numeric = 0.0, exponent: Numeric = 1.0
) -> Schedule:
    r"""Decay along half a cosine.

    .. math::
        s(t) = v_0 \left((1 - \alpha) \left(\tfrac12 (1 + \cos \pi \tau)\right)^p + \alpha\right), \qquad
        \tau = \min(t / T, 1)

    Args:
        init_value: The first value :math:`v_0`; like all four a number or a 0-d tensor.
        decay_steps: The length T of the decay in steps, above 0.
        alpha: The last value as a fraction of the first.
        exponent: The power p of the cosine, above 0.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> cosine_decay_schedule(1.0, decay_steps=4)(torch.arange(5))
        tensor([1.0000, 0.8536, 0.5000, 0.1464, 0.0000], dtype=torch.float64)

    References:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, eq. 5.
    """
    check_hyperparameter("init_value", init_value)
    check_hyperparameter("decay_steps", decay_steps, above=0.0)
    check_hyperparameter("alpha", alpha)
    check_hyperparameter("exponent", exponent, above=0.0)
    return _half_cosine(init_value, init_value * alpha, decay_steps, exponent)


def warmup_cosine_decay_schedule(
    init_value: Numeric,
    peak_value: Numeric,
    warmup_steps: Numeric,
    decay_steps: Numeric,
    end_value: Numeric = 0.0,
    *,
    exponent: Numeric = 1.0,
) -> Schedule:
    r"""Rise along a line, then decay along half a cosine.

    .. math::
        s(t) = v_0 + (v_p - v_0)\, t / T_w \ (t < T_w), \qquad
        v_1 + (v_p - v_1) \left(\tfrac12 (1 + \cos \pi \tau)\right)^p, \quad
        \tau = \min\left(\frac{t - T_w}{T - T_w}, 1\right)

    Args:
        init_value: The first value :math:`v_0`; like all six a number or a 0-d tensor.
        peak_value: The value :math:`v_p` at the end of the warm-up.
        warmup_steps: The length :math:`T_w` of the warm-up in steps, above 0.
        decay_steps: The length T of warm-up and decay together, above warmup_steps.
        end_value: The last value :math:`v_1`.
        exponent: The power p of the cosine, above 0.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=2, decay_steps=6)(torch.arange(7))
        tensor([0.0000, 0.5000, 1.0000, 0.8536, 0.5000, 0.1464, 0.0000], dtype=torch.float64)
    """
    check_hyperparameter("peak_value", peak_value)
    check_hyperparameter("end_value", end_value)
    check_hyperparameter("exponent", exponent, above=0.0)
    rise = linear_schedule(init_value, peak_value, warmup_steps)
    check_hyperparameter("decay_steps", decay_steps, above=0.0)
    check_hyperparameter("decay_steps - warmup_steps", decay_steps - warmup_steps, above=0.0)
    return join_schedules(
        [rise, _half_cosine(peak_value, end_value, decay_steps - warmup_steps, exponent)], [warmup_steps]
    )


def sgdr_schedule(cosine_kwargs: Iterable[Mapping[str, Numeric]]) -> Schedule:
    r"""Repeat a warm-up with cosine decay, each cycle with its own parameters.

    .. math:: s(t) = s_k(t - T_1 - \cdots - T_{k-1}) \quad \text{in cycle } k \text{ of } T_k \text{ steps}

    Args:
        cosine_kwargs: For each cycle the arguments of `warmup_cosine_decay_schedule`, by name.

    Returns:
        The schedule.

    Raises:
        TypeError: If an argument is missing, unknown, or neither a number nor a floating-point tensor.
        ValueError: If there is no cycle, a number is out of range, or a tensor has dimensions.

    Example:
        >>> cycle = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 1, "decay_steps": 3}
        >>> sgdr_schedule([cycle, cycle])(torch.arange(6))
        tensor([0.0000, 1.0000, 0.5000, 0.0000, 1.0000, 0.5000], dtype=torch.float64)

    References:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, section 3.
    """
    cycles = [dict(cycle) for cycle in cosine_kwargs]
    schedules = [warmup_cosine_decay_schedule(**cycle) for cycle in cycles]
    boundaries: list[Numeric] = []
    for cycle in cycles[:-1]:
        boundaries.append((boundaries[-1] if boundaries else 0) + cycle["decay_steps"])
    return join_schedules(schedules, boundaries)


def _half_cosine(init_value: Numeric, end_value: Numeric, steps: Numeric, exponent: Numeric) -> Schedule:
    def schedule(count: Tensor) -> Tensor:
        cosine = 0.5 * (1 + torch.cos(math.pi * progress(count, 0, steps)))
        return end_value + (init_value - end_value) * raised(cosine, exponent)

    return schedule
