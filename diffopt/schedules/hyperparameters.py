"""The checks of hyperparameters: a number in its range, or a 0-d tensor that is not read; and of counts."""

from torch import Tensor

from diffopt.typing import Numeric

__all__ = ["check_count", "check_hyperparameter"]


def check_hyperparameter(
    name: str,
    value: Numeric,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Check that a hyperparameter is a number in its range, or a 0-d floating-point tensor.

    A tensor's value is not read, so that it may be batched, traced or on a device.

    Args:
        name: What error messages call it.
        value: The hyperparameter.
        at_least: The least allowed number.
        above: The bound that a number must exceed.
        below: The bound that a number must not reach.
        at_most: The most allowed number.

    Raises:
        TypeError: If it is neither a real number nor a floating-point tensor.
        ValueError: If a tensor has dimensions, or a number is out of range.

    Example:
        >>> check_hyperparameter("b1", 1.5, at_least=0.0, below=1.0)
        Traceback (most recent call last):
        ...
        ValueError: `b1` must be at least 0.0 and below 1.0; got 1.5.
    """
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(
                f"`{name}` must be a number or a 0-d tensor; got shape {tuple(value.shape)}. To run several values "
                "at once, use torch.func.vmap over the function that builds the transformation."
            )
        if not value.is_floating_point():
            raise TypeError(f"`{name}` must be a floating-point tensor; got {value.dtype}.")
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number or a 0-d tensor; got {type(value).__name__}: {value!r:.60}.")
    low_enough = (below is None or value < below) and (at_most is None or value <= at_most)
    high_enough = (at_least is None or value >= at_least) and (above is None or value > above)
    if not (low_enough and high_enough):
        limits = {"at least": at_least, "above": above, "below": below, "at most": at_most}
        bounds = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
        raise ValueError(f"`{name}` must be {bounds}; got {value}.")


def check_count(name: str, count: int, *, at_least: int = 1) -> None:
    """Check a number of steps, samples and the like.

    Args:
        name: What error messages call it.
        count: The number.
        at_least: The least allowed.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is too small.

    Example:
        >>> check_count("steps", 0)
        Traceback (most recent call last):
        ...
        ValueError: `steps` must be at least 1; got 0.
    """
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"`{name}` must be an int; got {type(count).__name__}: {count!r:.60}.")
    if count < at_least:
        raise ValueError(f"`{name}` must be at least {at_least}; got {count}.")
