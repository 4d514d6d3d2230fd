"""One schedule after the other, each with a count of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.typing import Numeric, Schedule

__all__ = ["join_schedules"]


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[Numeric]) -> Schedule:
    r"""Follow one schedule after the other; each counts from the boundary at which it begins.

    .. math:: s(t) = s_k(t - b_k) \quad \text{for } b_k \le t < b_{k+1}, \qquad b_0 = 0

    The count of a later schedule is an int64 tensor if its boundary is an int, and otherwise float64.

    Args:
        schedules: The schedules :math:`s_k`.
        boundaries: The steps :math:`b_1, b_2, \ldots` at which the later ones begin, in rising order, numbers or
            0-d tensors. A tensor gets the derivative of the later schedule's shift, none for the switch itself.

    Returns:
        The schedule.

    Raises:
        TypeError: If a schedule is not callable, or a boundary neither a number nor a floating-point tensor.
        ValueError: If the boundaries are not one fewer than the schedules, or fall.

    Example:
        >>> from diffopt.schedules import constant_schedule, linear_schedule
        >>> join_schedules([linear_schedule(0.0, 1.0, 2), constant_schedule(0.5)], [3])(torch.arange(5))
        tensor([0.0000, 0.5000, 1.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    schedules, boundaries = tuple(schedules), tuple(boundaries)
    if not schedules or len(boundaries) != len(schedules) - 1:
        raise ValueError(
            "`join_schedules` needs at least one schedule, and a boundary between each two; "
            f"got {len(schedules)} schedules and {len(boundaries)} boundaries."
        )
    for schedule in schedules:
        if not callable(schedule):
            raise TypeError(f"`join_schedules` needs schedules; got {type(schedule).__name__}. Use constant_schedule.")
    for boundary in boundaries:
        check_hyperparameter("boundary", boundary, at_least=0.0)
    numbers = [boundary for boundary in boundaries if not isinstance(boundary, Tensor)]
    if numbers != sorted(numbers):
        raise ValueError(f"`boundaries` must rise; got {list(boundaries)}.")

    def joined(count: Tensor) -> Tensor:
        value = torch.as_tensor(schedules[0](count), dtype=torch.float64, device=count.device)
        for schedule, boundary in zip(schedules[1:], boundaries, strict=True):
            since = count - boundary if isinstance(boundary, int) else count.to(torch.float64) - boundary
            # At least 0, so that a schedule is not asked for steps before its own first.
            value = torch.where(since < 0, value, schedule(since.clamp(min=0)))
        return value

    return joined
