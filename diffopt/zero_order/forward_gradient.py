r"""Gradients without a backward pass, from directional derivatives along random directions.

.. math:: \hat g = \frac{c}{m} \sum_{i=1}^m (\nabla f(x) \cdot u_i)\, u_i
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt.autodiff import jvp
from diffopt.random.keys import check_key
from diffopt.zero_order.es_grad import EstimateInfo, summarize
from diffopt.zero_order.members import Members
from diffopt.zero_order.options import Options, check_options
from diffopt.zero_order.samplers import Sampler, gaussian

__all__ = ["forward_gradient"]


def forward_gradient(
    f: Callable[..., Any],
    num_samples: int = 1,
    *,
    sampler: Sampler | None = None,
    argnums: int | tuple[int, ...] = 0,
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, EstimateInfo]]:
    r"""Make a function that estimates a gradient by forward mode alone: unbiased, in the memory of an evaluation.

    .. math:: \hat g = \frac{1}{m} \sum_{i=1}^m (\nabla f(x) \cdot u_i)\, u_i

    It is differentiable as f is, in x and in all else.

    Args:
        f: A differentiable function that returns a tensor of one element.
        num_samples: How many directions.
        sampler: The directions. Default: `gaussian()`; `rademacher()` has a smaller variance, and n directions of
            `coordinate()` give the exact gradient.
        argnums: Which arguments, trees of floating-point tensors.
        chunk_size: How many directions to take at once. Default: all.

    Returns:
        `g(key, *args, **kwargs) -> (gradient, info)`, as `es_grad` has them; `info.loss` is f(x).

    Raises:
        TypeError: If f returns more than one number, or an argument is of the wrong type.
        ValueError: If num_samples or chunk_size is not positive.

    Example:
        >>> from diffopt.zero_order import coordinate
        >>> g = forward_gradient(lambda x: (x**2).sum(), 3, sampler=coordinate())
        >>> g(torch.tensor([42, 0]), torch.tensor([1.0, 2.0, 3.0]))[0]
        tensor([2., 4., 6.])

    References:
        Baydin, Pearlmutter, Syme, Wood and Torr, "Gradients without backpropagation", 2022, eq. 2.
    """
    chosen = gaussian() if sampler is None else sampler
    options = Options(1.0, num_samples, chosen, method="naive", chunk_size=chunk_size)
    check_options(options)

    @functools.wraps(f)
    def gradient(key: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, EstimateInfo]:
        check_key(key)
        members = Members(f, args, kwargs, argnums=argnums)
        x = members.vector

        def value(x: Tensor) -> Tensor:
            return members.scalar(members(x[None])[0], "forward_gradient")[0]

        total = torch.zeros(x.shape[0] + 3, dtype=x.dtype, device=x.device)
        for first, count in options.chunks():
            u = chosen.draw(key, members.shapes, count, first, x.dtype)
            losses, slopes = torch.func.vmap(lambda u: jvp(value, (x,), (u,)))(u)
            weights = (chosen.scale(x.shape[0]) * slopes).to(x.dtype)
            squares = (weights * weights) @ (u * u).sum(1)
            counts = torch.full((), float(count), dtype=x.dtype, device=x.device)
            total = total + torch.cat([weights @ u, torch.stack([squares, losses.sum().to(x.dtype), counts])])
        found, info = summarize(total, 1.0)
        return members.unravel(found), info

    return gradient
