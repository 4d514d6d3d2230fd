"""Checkpoints of `torch.optim` as states of transformations, and back: Adam, AdamW and SGD."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms import GradientTransformation, ScaleByAdamState, ScaleByScheduleState, TraceState
from diffopt.transforms.leaves import flatten_floating, flatten_like
from diffopt.typing import Tree

__all__ = ["from_torch_state", "to_torch_state"]

STATES = (ScaleByAdamState, TraceState, ScaleByScheduleState)


def from_torch_state(
    source: torch.optim.Optimizer | Mapping[str, Any],
    optimizer: GradientTransformation,
    params: Tree,
    *,
    names: Sequence[str] | None = None,
) -> Any:
    r"""Turn the state of `torch.optim.Adam`, AdamW or SGD into that of a transformation, to train on exactly.

    .. math:: \mu = \texttt{exp\_avg}, \quad \nu = \texttt{exp\_avg\_sq}, \quad m = \texttt{momentum\_buffer}, \quad
        t = \texttt{step}

    Hyperparameters are not part of the state: give `optimizer` those of torch (``weight_decay`` of Adam and SGD is
    ``chain(add_decayed_weights(weight_decay), adam(...))`` here). Parameters are matched by identity where source is an
    optimizer of the very leaves of params; by order where params is a list, a tuple or a tensor; else by name, such as
    ``"layer.weight"`` for the leaf ``params["layer.weight"]`` or ``params["layer"]["weight"]``.

    Args:
        source: A torch optimizer, or its state dict. Moments are of the shapes of the parameters.
        optimizer: The transformation, such as `adam`, `adamw`, `sgd`, or a chain with one of them.
        params: The parameters, a tree of floating-point tensors.
        names: The names of torch's parameters, in its order. Default: those that it was given
            (``torch.optim.Adam(model.named_parameters())``).

    Returns:
        The state, in new memory. Where torch has no state yet it is that of ``optimizer.init(params)``.

    Raises:
        ValueError: If source is of another optimizer; if it has an option that the transformation cannot follow
            (amsgrad, maximize, dampening, momentum where that has none, several groups with different hyperparameters)
            or counts that differ among parameters; if parameters cannot be matched, or shapes differ; or if the
            transformation keeps a state that torch's has not.
        TypeError: If a leaf of params is not a floating-point tensor.

    Example:
        >>> from diffopt.optimizers import adam
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> source = torch.optim.Adam([weight], lr=0.1)
        >>> weight.grad = torch.ones(2)
        >>> source.step()
        >>> state = from_torch_state(source.state_dict(), adam(0.1), [weight])
        >>> state[0].count, state[0].mu
        (tensor(1), [tensor([0.1000, 0.1000])])
    """
    leaves, treespec = flatten_floating(params, "params")
    saved = _read_source(source)
    order = _match(source, saved, params, leaves, names)
    with torch.no_grad():
        state = optimizer.init(params)
    parts, outer = optree.tree_flatten(state, is_leaf=_is_known)
    moments = _moments_of(parts, saved.kind)
    if saved.momentum and moments is None:
        raise ValueError(f"torch.optim.SGD has momentum={saved.momentum}, and the transformation none.")
    own = [saved.state.get(i, {}) for i in order]
    count = _common_count(own) if saved.kind == "Adam" else None
    columns = {name: _column(own, key, leaves, params) for key, name in _slots(saved.kind, moments)}
    new = []
    for part in parts:
        if part is moments:
            trees = {name: _filled(getattr(part, name), column, treespec) for name, column in columns.items()}
            part = part._replace(**trees) if count is None else part._replace(count=part.count + count, **trees)
        elif isinstance(part, ScaleByScheduleState):
            if count is None and any(own):
                raise ValueError(
                    "torch.optim.SGD keeps no count, from which to resume a schedule. Convert for a constant learning "
                    "rate, or set the count of the ScaleByScheduleState yourself."
                )
            part = part._replace(count=part.count + (count or 0))
        new.append(part)
    return optree.tree_unflatten(outer, new)


def to_torch_state(
    state: Any,
    params: Tree,
    target: torch.optim.Optimizer | Mapping[str, Any],
    *,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Turn the state of a transformation into a state dict of `torch.optim.Adam`, AdamW or SGD, to train on exactly.

    The inverse of `from_torch_state`. Hyperparameters come from the target: give it those of the transformation.

    Args:
        state: The state of `adam`, `adamw`, `sgd`, or a chain with one of them.
        params: The parameters, a tree of floating-point tensors.
        target: The torch optimizer that will load the state dict, or a state dict of it. It is not changed.
        names: The names of torch's parameters, in its order, as in `from_torch_state`.

    Returns:
        A state dict in new memory, for ``target.load_state_dict``.

    Raises:
        ValueError: As `from_torch_state`; and if the state does not match params.
        TypeError: If a leaf of params is not a floating-point tensor.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> _, state = sgd(0.1, 0.9).update([torch.ones(2)], sgd(0.1, 0.9).init([weight]))
        >>> to_torch_state(state, [weight], torch.optim.SGD([weight], lr=0.1, momentum=0.9))["state"]
        {0: {'momentum_buffer': tensor([1., 1.])}}
    """
    leaves, treespec = flatten_floating(params, "params")
    saved = _read_source(target)
    order = _match(target, saved, params, leaves, names)
    moments = _moments_of(optree.tree_leaves(state, is_leaf=_is_known), saved.kind)
    if saved.kind == "SGD" and moments is not None and not saved.momentum:
        raise ValueError("The transformation has momentum, and torch.optim.SGD has momentum=0.")
    template = target.state_dict() if isinstance(target, torch.optim.Optimizer) else target
    new: dict[int, dict[str, Tensor]] = {i: {} for i in order}
    for key, name in _slots(saved.kind, moments):
        column = flatten_like(getattr(moments, name), leaves, treespec, name=f"state.{name}", reference_name="params")
        for i, leaf, value in zip(order, leaves, column, strict=True):
            if isinstance(moments, ScaleByAdamState) and "step" not in new[i]:
                new[i]["step"] = moments.count.detach().to("cpu", torch.get_default_dtype(), copy=True)
            new[i][key] = value.detach().to(leaf.dtype, copy=True)
    groups = [{**group, "params": list(group["params"])} for group in template["param_groups"]]
    return {"state": {i: new[i] for i in sorted(new) if new[i]}, "param_groups": groups}


class _Saved(NamedTuple):
    """A torch state dict, read and checked."""

    kind: str
    momentum: float
    names: list[str] | None
    ids: list[int]
    state: Mapping[int, Mapping[str, Any]]


def _read_source(source: torch.optim.Optimizer | Mapping[str, Any]) -> _Saved:
    saved = source.state_dict() if isinstance(source, torch.optim.Optimizer) else source
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        raise ValueError("Expected a torch optimizer or its state dict, with 'state' and 'param_groups'.")
    groups = saved["param_groups"]
    kind = _kind(groups[0])
    options = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups]
    for group in options:
        differing = sorted(key for key in {*group, *options[0]} if group.get(key) != options[0].get(key))
        if differing:
            raise ValueError(
                f"The groups differ in {differing}, and a transformation has one set of hyperparameters. Convert each "
                "group by itself, and step them by `diffopt.transforms.partition`."
            )
    for key in ("amsgrad", "maximize", "dampening"):
        if options[0].get(key):
            remedy = (
                "`diffopt.optimizers.amsgrad` starts anew" if key == "amsgrad" else "there is no such transformation"
            )
            raise ValueError(f"{kind} with {key}={options[0][key]} cannot be converted: {remedy}.")
    names = [name for group in groups for name in group.get("param_names", ())]
    momentum = options[0].get("momentum", 0.0)
    return _Saved(kind, momentum, names or None, [i for group in groups for i in group["params"]], saved["state"])


def _kind(group: Mapping[str, Any]) -> str:
    if {"betas", "amsgrad"} <= set(group):
        return "Adam"
    if {"momentum", "dampening"} <= set(group):
        return "SGD"
    raise ValueError(
        f"Only torch.optim.Adam, AdamW and SGD can be converted; got groups with the options {sorted(group)}."
    )


def _match(source: Any, saved: _Saved, params: Tree, leaves: list[Tensor], names: Sequence[str] | None) -> list[int]:
    """The id of torch's parameter for each leaf."""
    if len(leaves) != len(saved.ids):
        raise ValueError(f"params has {len(leaves)} tensors, and the torch optimizer {len(saved.ids)} parameters.")
    names = saved.names if names is None else names
    if isinstance(source, torch.optim.Optimizer):
        held = {id(p): i for p, i in zip((p for g in source.param_groups for p in g["params"]), saved.ids, strict=True)}
        if {id(leaf) for leaf in leaves} == set(held):
            return [held[id(leaf)] for leaf in leaves]
    if _is_ordered(params):
        return list(saved.ids)
    if names is None:
        raise ValueError(
            "The order of params, which is that of sorted keys, is not torch's. Pass `names`, such as "
            "[name for name, _ in model.named_parameters()], or a list in torch's order."
        )
    ours = [".".join(map(str, path)) for path in optree.tree_paths(params)]
    if sorted(ours) != sorted(names) or len(set(ours)) < len(ours):
        difference = sorted(set(ours) ^ set(names))
        raise ValueError(f"The names of params are not those of torch's parameters; they differ in {difference}.")
    ids = dict(zip(names, saved.ids, strict=True))
    return [ids[name] for name in ours]


def _is_ordered(params: Any) -> bool:
    """Whether the order of the leaves is one that the user wrote down: a tensor, or a list or tuple of tensors."""
    if isinstance(params, (list, tuple)):
        return all(isinstance(leaf, Tensor) for leaf in params)
    return isinstance(params, Tensor)


def _is_known(x: Any) -> bool:
    return isinstance(x, STATES)


def _moments_of(parts: list[Any], kind: str) -> Any:
    """The one part of a state that holds what torch's optimizer of that kind keeps, or None for plain SGD."""
    for part in parts:
        if not _is_known(part):
            raise ValueError(f"The transformation keeps a state that torch.optim.{kind} has not: {part!r:.60}.")
    moments = [part for part in parts if not isinstance(part, ScaleByScheduleState)]
    wanted = ScaleByAdamState if kind == "Adam" else TraceState
    if len(moments) > 1 or any(not isinstance(part, wanted) for part in moments) or (kind == "Adam" and not moments):
        found = [type(part).__name__ for part in moments]
        raise ValueError(f"torch.optim.{kind} needs a transformation with one {wanted.__name__}; this has {found}.")
    return moments[0] if moments else None


def _slots(kind: str, moments: Any) -> list[tuple[str, str]]:
    if kind == "Adam":
        return [("exp_avg", "mu"), ("exp_avg_sq", "nu")]
    return [] if moments is None else [("momentum_buffer", "trace")]


def _common_count(own: Sequence[Mapping[str, Any]]) -> int:
    counts = {int(values["step"]) if values else 0 for values in own}
    if len(counts) > 1:
        raise ValueError(
            f"torch's parameters have taken different numbers of steps, {sorted(counts)}, and a transformation counts "
            "them together. Convert those of one count at a time, and step them by `diffopt.transforms.partition`."
        )
    return counts.pop() if counts else 0


def _column(own: Sequence[Mapping[str, Any]], key: str, leaves: Sequence[Tensor], params: Tree) -> list[Tensor | None]:
    """One moment of all parameters; None where torch has none yet."""
    column = [values.get(key) for values in own]
    for i, (value, leaf) in enumerate(zip(column, leaves, strict=True)):
        if value is not None and value.shape != leaf.shape:
            raise ValueError(
                f"torch's {key} for `params{tree.paths(params)[i]}` must have shape {tuple(leaf.shape)}; got "
                f"{tuple(value.shape)}."
            )
    return column


def _filled(initial: Tree, column: Sequence[Tensor | None], treespec: optree.PyTreeSpec) -> Tree:
    fresh = tree.leaves(initial)
    new = [x if v is None else v.detach().to(x, copy=True) for x, v in zip(fresh, column, strict=True)]
    return tree.unflatten(treespec, new)
