"""The changes of a population's weights with x and sigma, which carry the derivatives of an estimate."""

import functools

import torch
from torch import Tensor

from diffopt.autodiff import checkpoint
from diffopt.zero_order.first_order import differentiate_once
from diffopt.zero_order.members import Members
from diffopt.zero_order.options import Options

__all__ = ["first_order_alone", "weight_changes"]


def first_order_alone(options: Options) -> bool:
    """Whether the estimate has a first derivative alone."""
    return not options.sampler.normal or options.sign or options.clip is not None


def weight_changes(
    options: Options, members: Members, key: Tensor, sigma: float | Tensor, directions: Tensor | None
) -> tuple[Tensor, ...]:
    """The changes of the weights with x, zeros of shape (p,): on both sides, or on one."""
    x = members.vector
    if first_order_alone(options):
        scale = sigma.detach() if isinstance(sigma, Tensor) else sigma
        shift = differentiate_once(x, _NO_SECOND) * (options.sampler.scale(x.shape[0]) / scale)
        rule = functools.partial(_linear_changes, shift=shift)
    else:
        ratio = (sigma.detach() / sigma).expand(x.shape) if isinstance(sigma, Tensor) else None
        shift = (x - x.detach()) / sigma
        rule = functools.partial(_likelihood_changes, shift=shift, ratio=ratio, paired=options.paired)
    if directions is not None:
        return rule(directions)

    sampler, shapes, dtype = options.sampler, members.shapes, x.dtype

    def chunk(key, first, count):
        return rule(sampler.draw(key, shapes, count, first, dtype))

    # made again in the backward pass, the directions need not be kept
    found = [checkpoint(chunk)(key, first, count) for first, count in options.chunks()]
    return tuple(map(torch.cat, zip(*found, strict=True)))


def _linear_changes(directions: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
    return (directions @ shift,)


def _likelihood_changes(directions: Tensor, shift: Tensor, ratio: Tensor | None, paired: bool) -> tuple[Tensor, ...]:
    r"""The change of the likelihood of members :math:`\bar x \pm \bar\sigma u` with x and sigma.

    .. math:: \frac{N(\bar x \pm \bar\sigma u;\ x, \sigma^2)}{N(\bar x \pm \bar\sigma u;\ \bar x, \bar\sigma^2)} - 1

    Args:
        directions: u, shape (c, n).
        shift: :math:`(x - \bar x) / \sigma`, zeros.
        ratio: :math:`\bar\sigma / \sigma`, ones, or None for a constant sigma.
        paired: Whether both sides are members.

    Returns:
        The changes, zeros of shape (c,), on the plus side and, if paired, on the minus side.
    """
    odd, even = directions @ (shift if ratio is None else ratio * shift), -(shift @ shift) / 2
    if ratio is not None:
        even = even + ratio.log().sum() - (directions * directions) @ (ratio * ratio - 1) / 2
    return ((even + odd).expm1(), (even - odd).expm1()) if paired else ((even + odd).expm1(),)


_NO_SECOND = (
    "this estimate has no second derivative in x: its directions have no density, or differences are clipped. Use "
    "sampler=gaussian() or orthogonal(), without `clip` and `sign`, for derivatives of every order"
)
