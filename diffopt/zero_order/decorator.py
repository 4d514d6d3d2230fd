"""Smoothing as a decorator."""

from collections.abc import Callable
from typing import Any

from diffopt.zero_order.options import Method
from diffopt.zero_order.smoothed import smoothed

__all__ = ["zero_order"]


def zero_order(
    sigma: Any, num_samples: int, *, method: Method = "antithetic", argnums: int | tuple[int, ...] = 0, **options: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function so that its derivatives are estimated from its values: `smoothed`, as a decorator.

    Args:
        sigma: The scale of the noise, as in `smoothed`.
        num_samples: How many members are evaluated.
        method: "antithetic", "forward" or "naive".
        argnums: The arguments to perturb.
        **options: The other options of `smoothed`.

    Returns:
        A decorator that makes of `f(x, ...)` the function `F(key, x, ...)`.

    Raises:
        TypeError: As in `smoothed`.
        ValueError: As in `smoothed`.

    Example:
        >>> import torch
        >>> @zero_order(0.1, 200, batching="sequential")
        ... def black_box(x):
        ...     return float(x.numpy().max())
        >>> torch.func.grad(black_box, argnums=1)(torch.tensor([42, 0]), torch.tensor([1.0, 5.0])) > 0.5
        tensor([False,  True])
    """
    return lambda f: smoothed(f, sigma, num_samples, method=method, argnums=argnums, **options)
