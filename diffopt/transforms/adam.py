"""Adam's scaling: the running mean of the gradient over the root of that of its square."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.leafwise import bias_correction
from diffopt.transforms.leaves import (
    as_dtype,
    check_hyperparameter,
    flatten_floating,
    flatten_like,
    precise_dtype,
    zero_count,
)
from diffopt.typing import Numeric, Tree

__all__ = ["ScaleByAdamState", "scale_by_adam"]


class ScaleByAdamState(NamedTuple):
    """The state of `scale_by_adam`.

    Attributes:
        count: Steps taken, an int64 0-d tensor.
        mu: Running mean of the gradient, a tree like the parameters (float32 for 16-bit leaves).
        nu: Running mean of the squared gradient, likewise.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Tree
    nu: Tree


def scale_by_adam(
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    r"""Scale the updates by Adam's rule.

    .. math::
        \mu_t = b_1 \mu_{t-1} + (1 - b_1) g_t, \quad \nu_t = b_2 \nu_{t-1} + (1 - b_2) g_t^2, \quad
        u_t = \frac{\mu_t / (1 - b_1^t)}{\sqrt{\nu_t / (1 - b_2^t) + \epsilon_\text{root}} + \epsilon}

    With Nesterov momentum the numerator is
    :math:`b_1 \mu_t / (1 - b_1^{t+1}) + (1 - b_1) g_t / (1 - b_1^t)`.

    Where an entry's gradients have all been exactly 0, the update is 0; but its derivative through the root
    is NaN with ``eps_root = 0``, for the root has no slope at 0. Differentiating through steps in which a
    gradient can vanish (unused embeddings, dead units) needs ``eps_root > 0``, such as 1e-16.

    Args:
        b1: Decay of the mean, in [0, 1); like all four a number or a 0-d tensor.
        b2: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0.
        nesterov: Whether to look one step ahead.

    Returns:
        A transformation with `ScaleByAdamState`, whose updates keep their dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions; in update, if updates and state
            do not match.

    Example:
        >>> import torch
        >>> transformation = scale_by_adam()
        >>> params = torch.tensor([3.0, -0.1])
        >>> updates, state = transformation.update(params, transformation.init(params))
        >>> updates, state.count
        (tensor([ 1.0000, -1.0000]), tensor(1))

    References:
        Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1.
        Dozat, "Incorporating Nesterov Momentum into Adam", ICLR workshop 2016, algorithm 2, with a constant b1.
    """
    check_hyperparameter("b1", b1, at_least=0.0, below=1.0)
    check_hyperparameter("b2", b2, at_least=0.0, below=1.0)
    check_hyperparameter("eps", eps, at_least=0.0)
    check_hyperparameter("eps_root", eps_root, at_least=0.0)

    def init(params: Tree) -> ScaleByAdamState:
        leaves, treespec = flatten_floating(params, "params")
        dtypes = [precise_dtype(leaf.dtype) for leaf in leaves]
        mu, nu = (
            tree.unflatten(treespec, [torch.zeros_like(leaf, dtype=d) for leaf, d in zip(leaves, dtypes, strict=True)])
            for _ in range(2)
        )
        return ScaleByAdamState(zero_count(leaves), mu, nu)

    def update(
        updates: Tree, state: ScaleByAdamState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ScaleByAdamState]:
        grads, treespec = flatten_floating(updates, "updates")
        mus = flatten_like(state.mu, grads, treespec, name="state.mu")
        nus = flatten_like(state.nu, grads, treespec, name="state.nu")
        count = state.count + 1
        scalars = (b1, 1 - b1, b2, 1 - b2, bias_correction(b2, count), eps, eps_root)
        scalars += _mean_weights(b1, count, nesterov)
        cast = {m.dtype: tuple(as_dtype(s, m.dtype) for s in scalars) for m in mus}
        rows = [_scaled(g, m, n, cast[m.dtype]) for g, m, n in zip(grads, mus, nus, strict=True)]
        out, mu, nu = (tree.unflatten(treespec, [row[i] for row in rows]) for i in range(3))
        return out, ScaleByAdamState(count, mu, nu)

    return GradientTransformation(init, update)


def _scaled(g: Tensor, mu: Tensor, nu: Tensor, scalars: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    b1, rest1, b2, rest2, correction, eps, eps_root, mu_weight, *grad_weight = scalars
    precise = g.to(mu.dtype)
    mu = b1 * mu + rest1 * precise
    nu = b2 * nu + rest2 * precise * precise
    mean = mu_weight * mu
    if grad_weight:
        mean = mean + grad_weight[0] * precise
    return (mean / (torch.sqrt(nu / correction + eps_root) + eps)).to(g.dtype), mu, nu


def _mean_weights(b1: Numeric, count: Tensor, nesterov: bool) -> tuple[Numeric, ...]:
    """Weigh the running mean and, with Nesterov momentum, the gradient in the numerator."""
    if not nesterov:
        return (1 / bias_correction(b1, count),)
    ahead = as_dtype(b1, torch.float64) / bias_correction(b1, count + 1)
    return ahead, (1 - as_dtype(b1, torch.float64)) / bias_correction(b1, count)
