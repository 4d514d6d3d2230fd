"""A second gradient in one step, by calling the closure of a training loop again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.typing import Tree

__all__ = ["second_gradient"]


def second_gradient(closure: Callable[[], Any] | None, params: list[Tensor], *, alone: bool) -> Callable[[Tree], Tree]:
    """Make the gradient as a function of the parameters, which `sam` asks for, of a closure.

    Args:
        closure: Clears the gradients, computes the loss and calls backward; or None.
        params: The parameters that step.
        alone: Whether they are all that step.

    Returns:
        A function that writes its argument into the parameters, calls the closure, writes the old values back, and
        gives the gradients. It raises ValueError without closure, and if the parameters are not alone.

    Example:
        >>> x = torch.nn.Parameter(torch.ones(1))
        >>> grad_fn = second_gradient(lambda: x.square().sum().backward(), [x], alone=True)
        >>> with torch.no_grad():
        ...     grad_fn([torch.tensor([3.0])])
        [tensor([6.])]
    """

    def grad_fn(perturbed: Tree) -> Tree:
        if closure is None:
            raise ValueError("The transformation asks for a second gradient: call step(closure).")
        if not alone:
            raise ValueError(
                "A second gradient by closure needs all parameters in one group, with gradients at the same steps. "
                "Else use diffopt.step(..., grad_fn=...) on one tree of parameters."
            )
        leaves, treespec = tree.flatten(perturbed)
        saved = [p.clone() for p in params]
        try:
            for p, moved in zip(params, leaves, strict=True):
                p.copy_(moved)
            with torch.enable_grad():
                closure()
        finally:
            for p, old in zip(params, saved, strict=True):
                p.copy_(old)
        found = [p.grad for p in params]
        if any(g is None for g in found):
            raise ValueError("The closure's second call gave no gradient for a parameter that had one.")
        return tree.unflatten(treespec, [g.clone() for g in found if g is not None])

    return grad_fn
