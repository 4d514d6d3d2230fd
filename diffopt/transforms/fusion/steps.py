"""Give a chain a `step` of its own: one pass over the leaves for update, decay and rate together."""

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from optree import PyTreeSpec
from torch import Tensor

from diffopt import tree
from diffopt.autodiff.levels import derivative_possible
from diffopt.transforms.base import GradientTransformation, apply_updates
from diffopt.transforms.donation import check_donation, mark_written
from diffopt.transforms.fusion import launch, torch_fused
from diffopt.transforms.fusion.donated import Checked, remember, still_holds
from diffopt.transforms.leaves import check_hyperparameter, flatten_floating, flatten_like, precise_dtype
from diffopt.transforms.masks import mask_leaves
from diffopt.transforms.scale import ScaleByScheduleState
from diffopt.typing import Numeric, Schedule, Tree
from diffopt_kernels.steps import StepRule

__all__ = ["FusedStep", "fuse"]

FUSE_FROM = 1 << 16
"""Trees on the CPU of fewer entries are differentiated operation by operation."""

REMEMBERED = 4
"""How many runs of donated steps an optimizer remembers."""

Columns: TypeAlias = Sequence[Sequence[Tensor]]

_kind = operator.attrgetter("dtype", "device")


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
    step = FusedStep(transformation, rule, {**hyperparameters, "learning_rate": learning_rate}, mask)
    return transformation._replace(step=step)


class FusedStep:
    """A step in one pass over the leaves.

    Attributes:
        rule: The step as one formula.
        scalars: Its scalars by name but for Adam's corrections; the learning rate may be a schedule.
        mask: Where its `weight_decay` holds; None for everywhere.
    """

    def __init__(
        self,
        transformation: GradientTransformation,
        rule: StepRule,
        scalars: Mapping[str, Numeric | Schedule],
        mask: Tree | Callable[[Tree], Tree] | None,
    ):
        self.rule, self.scalars, self.mask = rule, scalars, mask
        self._transformation = transformation
        self._memory: list[Checked] = []

    def __call__(
        self, grads: Tree, state: Any, params: Tree, *, donate: bool = False, **extra: Any
    ) -> tuple[Tree, Any]:
        """The new parameters and the new state."""
        rule = self.rule
        if torch.compiler.is_compiling():
            return _unfused(self._transformation, grads, state, params, extra)
        trees = (params, grads, *(getattr(state[0], name) for name in _moments(rule, state)))
        scalars, count = _scalars(rule, self.scalars, state)
        if donate and self.mask is None:
            new = _donated_again(self._memory, rule, trees, scalars, count)
            if new is not None:
                return new[0], _next_state(rule, state, count, new[1:])
        columns, treespec = _columns(trees)
        written = list(itertools.chain(columns[0], *columns[2:]))
        read = [*columns[1], *_tensors(scalars)]
        if donate:
            check_donation(written, read)
        derivative = not donate and derivative_possible(itertools.chain(written, read))
        groups = _groups(columns, mask_leaves(self.mask, params) if "weight_decay" in rule.scalars else None)
        if groups is None or (derivative and _small(columns)):
            return _unfused(self._transformation, grads, state, params, extra)

        def launched(part: Columns, decays: bool) -> Columns:
            own = scalars if decays else {**scalars, "weight_decay": 0.0}
            if derivative:
                return launch.differentiable_step(rule, part, own, count)
            return launch.plain_step(rule, part, own, count, donate=donate)

        new = _by_group(launched, columns, groups)
        if donate:
            mark_written(written)
            self._memory[:] = filter(None, [remember(treespec, columns), *self._memory[: REMEMBERED - 1]])
        new_params, *moments = (tree.unflatten(treespec, column) for column in new)
        return new_params, _next_state(rule, state, count, moments)


def _unfused(
    transformation: GradientTransformation, grads: Tree, state: Any, params: Tree, extra: Mapping[str, Any]
) -> tuple[Tree, Any]:
    updates, state = transformation.update(grads, state, params, **extra)
    return apply_updates(params, updates), state


def _donated_again(
    memory: list[Checked], rule: StepRule, trees: Sequence[Tree], scalars: Mapping[str, Numeric], count: Tensor | None
) -> list[Tree] | None:
    """Step in place by torch's fused function, if the step before wrote the same tensors; else None."""
    flat = [tree.flatten(each) for each in trees]
    columns, treespecs = [leaves for leaves, _ in flat], [treespec for _, treespec in flat]
    known = any(still_holds(checked, treespecs, columns) for checked in memory)
    if not known or derivative_possible(_tensors(scalars)):
        return None
    if not launch.by_torch(rule, columns, scalars):
        return None
    torch_fused.step_in_place(rule, columns, scalars, count)
    written = [columns[0], *columns[2:]]
    torch.autograd.graph.increment_version(itertools.chain(*written))
    return [tree.unflatten(treespecs[0], column) for column in written]


def _columns(trees: Sequence[Tree]) -> tuple[Columns, PyTreeSpec]:
    """Flatten params, grads and moments, and check that they fit."""
    params, grads, *moments = trees
    leaves, treespec = flatten_floating(grads, "grads")
    columns = [flatten_like(params, leaves, treespec, name="params", reference_name="grads"), leaves]
    for each in moments:
        columns.append(flatten_like(each, leaves, treespec, name="state", reference_name="grads"))
    return columns, treespec


def _tensors(scalars: Mapping[str, Numeric]) -> list[Tensor]:
    return [value for value in scalars.values() if isinstance(value, Tensor)]


def _moments(rule: StepRule, state: Any) -> tuple[str, ...]:
    fields = getattr(state[0], "_fields", ()) if isinstance(state, tuple) and state else ()
    names = tuple(name for name in fields if name != "count")
    if len(names) != rule.moments or ("correction1" in rule.scalars and "count" not in fields):
        found = type(state[0]).__name__ if isinstance(state, tuple) and state else type(state).__name__
        raise TypeError(f"`state` must be what this optimizer's `init` returned; got that of another: {found}.")
    return names


def _scalars(
    rule: StepRule, given: Mapping[str, Numeric | Schedule], state: Any
) -> tuple[dict[str, Numeric], Tensor | None]:
    """The scalars now, and the count of steps if the rule has one."""
    scalars: dict[str, Any] = dict(given)
    rate = given["learning_rate"]
    if callable(rate):
        scalars["learning_rate"] = rate(state[-1].count)
        check_hyperparameter("learning_rate(count)", scalars["learning_rate"])
    return scalars, state[0].count + 1 if "correction1" in rule.scalars else None


def _next_state(rule: StepRule, state: Any, count: Tensor | None, moments: list[Tree]) -> Any:
    rate_state = state[-1]
    if isinstance(rate_state, ScaleByScheduleState):
        rate_state = ScaleByScheduleState(rate_state.count + 1)
    if not rule.moments:
        return (rate_state,)
    first = type(state[0])(*([] if count is None else [count]), *moments)
    return (first, *state[1:-1], rate_state)


def _groups(columns: Columns, decays: list[bool] | None) -> list[tuple[list[int], bool]] | None:
    """The leaves that go together, those of the same dtypes and device, and whether they decay.

    None if a leaf's columns lie on several devices, or its moments have not the dtype of its arithmetic.
    """
    size, decays = len(columns[0]), decays or [True] * len(columns[0])
    alone = [set(kinds) for kinds in (*(map(_kind, column) for column in columns), decays)]
    groups: dict[Any, list[int]] = {}
    if all(len(kinds) == 1 for kinds in alone):
        groups[tuple(kinds.pop() for kinds in alone)] = list(range(size))
    else:
        for i, kind in enumerate(zip(*(map(_kind, column) for column in columns), decays, strict=True)):
            groups.setdefault(kind, []).append(i)
    for (dtype, device), (_, grad_device), *moments, _ in groups:
        if grad_device != device or any(moment != (precise_dtype(dtype), device) for moment in moments):
            return None
    return [(members, kind[-1]) for kind, members in groups.items()]


def _by_group(
    function: Callable[[Columns, bool], Columns], columns: Columns, groups: list[tuple[list[int], bool]]
) -> Columns:
    """Call a function of columns once a group of leaves, and put the results together in the leaves' order."""
    if not groups:
        return [[] for j in range(len(columns)) if j != 1]
    if len(groups) == 1:
        return function(columns, groups[0][1])
    found = [function([[column[i] for i in members] for column in columns], decays) for members, decays in groups]
    order = [i for members, _ in groups for i in members]
    joined = [itertools.chain.from_iterable(parts) for parts in zip(*found, strict=True)]
    return [[x for _, x in sorted(zip(order, column, strict=True), key=lambda pair: pair[0])] for column in joined]


def _small(columns: Columns) -> bool:
    return all(x.is_cpu for x in columns[0]) and sum(map(Tensor.numel, columns[0])) < FUSE_FROM
