"""What is done to gradients first: centering, noise, and removing what is not a number."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import random, tree
from diffopt.transforms.base import EmptyState, GradientTransformation
from diffopt.transforms.leafwise import leafwise
from diffopt.transforms.leaves import as_dtype, check_hyperparameter, flatten_floating, precise_dtype, zero_count
from diffopt.typing import Numeric, Tree

__all__ = ["AddNoiseState", "ZeroNansState", "add_noise", "centralize", "zero_nans"]


class AddNoiseState(NamedTuple):
    """The state of `add_noise`.

    Attributes:
        count: Steps taken, an int64 0-d tensor.
        key: The key, int64, shape (2,).
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    key: Tensor


class ZeroNansState(NamedTuple):
    """The state of `zero_nans`.

    Attributes:
        found_nan: For each leaf, whether the last update had a NaN: bool 0-d tensors.
    """

    found_nan: Tree


def centralize() -> GradientTransformation:
    r"""Subtract from each row its mean: :math:`u_i = g_i - \text{mean}(g_i)`.

    A row is what one index of a leaf's first dimension holds. Leaves of fewer than two dimensions stay.

    Returns:
        A stateless transformation, whose updates keep their dtypes.

    Example:
        >>> centralize().update([torch.tensor([[1.0, 3.0]]), torch.tensor([2.0])], EmptyState())[0]
        [tensor([[-1.,  1.]]), tensor([2.])]

    References:
        Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks",
        ECCV 2020, eq. 1.
    """

    def rule(g):
        return (g - g.mean(dim=tuple(range(1, g.ndim)), keepdim=True) if g.ndim > 1 and g.numel() else g,)

    return leafwise(EmptyState, rule, lambda count: ())


def zero_nans() -> GradientTransformation:
    """Set entries that are NaN to 0, and note where there were any.

    Returns:
        A transformation with `ZeroNansState`, whose updates keep their dtypes.

    Example:
        >>> t = zero_nans()
        >>> t.update([torch.tensor([1.0, torch.nan])], t.init([torch.zeros(2)]))
        ([tensor([1., 0.])], ZeroNansState(found_nan=[tensor(True)]))
    """

    def init(params: Tree) -> ZeroNansState:
        leaves, treespec = flatten_floating(params, "params")
        return ZeroNansState(tree.unflatten(treespec, [leaf.new_zeros((), dtype=torch.bool) for leaf in leaves]))

    def update(
        updates: Tree, state: ZeroNansState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ZeroNansState]:
        leaves, treespec = flatten_floating(updates, "updates")
        found = [torch.isnan(leaf) for leaf in leaves]
        out = [torch.where(nan, 0.0, leaf) for nan, leaf in zip(found, leaves, strict=True)]
        return tree.unflatten(treespec, out), ZeroNansState(tree.unflatten(treespec, [nan.any() for nan in found]))

    return GradientTransformation(init, update)


def add_noise(key: Tensor, eta: Numeric, gamma: Numeric = 0.55) -> GradientTransformation:
    r"""Add normal noise whose variance decays.

    .. math:: u_t = g_t + \sqrt{\frac{\eta}{t^\gamma}}\, z_t, \qquad z_t \sim N(0, I), \quad t = 1, 2, \ldots

    Args:
        key: A key, int64, shape (2,); the noise of step t depends on the key and t alone.
        eta: The variance of the first noise, above 0, a number or a 0-d tensor.
        gamma: The power of the decay, at least 0, likewise.

    Returns:
        A transformation with `AddNoiseState`, whose updates keep their dtypes.

    Raises:
        TypeError: If the key is no int64 tensor, or a hyperparameter neither a number nor a floating-point tensor.
        ValueError: If the key is not of shape (2,), a number is out of range, or a tensor has dimensions.

    Example:
        >>> t = add_noise(random.key(0), eta=0.01)
        >>> updates, state = t.update(torch.ones(1000), t.init(torch.ones(1000)))
        >>> bool((updates.std() - 0.1).abs() < 0.01), state.count
        (True, tensor(1))

    References:
        Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015, eq. 1.
    """
    random.fold_in(key, 0)  # raises if the key is none
    check_hyperparameter("eta", eta, above=0.0)
    check_hyperparameter("gamma", gamma, at_least=0.0)

    def init(params: Tree) -> AddNoiseState:
        return AddNoiseState(zero_count(flatten_floating(params, "params")[0]), key)

    def update(
        updates: Tree, state: AddNoiseState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, AddNoiseState]:
        leaves, treespec = flatten_floating(updates, "updates")
        count = state.count + 1
        variance = as_dtype(eta, torch.float64) / count.to(torch.float64) ** as_dtype(gamma, torch.float64)
        deviation, step_key = torch.sqrt(variance), random.fold_in(state.key, count)
        out = []
        for i, leaf in enumerate(leaves):
            dtype = precise_dtype(leaf.dtype)
            noise = random.normal(random.fold_in(step_key, i), tuple(leaf.shape), dtype=dtype)
            out.append((leaf.to(dtype) + deviation.to(dtype) * noise).to(leaf.dtype))
        return tree.unflatten(treespec, out), AddNoiseState(count, state.key)

    return GradientTransformation(init, update)
