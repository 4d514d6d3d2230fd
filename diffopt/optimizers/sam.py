"""SAM: descend along the gradient of the worst neighbour."""

from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms import EmptyState, GradientTransformation, chain
from diffopt.transforms.leafwise import need_params
from diffopt.transforms.leaves import (
    as_dtype,
    check_hyperparameter,
    flatten_floating,
    flatten_like,
    precise_dtype,
)
from diffopt.typing import Numeric, Tree

__all__ = ["sam"]


def sam(optimizer: GradientTransformation, rho: Numeric = 0.05, *, adaptive: bool = False) -> GradientTransformation:
    r"""Take an optimizer's step with the gradient at the worst neighbour of the parameters.

    .. math::
        \hat\theta = \theta_t + \rho\, \frac{g}{\lVert g \rVert} \ \text{ or, adaptive, } \
        \theta_t + \rho\, \frac{\theta_t^2 g}{\lVert \theta_t g \rVert}, \qquad
        \theta_{t+1} = \text{step}(\nabla f(\hat\theta))

    The neighbour is differentiated through like all else. At a zero gradient it is the parameters themselves.

    Args:
        optimizer: The optimizer that takes the step, such as ``sgd(0.1, 0.9)``.
        rho: The distance :math:`\rho`, at least 0, a number or a 0-d tensor.
        adaptive: Whether to measure distances in units of the parameters.

    Returns:
        A transformation, whose update needs ``params`` and ``grad_fn``, from parameters to the gradient:
        ``step(optimizer, grads, state, params, grad_fn=torch.func.grad(loss))``. Inside torch.compile, which does
        not trace that as an argument, write ``grad_fn=lambda params: torch.func.grad(loss)(params)``.

    Raises:
        TypeError: If rho is neither a number nor a floating-point tensor.
        ValueError: If rho is negative, or a tensor with dimensions; in update, if it gets no params or grad_fn.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> from diffopt.transforms import step
        >>> optimizer, x = sam(sgd(0.1), rho=0.5), torch.tensor([1.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x, grad_fn=lambda x: 2 * x)[0]
        tensor([0.7000])

    References:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
        algorithm 1 and eq. 2.
        Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
        Networks", ICML 2021, for the adaptive form.
    """
    check_hyperparameter("rho", rho, at_least=0.0)

    def init(params: Tree) -> EmptyState:
        flatten_floating(params, "params")
        return EmptyState()

    def update(
        updates: Tree, state: EmptyState, params: Tree | None = None, *, grad_fn: Any = None, **extra: Any
    ) -> tuple[Tree, EmptyState]:
        if grad_fn is None:
            raise ValueError("`sam` needs the gradient's function: step(..., grad_fn=torch.func.grad(loss)).")
        grads, treespec = flatten_floating(updates, "updates")
        leaves = flatten_like(need_params(params, "sam"), grads, treespec, name="params")
        return grad_fn(tree.unflatten(treespec, _worst(grads, leaves, rho, adaptive))), state

    return chain(GradientTransformation(init, update), optimizer)


def _worst(grads: list[Tensor], leaves: list[Tensor], rho: Numeric, adaptive: bool) -> list[Tensor]:
    scales = [p.to(precise_dtype(p.dtype)) if adaptive else None for p in leaves]
    scaled = [g.to(precise_dtype(g.dtype)) for g in grads]
    scaled = [g if s is None else s * g for g, s in zip(scaled, scales, strict=True)]
    norm = tree.norm(scaled)
    factor = as_dtype(rho, norm.dtype) / torch.where(norm > 0, norm, 1.0)
    moves = [factor.to(g.dtype) * (g if s is None else s * g) for g, s in zip(scaled, scales, strict=True)]
    return [(p.to(m.dtype) + m).to(p.dtype) for p, m in zip(leaves, moves, strict=True)]
