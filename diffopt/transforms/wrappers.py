"""Transformations around another: only if finite, every k-th time, looking ahead, and on one flat vector.

What depends on data or on the count is chosen entry by entry, so that all of them vmap and compile.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.schedules.hyperparameters import check_count
from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.leafwise import need_params
from diffopt.transforms.leaves import (
    as_dtype,
    check_hyperparameter,
    flatten_floating,
    flatten_like,
    precise_dtype,
    zero_count,
)
from diffopt.typing import Numeric, Tree

__all__ = [
    "AccumulateState",
    "ApplyIfFiniteState",
    "LookaheadState",
    "accumulate",
    "apply_if_finite",
    "flatten",
    "lookahead",
]


class ApplyIfFiniteState(NamedTuple):
    """The state of `apply_if_finite`.

    Attributes:
        notfinite_count: Updates in a row that were not finite, an int64 0-d tensor.
        last_finite: Whether the last one was finite, a bool 0-d tensor.
        total_notfinite: All that were not finite, an int64 0-d tensor.
        inner_state: The state of the inner transformation.
    """

    notfinite_count: Tensor
    last_finite: Tensor
    total_notfinite: Tensor
    inner_state: Any


class AccumulateState(NamedTuple):
    """The state of `accumulate`.

    Attributes:
        mini_step: Gradients in the mean, an int64 0-d tensor.
        gradient_step: Steps of the inner transformation, an int64 0-d tensor.
        mean: The mean of those gradients, a tree like the parameters (float32 for 16-bit leaves).
        inner_state: The state of the inner transformation.
    """

    mini_step: Tensor
    gradient_step: Tensor
    mean: Tree
    inner_state: Any


class LookaheadState(NamedTuple):
    """The state of `lookahead`.

    Attributes:
        count: Fast steps since the last slow one, an int64 0-d tensor.
        slow: The slow parameters, a tree like the parameters (float32 for 16-bit leaves).
        inner_state: The state of the fast optimizer.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    slow: Tree
    inner_state: Any


def apply_if_finite(inner: GradientTransformation, max_consecutive_errors: int) -> GradientTransformation:
    """Skip steps whose gradients are not all finite: the updates are 0 and the inner state stays.

    After too many in a row, they are let through, so that a broken run is seen.

    Args:
        inner: The transformation.
        max_consecutive_errors: How many in a row to skip, at least 0.

    Returns:
        A transformation with `ApplyIfFiniteState`.

    Raises:
        ValueError: If max_consecutive_errors is not an int of at least 0.

    Example:
        >>> from diffopt.transforms import scale
        >>> t = apply_if_finite(scale(-1.0), max_consecutive_errors=5)
        >>> t.update(torch.tensor([1.0, torch.inf]), t.init(torch.zeros(2)))[0]
        tensor([0., 0.])
    """
    check_count("max_consecutive_errors", max_consecutive_errors, at_least=0)

    def init(params: Tree) -> ApplyIfFiniteState:
        zero = zero_count(flatten_floating(params, "params")[0])
        return ApplyIfFiniteState(zero, zero == 0, zero.clone(), inner.init(params))

    def update(
        updates: Tree, state: ApplyIfFiniteState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, ApplyIfFiniteState]:
        grads, treespec = flatten_floating(updates, "updates")
        finite = torch.ones_like(state.last_finite)
        for g in grads:
            finite = finite & torch.isfinite(g).all()
        bad = (~finite).to(torch.int64)
        count = (state.notfinite_count + 1) * bad
        through = finite | (count > max_consecutive_errors)
        # Zeros in, and not only out, so that no NaN of a skipped step reaches a derivative.
        safe = tree.unflatten(treespec, [torch.where(through, g, 0.0) for g in grads])
        out, inner_state = inner.update(safe, state.inner_state, params, **extra)
        out = tree.map(lambda u: torch.where(through, u, 0.0), out)
        inner_state = _choose(through, inner_state, state.inner_state)
        return out, ApplyIfFiniteState(count, finite, state.total_notfinite + bad, inner_state)

    return GradientTransformation(init, update)


def accumulate(inner: GradientTransformation, every: int) -> GradientTransformation:
    r"""Step once every k gradients, with their mean; the updates between are 0.

    .. math:: u_{kt} = \text{inner}\left(\tfrac1k \sum_{i=1}^{k} g_{k(t-1)+i}\right), \qquad u = 0 \text{ otherwise}

    Args:
        inner: The transformation.
        every: The number k of gradients, at least 1.

    Returns:
        A transformation with `AccumulateState`.

    Raises:
        ValueError: If every is not an int of at least 1.

    Example:
        >>> from diffopt.transforms import scale
        >>> t = accumulate(scale(-1.0), every=2)
        >>> first, state = t.update(torch.tensor([1.0]), t.init(torch.zeros(1)))
        >>> first, t.update(torch.tensor([3.0]), state)[0]
        (tensor([0.]), tensor([-2.]))
    """
    check_count("every", every)

    def init(params: Tree) -> AccumulateState:
        leaves, treespec = flatten_floating(params, "params")
        zeros = [torch.zeros_like(leaf, dtype=precise_dtype(leaf.dtype)) for leaf in leaves]
        return AccumulateState(
            zero_count(leaves), zero_count(leaves), tree.unflatten(treespec, zeros), inner.init(params)
        )

    def update(
        updates: Tree, state: AccumulateState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, AccumulateState]:
        grads, treespec = flatten_floating(updates, "updates")
        means = flatten_like(state.mean, grads, treespec, name="state.mean")
        count = state.mini_step + 1
        means = [m + (g.to(m.dtype) - m) / count.to(m.dtype) for g, m in zip(grads, means, strict=True)]
        full = count == every
        mean = tree.unflatten(treespec, [m.to(g.dtype) for g, m in zip(grads, means, strict=True)])
        out, inner_state = inner.update(mean, state.inner_state, params, **extra)
        out = tree.map(lambda u: torch.where(full, u, 0.0), out)
        rest = tree.unflatten(treespec, [torch.where(full, 0.0, m) for m in means])
        inner_state = _choose(full, inner_state, state.inner_state)
        return out, AccumulateState(count % every, state.gradient_step + full, rest, inner_state)

    return GradientTransformation(init, update)


def lookahead(
    inner: GradientTransformation, sync_period: int = 6, slow_step_size: Numeric = 0.5
) -> GradientTransformation:
    r"""Let a fast optimizer explore, and every k steps go part of the way it went.

    .. math::
        \phi \leftarrow \phi + \alpha (\theta_{t+1} - \phi), \quad \theta_{t+1} \leftarrow \phi
        \qquad \text{in every } k\text{-th step}

    Args:
        inner: The fast optimizer, with its learning rate.
        sync_period: The number k of fast steps to a slow one, at least 1.
        slow_step_size: The part :math:`\alpha` of the way, a number or a 0-d tensor.

    Returns:
        A transformation with `LookaheadState`, whose update needs ``params``. The state's ``slow`` are the
        parameters to evaluate.

    Raises:
        TypeError: If slow_step_size is neither a number nor a floating-point tensor.
        ValueError: If sync_period is not an int of at least 1; in update, if it gets no params.

    Example:
        >>> from diffopt.transforms import scale
        >>> t, x = lookahead(scale(-1.0), sync_period=1, slow_step_size=0.5), torch.tensor([4.0])
        >>> t.update(torch.tensor([2.0]), t.init(x), x)[0]
        tensor([-1.])

    References:
        Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS 2019, algorithm 1.
    """
    check_count("sync_period", sync_period)
    check_hyperparameter("slow_step_size", slow_step_size)

    def init(params: Tree) -> LookaheadState:
        leaves, treespec = flatten_floating(params, "params")
        slow = [leaf.to(precise_dtype(leaf.dtype), copy=True) for leaf in leaves]
        return LookaheadState(zero_count(leaves), tree.unflatten(treespec, slow), inner.init(params))

    def update(
        updates: Tree, state: LookaheadState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, LookaheadState]:
        fast, inner_state = inner.update(updates, state.inner_state, need_params(params, "lookahead"), **extra)
        changes, treespec = flatten_floating(fast, "updates")
        leaves = flatten_like(params, changes, treespec, name="params")
        slows = flatten_like(state.slow, changes, treespec, name="state.slow")
        count, out, new = state.count + 1, [], []
        sync = count == sync_period
        for u, p, slow in zip(changes, leaves, slows, strict=True):
            dtype = slow.dtype
            moved = slow + as_dtype(slow_step_size, dtype) * (p.to(dtype) + u.to(dtype) - slow)
            new.append(torch.where(sync, moved, slow))
            out.append(torch.where(sync, moved - p.to(dtype), u.to(dtype)).to(u.dtype))
        slow = tree.unflatten(treespec, new)
        return tree.unflatten(treespec, out), LookaheadState(count % sync_period, slow, inner_state)

    return GradientTransformation(init, update)


def flatten(inner: GradientTransformation) -> GradientTransformation:
    """Apply a transformation to all leaves as one vector: ten operations in all, not ten a leaf.

    Transformations that look at leaves, such as `scale_by_trust_ratio` or masks, then see one leaf.

    Args:
        inner: The transformation.

    Returns:
        A transformation whose state is that of the inner one for the vector.

    Raises:
        TypeError: In init and update, if leaves have different dtypes or devices.
        ValueError: In init and update, if the tree has no leaves.

    Example:
        >>> from diffopt.transforms import trace
        >>> t, params = flatten(trace(0.9)), {"w": torch.ones(2), "b": torch.ones(1)}
        >>> t.update(params, t.init(params))[1]
        TraceState(trace=tensor([1., 1., 1.]))
    """

    def init(params: Tree) -> Any:
        flatten_floating(params, "params")
        return inner.init(tree.ravel(params)[0])

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        leaves, treespec = flatten_floating(updates, "updates")
        vector, unravel = tree.ravel(updates)
        if params is not None:
            flatten_like(params, leaves, treespec, name="params")
            params = tree.ravel(params)[0]
        out, state = inner.update(vector, state, params, **extra)
        return unravel(out), state

    return GradientTransformation(init, update)


def _choose(mask: Tensor, new: Any, old: Any) -> Any:
    return tree.map(lambda a, b: torch.where(mask, a, b), new, old)
