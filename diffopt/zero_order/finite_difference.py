r"""Gradients by finite differences along the axes.

.. math:: \frac{\partial f}{\partial x_j} \approx \frac{f(x + h_j e_j) - f(x - h_j e_j)}{2 h_j}
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from diffopt.zero_order.first_order import without_derivative
from diffopt.zero_order.members import Evaluate, Members

__all__ = ["finite_difference_grad"]


def finite_difference_grad(
    f: Callable[..., Any],
    *,
    method: Literal["central", "forward"] = "central",
    step: float | None = None,
    argnums: int | tuple[int, ...] = 0,
    chunk_size: int | None = None,
    batching: Evaluate = "vmap",
) -> Callable[..., Any]:
    r"""Make a function that takes a gradient by finite differences: 2 n values, or n + 1.

    .. math:: \frac{f(x + h_j e_j) - f(x - h_j e_j)}{2 h_j} \quad\text{or}\quad \frac{f(x + h_j e_j) - f(x)}{h_j},
              \qquad h_j = h \max(1, |x_j|)

    Args:
        f: Returns a number, or a tensor of one element.
        method: "central", of error :math:`O(h^2)`, or "forward", of error O(h).
        step: h. Default: :math:`\epsilon^{1/3}` for central and :math:`\epsilon^{1/2}` for forward differences, with
            the machine epsilon of x, which balances this error with that of rounding.
        argnums: Which arguments, trees of floating-point tensors.
        chunk_size: How many axes to move along at once. Default: all.
        batching: As in `smoothed`.

    Returns:
        `g(*args, **kwargs)`, the gradient: a tree like the argument, or a tuple of them where `argnums` is one. It is a
        constant; under a transform, a derivative of it raises.

    Raises:
        TypeError: If f returns more than one number, or x is not floating-point.
        ValueError: If the step or chunk_size is not positive, or the method another.

    Example:
        >>> finite_difference_grad(torch.sin)(torch.tensor(0.0, dtype=torch.float64)).round(decimals=8)
        tensor(1., dtype=torch.float64)

    References:
        Nocedal and Wright, "Numerical Optimization", 2006, eqs. 8.5 and 8.8.
    """
    if method not in ("central", "forward"):
        raise ValueError(f'`method` must be "central" or "forward"; got {method!r}')
    if step is not None and not step > 0:
        raise ValueError(f"`step` must be positive; got {step}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"`chunk_size` must be a positive int or None; got {chunk_size!r}")
    if batching not in ("vmap", "sequential", "batched"):
        raise ValueError(f'`batching` must be "vmap", "sequential" or "batched"; got {batching!r}')

    @functools.wraps(f)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        members = Members(f, args, kwargs, argnums=argnums, batching=batching)
        with contextlib.nullcontext() if batching == "sequential" else torch.no_grad():
            found = _differences(members, method, step, chunk_size)
        return members.unravel(without_derivative(found, f, args, tuple(kwargs.values()), message=_NO_DERIVATIVE))

    return gradient


def _differences(members: Members, method: str, step: float | None, chunk_size: int | None) -> Tensor:
    x = members.vector.detach()
    size, central = x.shape[0], method == "central"
    h = torch.finfo(x.dtype).eps ** (1 / 3 if central else 1 / 2) if step is None else step
    h = h * x.abs().clamp(min=1)
    h = (x + h) - x  # what x really moves by
    parts = []
    for axes in torch.arange(size, device=x.device).split(chunk_size or size):
        steps = (axes[:, None] == torch.arange(size, device=x.device)).to(x.dtype) * h
        low = x - steps if central else x[None]
        values = members.scalar(members(torch.cat([x + steps, low]))[0], "finite_difference_grad")
        widths = h[axes] * (2 if central else 1)
        parts.append(((values[: len(axes)] - values[len(axes) :]) / widths).to(x.dtype))
    return torch.cat(parts)


_NO_DERIVATIVE = (
    "a finite difference of values has no derivative of its own: difference the function again, or use `smoothed`, "
    "whose derivatives of every order are estimates"
)
