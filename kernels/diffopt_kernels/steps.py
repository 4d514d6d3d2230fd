r"""Whole optimizer steps on one leaf, in plain torch: the readable references of `diffopt_kernels.multi_tensor`.

Each takes the columns of a leaf (parameter, gradient, then the moments) and its scalars, and gives the new parameter
and the new moments. Columns share one shape; scalars are float64 tensors that broadcast against it, so that 1 - 0.999
is right in float32 too. The arithmetic and the moments are in the moments' dtype, float32 or wider; the parameter is
rounded to its own dtype once, at the end.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ADAM", "LION", "MOMENTUM", "NESTEROV", "RMSPROP", "SGD", "StepRule"]


class StepRule(NamedTuple):
    """A step that kernels know by name.

    Attributes:
        name: The name of its formula in `multi_tensor_kernel`.
        moments: How many moments it keeps: columns 2, ..., moments + 1.
        scalars: The names of its scalars, in the order in which the reference takes them.
        reference: ``(p, g, *moments, *scalars) -> (p, *moments)`` on one leaf.
        backward: ``(g, *moments, *scalars, *cotangents) -> cotangents of (p, g, *moments)`` on one leaf, by hand and in
            fewer operations than torch's derivative of the reference; None leaves it to torch. A cotangent that is
            None is zero.
    """

    name: str
    moments: int
    scalars: tuple[str, ...]
    reference: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, ...]] | None = None


def _sgd(p: Tensor, g: Tensor, learning_rate: Tensor) -> tuple[Tensor]:
    real = torch.promote_types(p.dtype, torch.float32)
    return ((p.to(real) - learning_rate.to(real) * g.to(real)).to(p.dtype),)


def _momentum(p: Tensor, g: Tensor, m: Tensor, learning_rate: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    real = m.dtype
    m = decay.to(real) * m + g.to(real)
    return (p.to(real) - learning_rate.to(real) * m).to(p.dtype), m


def _nesterov(p: Tensor, g: Tensor, m: Tensor, learning_rate: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    real = m.dtype
    precise = g.to(real)
    m = decay.to(real) * m + precise
    ahead = precise + decay.to(real) * m
    return (p.to(real) - learning_rate.to(real) * ahead).to(p.dtype), m


def _rmsprop(
    p: Tensor, g: Tensor, nu: Tensor, learning_rate: Tensor, decay: Tensor, eps: Tensor, eps_root: Tensor
) -> tuple[Tensor, Tensor]:
    real = nu.dtype
    x, precise = p.to(real), g.to(real)
    nu = decay.to(real) * nu + (1 - decay).to(real) * precise * precise
    u = precise / (torch.sqrt(nu + eps_root.to(real)) + eps.to(real))
    return (x - learning_rate.to(real) * u).to(p.dtype), nu


def _lion(
    p: Tensor, g: Tensor, mu: Tensor, learning_rate: Tensor, b1: Tensor, b2: Tensor, weight_decay: Tensor
) -> tuple[Tensor, Tensor]:
    real = mu.dtype
    x, precise = p.to(real), g.to(real)
    u = torch.sign(b1.to(real) * mu + (1 - b1).to(real) * precise)
    mu = b2.to(real) * mu + (1 - b2).to(real) * precise
    return (x - learning_rate.to(real) * (u + weight_decay.to(real) * x)).to(p.dtype), mu


def _adam(
    p: Tensor,
    g: Tensor,
    mu: Tensor,
    nu: Tensor,
    learning_rate: Tensor,
    b1: Tensor,
    b2: Tensor,
    eps: Tensor,
    eps_root: Tensor,
    weight_decay: Tensor,
    correction1: Tensor,
    correction2: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    real = mu.dtype
    x, precise = p.to(real), g.to(real)
    mu = b1.to(real) * mu + (1 - b1).to(real) * precise
    nu = b2.to(real) * nu + (1 - b2).to(real) * precise * precise
    size = torch.sqrt(nu / correction2.to(real) + eps_root.to(real)) + eps.to(real)
    u = mu / correction1.to(real) / size
    return (x - learning_rate.to(real) * (u + weight_decay.to(real) * x)).to(p.dtype), mu, nu


def _adam_backward(
    g: Tensor,
    mu: Tensor,
    nu: Tensor,
    learning_rate: Tensor,
    b1: Tensor,
    b2: Tensor,
    eps: Tensor,
    eps_root: Tensor,
    weight_decay: Tensor,
    correction1: Tensor,
    correction2: Tensor,
    p_bar: Tensor | None,
    mu_bar: Tensor | None,
    nu_bar: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    real = mu.dtype
    rest1, rest2, g_real = (1 - b1).to(real), (1 - b2).to(real), g.to(real)
    mu_new = (mu * b1.to(real)).add_(g_real * rest1)
    nu_new = (nu * b2.to(real)).add_((g_real * g_real).mul_(rest2))
    root = nu_new.div_(correction2.to(real)).add_(eps_root.to(real)).sqrt_()
    size = root + eps.to(real)
    seed = torch.zeros_like(mu) if p_bar is None else p_bar.to(real)
    mean_bar = (seed * (-learning_rate / correction1).to(real)).div_(size)
    size_bar = mu_new.mul_(mean_bar).div_(size).neg_()
    square_bar = size_bar.div_(root).div_((2 * correction2).to(real))
    mean_bar = mean_bar if mu_bar is None else mean_bar.add_(mu_bar)
    square_bar = square_bar if nu_bar is None else square_bar.add_(nu_bar)
    g_bar = (g_real * square_bar).mul_(2 * rest2).add_(mean_bar * rest1)
    kept = (seed * (1 - learning_rate * weight_decay).to(real)).to(g.dtype if p_bar is None else p_bar.dtype)
    return kept, g_bar.to(g.dtype), mean_bar * b1.to(real), square_bar * b2.to(real)


SGD = StepRule("sgd", 0, ("learning_rate",), _sgd)
MOMENTUM = StepRule("momentum", 1, ("learning_rate", "decay"), _momentum)
NESTEROV = StepRule("nesterov", 1, ("learning_rate", "decay"), _nesterov)
RMSPROP = StepRule("rmsprop", 1, ("learning_rate", "decay", "eps", "eps_root"), _rmsprop)
LION = StepRule("lion", 1, ("learning_rate", "b1", "b2", "weight_decay"), _lion)
ADAM = StepRule(
    "adam",
    2,
    ("learning_rate", "b1", "b2", "eps", "eps_root", "weight_decay", "correction1", "correction2"),
    _adam,
    _adam_backward,
)
