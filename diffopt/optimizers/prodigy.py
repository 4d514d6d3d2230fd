"""Prodigy: Adam that estimates its own learning rate."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms import GradientTransformation
from diffopt.transforms.leafwise import bias_correction, need_params
from diffopt.transforms.leaves import (
    as_dtype,
    check_hyperparameter,
    flatten_floating,
    flatten_like,
    precise_dtype,
    zero_count,
)
from diffopt.typing import Numeric, Schedule, Tree

__all__ = ["ProdigyState", "prodigy"]


class ProdigyState(NamedTuple):
    """The state of `prodigy`; trees are like the parameters (float32 for 16-bit leaves).

    Attributes:
        count: Steps taken, an int64 0-d tensor.
        d: The estimated distance to the solution, a float64 0-d tensor.
        numerator: The numerator r of the estimate, a float64 0-d tensor.
        start: The first parameters.
        mu: Running mean of the weighted gradient.
        nu: Running mean of its square.
        s: The denominator's running sum.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    d: Tensor
    numerator: Tensor
    start: Tree
    mu: Tree
    nu: Tree
    s: Tree


def prodigy(
    learning_rate: Numeric | Schedule = 1.0,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    *,
    b3: Numeric | None = None,
    d0: Numeric = 1e-6,
    d_coefficient: Numeric = 1.0,
    weight_decay: Numeric = 0.0,
) -> GradientTransformation:
    r"""Descend as Adam does, with the rate times an estimate of the distance to the solution.

    .. math::
        a_t = \alpha\, d_t \frac{\sqrt{1 - b_2^t}}{1 - b_1^t}, \quad
        \mu_t = b_1 \mu_{t-1} + (1 - b_1) d_t g_t, \quad \nu_t = b_2 \nu_{t-1} + (1 - b_2) d_t^2 g_t^2, \\
        r_t = b_3 r_{t-1} + \frac{d_t a_t}{d_0^2} \langle g_t, \theta_0 - \theta_t \rangle, \quad
        s_t = b_3 s_{t-1} + \frac{d_t a_t}{d_0^2} g_t, \quad
        d_{t+1} = \max\left(d_t, c\, \frac{r_t}{\lVert s_t \rVert_1}\right), \\
        \theta_{t+1} = \theta_t - a_t \left(\frac{\mu_t}
        {\sqrt{\nu_t + d_t^2 \epsilon_\text{root}} + d_t \epsilon} + \lambda \theta_t\right)

    The new d serves from the next step on, in eps too (the authors' code has the new one there). The corrections for
    bias are an option of that code; the paper has none.

    Args:
        learning_rate: The factor :math:`\alpha`, a number, a 0-d tensor or a schedule. Leave it at 1 but for its
            schedule.
        b1: Decay of the mean, in [0, 1), a number or a 0-d tensor like those below.
        b2: Decay of the mean square, in [0, 1).
        eps: Added outside the root, at least 0.
        eps_root: Added inside the root, at least 0; above 0, derivatives through a zero gradient are finite.
        b3: Decay of the estimate's sums, in [0, 1). Default: the root of b2, which with ``b2 = 0`` has no slope.
        d0: The first estimate, above 0.
        d_coefficient: The factor c of the estimate, above 0.
        weight_decay: The multiple :math:`\lambda` of the weights, at least 0.

    Returns:
        A transformation with `ProdigyState`, whose update needs ``params``.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, or a tensor has dimensions; in update, if it gets no params.

    Example:
        >>> from diffopt.transforms import step
        >>> optimizer, x = prodigy(d0=0.1), torch.tensor([1.0, -2.0])
        >>> step(optimizer, 2 * x, optimizer.init(x), x)[0]
        tensor([ 0.9000, -1.9000])

    References:
        Mishchenko and Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", ICML 2024.
    """
    if not callable(learning_rate):
        check_hyperparameter("learning_rate", learning_rate)
    for name, value in {"b1": b1, "b2": b2, "b3": 0.0 if b3 is None else b3}.items():
        check_hyperparameter(name, value, at_least=0.0, below=1.0)
    for name, value in {"eps": eps, "eps_root": eps_root, "weight_decay": weight_decay}.items():
        check_hyperparameter(name, value, at_least=0.0)
    check_hyperparameter("d0", d0, above=0.0)
    check_hyperparameter("d_coefficient", d_coefficient, above=0.0)

    def init(params: Tree) -> ProdigyState:
        leaves, treespec = flatten_floating(params, "params")
        start = [leaf.to(precise_dtype(leaf.dtype), copy=True) for leaf in leaves]
        mu, nu, s = (tree.unflatten(treespec, [torch.zeros_like(leaf) for leaf in start]) for _ in range(3))
        zero = torch.zeros_like(zero_count(leaves), dtype=torch.float64)
        return ProdigyState(zero_count(leaves), zero + d0, zero, tree.unflatten(treespec, start), mu, nu, s)

    def update(
        updates: Tree, state: ProdigyState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ProdigyState]:
        grads, treespec = flatten_floating(updates, "updates")
        ps = flatten_like(need_params(params, "prodigy"), grads, treespec, name="params")
        names = ("start", "mu", "nu", "s")
        columns = [flatten_like(getattr(state, n), grads, treespec, name=f"state.{n}") for n in names]
        count, d = state.count + 1, state.d
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        size = rate * d * torch.sqrt(bias_correction(b2, count)) / bias_correction(b1, count)
        keep = torch.sqrt(torch.zeros_like(d) + b2) if b3 is None else torch.zeros_like(d) + b3
        weight = d * size / (as_dtype(d0, torch.float64) ** 2)
        scalars = (d, size, keep, weight, b1, 1 - b1, b2, 1 - b2, eps, eps_root, weight_decay)
        cast = {dtype: tuple(as_dtype(value, dtype) for value in scalars) for dtype in {m.dtype for m in columns[1]}}
        slots = zip(*columns, strict=True)
        rows = [_step(g, p, own, cast[own[1].dtype]) for g, p, own in zip(grads, ps, slots, strict=True)]
        inner, total = (sum((row[i] for row in rows), torch.zeros_like(d)) for i in (4, 5))
        numerator = keep * state.numerator + weight * inner
        some = total > 0
        estimate = as_dtype(d_coefficient, torch.float64) * numerator / torch.where(some, total, 1.0)
        d = torch.where(some & (estimate > d), estimate, d)
        out, mu, nu, s = (tree.unflatten(treespec, [row[i] for row in rows]) for i in range(4))
        return out, ProdigyState(count, d, numerator, state.start, mu, nu, s)

    return GradientTransformation(init, update)


def _step(g: Tensor, p: Tensor, slots: tuple[Tensor, ...], scalars: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Give one leaf's update, its new slots, and its shares of the estimate's two sums."""
    start, mu, nu, s = slots
    d, size, keep, weight, b1, rest1, b2, rest2, eps, eps_root, weight_decay = scalars
    precise, theta = g.to(mu.dtype), p.to(mu.dtype)
    mu, nu = b1 * mu + rest1 * d * precise, b2 * nu + rest2 * (d * precise) ** 2
    s = keep * s + weight * precise
    out = -size * (mu / (torch.sqrt(nu + d * d * eps_root) + d * eps) + weight_decay * theta)
    return out.to(g.dtype), mu, nu, s, (precise * (start - theta)).sum(), s.abs().sum()
