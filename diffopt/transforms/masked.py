"""Transformations of some leaves: the masked ones, each by its label, or none."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from optree import PyTreeSpec, registry
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from diffopt import tree
from diffopt.transforms.base import EmptyState, GradientTransformation
from diffopt.transforms.leaves import flatten_floating, flatten_like
from diffopt.transforms.masks import broadcast, mask_leaves
from diffopt.typing import Tree

__all__ = ["MaskedNode", "MaskedState", "PartitionState", "freeze", "masked", "partition"]


class MaskedNode:
    """A subtree without leaves, in the place of a leaf that a transformation does not see."""

    # no NamedTuple: dynamo (torch 2.13) takes a dict of empty ones for a constant, and cannot flatten that
    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskedNode)

    def __hash__(self) -> int:
        return hash(MaskedNode)

    def __repr__(self) -> str:
        return "MaskedNode()"


register_pytree_node(  # in the trees of torch, which `vmap` takes apart
    MaskedNode,
    lambda node: ([], None),
    lambda children, _: MaskedNode(),  # pyright: ignore[reportArgumentType]
)
registry.register_pytree_node(
    MaskedNode,  # pyright: ignore[reportArgumentType]
    lambda node: ((), None, ()),
    lambda _, children: MaskedNode(),  # pyright: ignore[reportArgumentType]
    namespace=vars(registry)["__GLOBAL_NAMESPACE"],
)


class MaskedState(NamedTuple):
    """The state of `masked`.

    Attributes:
        inner_state: The state of the inner transformation for the leaves where the mask holds.
    """

    inner_state: Any


class PartitionState(NamedTuple):
    """The state of `partition`.

    Attributes:
        inner_states: From each label to its transformation's state for its leaves.
    """

    inner_states: dict[str, Any]


def masked(inner: GradientTransformation, mask: Tree | Callable[[Tree], Tree]) -> GradientTransformation:
    """Apply a transformation to the leaves where a mask holds, and pass the others through.

    Args:
        inner: The transformation. It sees trees with `MaskedNode` in place of the other leaves.
        mask: A tree of bools with the structure of the parameters, a prefix of one (a bool stands for the whole
            subtree in its place), or a function from the parameters to either. (torch.compile does not trace
            `diffopt.tree.map` to values that are no tensors; in such a function, use `optree.tree_map`.)

    Returns:
        A transformation with `MaskedState`.

    Raises:
        TypeError: In init and update, if an entry of the mask is not a bool.
        ValueError: In init and update, if the mask is no prefix of the parameters.

    Example:
        >>> from diffopt.transforms import scale
        >>> t = masked(scale(-1.0), {"w": True, "b": False})
        >>> grads = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> t.update(grads, t.init(grads))[0]
        {'w': tensor([-1.]), 'b': tensor([1.])}
    """

    def init(params: Tree) -> MaskedState:
        leaves, treespec = flatten_floating(params, "params")
        return MaskedState(inner.init(_chosen(leaves, treespec, mask_leaves(mask, params))))

    def update(updates: Tree, state: MaskedState, params: Tree | None = None, **extra: Any) -> tuple[Tree, MaskedState]:
        grads, treespec = flatten_floating(updates, "updates")
        holds = mask_leaves(mask, updates if params is None else params)
        out, inner_state = _update_chosen(inner, holds, grads, treespec, state.inner_state, params, extra)
        return tree.unflatten(treespec, out), MaskedState(inner_state)

    return GradientTransformation(init, update)


def partition(
    transformations: Mapping[str, GradientTransformation], labels: Tree | Callable[[Tree], Tree]
) -> GradientTransformation:
    """Apply to each leaf the transformation that its label names.

    Args:
        transformations: From labels to transformations.
        labels: A tree of strings with the structure of the parameters, a prefix of one, or a function from the
            parameters to either, as in `masked`.

    Returns:
        A transformation with `PartitionState`.

    Raises:
        TypeError: In init and update, if an entry of the labels is not a string.
        ValueError: In init and update, if the labels are no prefix of the parameters, or one names no
            transformation.

    Example:
        >>> from diffopt.transforms import scale
        >>> t = partition({"slow": scale(-0.1), "fast": scale(-1.0)}, {"w": "slow", "b": "fast"})
        >>> grads = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> t.update(grads, t.init(grads))[0]
        {'w': tensor([-0.1000]), 'b': tensor([-1.])}
    """
    members = dict(transformations)

    def label_leaves(params: Tree) -> list[str]:
        named = labels(params) if callable(labels) else labels
        found = broadcast(named, tree.flatten(params)[1], str, "labels")
        unknown = sorted(set(found) - set(members))
        if unknown:
            raise ValueError(f"`labels` must name transformations, of {sorted(members)}; got {unknown}.")
        return found

    return partition_leaves(members, label_leaves)


def freeze(mask: Tree | Callable[[Tree], Tree]) -> GradientTransformation:
    """Set the updates to 0 where a mask holds, so that those parameters stay.

    Args:
        mask: A tree of bools, a prefix of one, or a function from the parameters to either, as in `masked`.

    Returns:
        A transformation with `MaskedState`.

    Raises:
        TypeError: In init and update, if an entry of the mask is not a bool.
        ValueError: In init and update, if the mask is no prefix of the parameters.

    Example:
        >>> t, grads = freeze({"w": True, "b": False}), {"w": torch.ones(1), "b": torch.ones(1)}
        >>> t.update(grads, t.init(grads))[0]
        {'w': tensor([0.]), 'b': tensor([1.])}
    """

    def update(updates: Tree, state: EmptyState, params: Tree | None = None, **extra: Any) -> tuple[Tree, EmptyState]:
        return tree.map(torch.zeros_like, updates), state

    return masked(GradientTransformation(lambda params: EmptyState(), update), mask)


def partition_leaves(
    members: Mapping[str, GradientTransformation], label_leaves: Callable[[Tree], list[str]]
) -> GradientTransformation:
    """Apply to each leaf the transformation that a list of labels, made from the parameters, names."""

    def init(params: Tree) -> PartitionState:
        leaves, treespec = flatten_floating(params, "params")
        found = label_leaves(params)
        states = {
            name: member.init(_chosen(leaves, treespec, [label == name for label in found]))
            for name, member in members.items()
        }
        return PartitionState(states)

    def update(
        updates: Tree, state: PartitionState, params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, PartitionState]:
        out, treespec = flatten_floating(updates, "updates")
        found, states = label_leaves(updates if params is None else params), {}
        for name, member in members.items():
            holds = [label == name for label in found]
            out, states[name] = _update_chosen(member, holds, out, treespec, state.inner_states[name], params, extra)
        return tree.unflatten(treespec, out), PartitionState(states)

    return GradientTransformation(init, update)


def _chosen(leaves: list[Tensor], treespec: PyTreeSpec, holds: list[bool]) -> Tree:
    return tree.unflatten(treespec, [x if chosen else MaskedNode() for x, chosen in zip(leaves, holds, strict=True)])


def _update_chosen(
    inner: GradientTransformation,
    holds: list[bool],
    grads: list[Tensor],
    treespec: PyTreeSpec,
    state: Any,
    params: Tree | None,
    extra: dict[str, Any],
) -> tuple[list[Tensor], Any]:
    seen = None
    if params is not None:
        seen = _chosen(flatten_like(params, grads, treespec, name="params"), treespec, holds)
    updates, state = inner.update(_chosen(grads, treespec, holds), state, seen, **extra)
    new = iter(tree.leaves(updates))
    return [next(new) if chosen else g for g, chosen in zip(grads, holds, strict=True)], state
