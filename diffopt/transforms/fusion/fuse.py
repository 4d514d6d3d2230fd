"""Give a chain a `step` of its own: one pass over the leaves for update, decay and rate together."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff.levels import derivative_possible
from diffopt.transforms.base import GradientTransformation, apply_updates
from diffopt.transforms.donation import check_donation, mark_written
from diffopt.transforms.fusion import launch
from diffopt.transforms.leafwise import bias_correction
from diffopt.transforms.leaves import check_hyperparameter, flatten_floating, flatten_like, precise_dtype
from diffopt.transforms.masks import mask_leaves
from diffopt.transforms.scale import ScaleByScheduleState
from diffopt.typing import Numeric, Schedule, Tree
from diffopt_kernels.steps import StepRule

__all__ = ["fuse"]

FUSE_FROM = 1 << 16
"""Trees on the CPU of fewer entries are differentiated operation by operation."""


def fuse(
    transformation: GradientTransformation,
    rule: StepRule,
    learning_rate: Numeric | Schedule,
    hyperparameters: Mapping[str, Numeric],
    mask: Tree | Callable[[Tree], Tree] | None = None,
) -> GradientTransformation:
    """Give a chain that ends in `scale_by_learning_rate` a fused step with the result of update and apply.

    Args:
        transformation: The chain. Its first member's state holds the rule's moments, after its count if it has one;
            without moments, the chain is of the learning rate alone. `add_decayed_weights` may stand in between.
        rule: The same step as one formula.
        learning_rate: The learning rate of the last member.
        hyperparameters: The rule's other scalars by name, but for Adam's corrections.
        mask: Where the rule's `weight_decay` holds.

    Returns:
        The transformation, with the same init, update and states.

    Example:
        >>> from diffopt.transforms import chain, scale_by_learning_rate
        >>> from diffopt_kernels.steps import SGD
        >>> descent = fuse(chain(scale_by_learning_rate(0.5)), SGD, 0.5, {})
        >>> descent.step(torch.ones(1), descent.init(torch.ones(1)), torch.ones(1))[0]
        tensor([0.5000])
    """

    def step(grads: Tree, state: Any, params: Tree, *, donate: bool = False, **extra: Any) -> tuple[Tree, Any]:
        if torch.compiler.is_compiling():
            return _unfused(transformation, grads, state, params, extra)
        columns, treespec = _columns(rule, grads, state, params)
        written = [x for j, column in enumerate(columns) if j != 1 for x in column]
        scalars, count = _scalars(rule, learning_rate, hyperparameters, state)
        given = [v for v in scalars.values() if isinstance(v, Tensor)]
        if donate:
            check_donation(written, (*columns[1], *given))
        derivative = not donate and derivative_possible((*written, *columns[1], *given))
        if not _alike(columns) or (derivative and _small(columns)):
            return _unfused(transformation, grads, state, params, extra)
        decays = mask_leaves(mask, params) if "weight_decay" in rule.scalars else [True] * len(columns[0])
        new: list[list[Any]] = [[None] * len(decays) for _ in range(1 + rule.moments)]
        for members, decayed in _groups(columns, decays):
            part = [[column[i] for i in members] for column in columns]
            own = scalars if decayed else {**scalars, "weight_decay": 0.0}
            if derivative:
                found = launch.differentiable_step(rule, part, own)
            else:
                found = launch.plain_step(rule, part, own, count, donate=donate)
            for column, values in zip(new, found, strict=True):
                for i, value in zip(members, values, strict=True):
                    column[i] = value
        if donate:
            mark_written(written)
        trees = [tree.unflatten(treespec, column) for column in new]
        return trees[0], _next_state(rule, state, count, trees[1:])

    return transformation._replace(step=step)


def _unfused(
    transformation: GradientTransformation, grads: Tree, state: Any, params: Tree, extra: Mapping[str, Any]
) -> tuple[Tree, Any]:
    updates, state = transformation.update(grads, state, params, **extra)
    return apply_updates(params, updates), state


def _columns(rule: StepRule, grads: Tree, state: Any, params: Tree) -> tuple[list[list[Tensor]], Any]:
    leaves, treespec = flatten_floating(grads, "grads")
    columns = [flatten_like(params, leaves, treespec, name="params", reference_name="grads"), leaves]
    for name in _moments(rule, state):
        columns.append(flatten_like(getattr(state[0], name), leaves, treespec, name=f"state.{name}"))
    return columns, treespec


def _moments(rule: StepRule, state: Any) -> tuple[str, ...]:
    return tuple(name for name in state[0]._fields if name != "count") if rule.moments else ()


def _scalars(
    rule: StepRule, learning_rate: Numeric | Schedule, hyperparameters: Mapping[str, Numeric], state: Any
) -> tuple[dict[str, Numeric], Tensor | None]:
    scalars, count = dict(hyperparameters), None
    if callable(learning_rate):
        rate = learning_rate(state[-1].count)
        check_hyperparameter("learning_rate(count)", rate)
        scalars["learning_rate"] = rate
    else:
        scalars["learning_rate"] = learning_rate
    if "correction1" in rule.scalars:
        count = state[0].count + 1
        scalars["correction1"] = bias_correction(scalars["b1"], count)
        scalars["correction2"] = bias_correction(scalars["b2"], count)
    return scalars, count


def _next_state(rule: StepRule, state: Any, count: Tensor | None, moments: list[Tree]) -> Any:
    rate_state = state[-1]
    if isinstance(rate_state, ScaleByScheduleState):
        rate_state = ScaleByScheduleState(rate_state.count + 1)
    if not rule.moments:
        return (rate_state,)
    first = type(state[0])(*([] if count is None else [count]), *moments)
    return (first, *state[1:-1], rate_state)


def _alike(columns: list[list[Tensor]]) -> bool:
    """Whether each leaf has its columns on one device, and its moments in the dtype of its arithmetic."""
    return all(
        g.device == p.device and all(m.device == p.device and m.dtype == precise_dtype(p.dtype) for m in moments)
        for p, g, *moments in zip(*columns, strict=True)
    )


def _groups(columns: list[list[Tensor]], decays: list[bool]) -> list[tuple[list[int], bool]]:
    """The leaves that go together: those of the same dtypes and device that do or do not decay."""
    groups: dict[Any, list[int]] = {}
    for i, decayed in enumerate(decays):
        key = (decayed, columns[0][i].device, *(column[i].dtype for column in columns))
        groups.setdefault(key, []).append(i)
    return [(members, key[0]) for key, members in groups.items()]


def _small(columns: list[list[Tensor]]) -> bool:
    return all(x.is_cpu for x in columns[0]) and sum(map(Tensor.numel, columns[0])) < FUSE_FROM
