"""Derivatives that exist once: what has no second derivative, or none at all, raises when it is asked for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import any_lane, hoist, transforms_active
from diffopt.autodiff.custom_derivative import Rules, by_rule

__all__ = ["differentiate_once", "refuse", "without_derivative"]


def differentiate_once(x: Tensor, message: str) -> Tensor:
    r"""Make a zero whose derivative is the identity, and whose second derivative raises.

    .. math:: x \mapsto x - \operatorname{stop}(x)

    Compiled code cannot raise: there the second derivative is NaN.

    Args:
        x: A floating-point tensor.
        message: What the error says.

    Returns:
        Zeros shaped like x.

    Example:
        >>> torch.func.grad(lambda x: 3 * differentiate_once(x, "no second derivative"))(torch.tensor(2.0))
        tensor(3.)
    """

    def vjp(inputs, outputs, cotangents, wanted):
        return (refuse(cotangents[0], inputs[0], message=message),)

    def jvp(inputs, outputs, tangents):
        return (refuse(tangents[0], inputs[0], message=message),)

    def traced(x):
        shift = x - x.detach()
        return (shift + 0 * (shift.abs() ** 1.5).sum(),)  # of infinite second derivative

    return by_rule(Rules(lambda x: (torch.zeros_like(x),), vjp, jvp, "vmap"), traced)(x)[0]


def refuse(value: Tensor, *others: Tensor, message: str) -> Tensor:
    """Pass a value on with its derivative, and raise when its derivative by another tensor is asked for.

    A derivative along a tangent of zeros is zero, and does not raise. Compiled code cannot raise: there the derivative
    is NaN.

    Args:
        value: A floating-point tensor.
        *others: Floating-point tensors.
        message: What the error says.

    Returns:
        The value.

    Raises:
        RuntimeError: When differentiated.

    Example:
        >>> torch.func.grad(lambda x: refuse(x**2, torch.ones(3), message="no derivative"))(torch.tensor(2.0))
        tensor(4.)
    """

    for other in others:
        value = value + _tripwire(other, message).to(value.dtype)
    return value


def without_derivative(out: Any, f: Callable[..., Any], *inputs: Any, message: str) -> Any:
    """Detach a result of values alone; under a transform, raise when its derivative is asked for.

    Args:
        out: A tree of tensors.
        f: The function whose values were taken.
        *inputs: Trees: all else that the result was made of.
        message: What the error says.

    Returns:
        The tree.

    Example:
        >>> without_derivative(torch.ones(2, requires_grad=True), torch.sin, message="no derivative")
        tensor([1., 1.])
    """
    out = tree.map(torch.detach, out)
    if not transforms_active():
        return out
    tensors = [*tree.partition(inputs)[0], *hoist(f).captured]
    tensors = [t for t in tensors if t.is_floating_point()]
    return tree.map(lambda value: refuse(value, *tensors, message=message), out)


def _tripwire(x: Tensor, message: str) -> Tensor:
    """A 0-d zero that raises when its derivative passes to x, and not where the pass stops before."""

    def vjp(inputs, outputs, cotangents, wanted):
        raise RuntimeError(message)

    def jvp(inputs, outputs, tangents):
        if any_lane(tangents[0] != 0):
            raise RuntimeError(message)
        return (torch.zeros_like(outputs[0]),)

    def traced(x):
        return (0 * (x - x.detach()).abs().sqrt().sum(),)  # of infinite derivative

    return by_rule(Rules(lambda x: (x.new_zeros(()),), vjp, jvp, "vmap"), traced)(x)[0]
