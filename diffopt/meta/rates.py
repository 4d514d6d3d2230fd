r"""Learned rates of the inner steps: one for each parameter, each layer, each step.

.. math:: u_t = -\,\alpha_t \circ g_t
"""

from typing import Any, NamedTuple

from torch import Tensor

from diffopt import tree
from diffopt.transforms import GradientTransformation
from diffopt.transforms.leaves import flatten_floating, precise_dtype, zero_count
from diffopt.transforms.masks import broadcast
from diffopt.typing import Schedule, Tree

__all__ = ["MetaSGDState", "meta_sgd", "per_step"]


class MetaSGDState(NamedTuple):
    """The state of `meta_sgd`.

    Attributes:
        count: Steps taken, an int64 0-d tensor.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]


def meta_sgd(rates: Tree, *, stepwise: bool = False) -> GradientTransformation:
    r"""Descend with a learned rate for each parameter, or for each layer and step.

    .. math:: \theta_{t+1} = \theta_t - \alpha_t \circ g_t

    Args:
        rates: The rates :math:`\alpha`, a tree of floating-point tensors with the structure of the parameters, or a
            prefix of it (a tensor stands for the whole subtree in its place). Each broadcasts to the shapes of its
            parameters: 0-d for a rate a layer, the parameter's own shape for a rate an entry. A rate may be negative.
        stepwise: Whether each rate has one more, leading dimension, a row a step; the last row serves all later steps.

    Returns:
        A transformation with `MetaSGDState`.

    Raises:
        TypeError: In update, if an entry of the rates is no floating-point tensor.
        ValueError: In update, if the rates are no prefix of the parameters, or one does not broadcast to its parameter.

    Example:
        >>> import torch
        >>> from diffopt.transforms import step
        >>> rates = {"w": torch.tensor([0.1, -0.1]), "b": torch.tensor(0.5)}
        >>> params = {"w": torch.ones(2), "b": torch.ones(1)}
        >>> optimizer = meta_sgd(rates)
        >>> step(optimizer, params, optimizer.init(params), params)[0]
        {'w': tensor([0.9000, 1.1000]), 'b': tensor([0.5000])}

    References:
        Li, Zhou, Chen and Li (2017), Meta-SGD: learning to learn quickly for few-shot learning, eq. 1.
        Antoniou, Edwards and Storkey (2019), How to train your MAML, section 4, for a rate a layer and step.
    """

    def init(params: Tree) -> MetaSGDState:
        return MetaSGDState(zero_count(flatten_floating(params, "params")[0]))

    def update(
        updates: Tree, state: MetaSGDState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, MetaSGDState]:
        grads, treespec = flatten_floating(updates, "updates")
        chosen = broadcast(rates, treespec, Tensor, "rates")
        if stepwise:
            chosen = [_row(rate, state.count) for rate in chosen]
        scaled = [_scaled(g, rate, i, updates) for i, (g, rate) in enumerate(zip(grads, chosen, strict=True))]
        return tree.unflatten(treespec, scaled), MetaSGDState(state.count + 1)

    return GradientTransformation(init, update)


def per_step(values: Tensor) -> Schedule:
    r"""Make a schedule of a tensor of values, one a step: :math:`t \mapsto v_t`, learned rates for any optimizer.

    Args:
        values: Shape `(steps,)`, floating-point; the last value serves all later steps.

    Returns:
        A schedule for `learning_rate` of any optimizer, differentiable in the values.

    Raises:
        TypeError: If the values are no floating-point tensor.
        ValueError: If they are not one-dimensional, or none.

    Example:
        >>> import torch
        >>> from diffopt import adam
        >>> optimizer = adam(per_step(torch.tensor([0.1, 0.01])))
        >>> per_step(torch.tensor([0.5, 0.25]))(torch.tensor(1))
        tensor(0.2500)

    References:
        Antoniou, Edwards and Storkey (2019), How to train your MAML, section 4.
    """
    if not isinstance(values, Tensor) or not values.is_floating_point():
        found = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"`values` must be a floating-point tensor of shape (steps,); got {found}.")
    if values.ndim != 1 or not values.numel():
        raise ValueError(f"`values` must have shape (steps,), one value a step; got {tuple(values.shape)}.")
    return lambda count: _row(values, count)


def _row(values: Tensor, count: Tensor) -> Tensor:
    """The row of a step; not `values[count]`, which reads the count, and fails under transforms."""
    if not values.ndim or not values.shape[0]:
        raise ValueError(f"stepwise `rates` need a leading dimension of steps; got shape {tuple(values.shape)}.")
    return values.index_select(0, count.clamp(max=values.shape[0] - 1).reshape(1)).squeeze(0)


def _scaled(g: Tensor, rate: Tensor, index: int, updates: Tree) -> Tensor:
    dtype = precise_dtype(g.dtype)
    name = f"the rate of `params{tree.paths(updates)[index]}`" if _misfits(rate, g) else ""
    if name and not rate.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {rate.dtype}.")
    if name:
        raise ValueError(f"{name} must broadcast to its shape {tuple(g.shape)}; got {tuple(rate.shape)}.")
    return (-rate.to(dtype) * g.to(dtype)).to(g.dtype)


def _misfits(rate: Tensor, g: Tensor) -> bool:
    sizes = zip(reversed(rate.shape), reversed(g.shape), strict=False)
    fits = rate.ndim <= g.ndim and all(size in (1, full) for size, full in sizes)
    return not (fits and rate.is_floating_point())
