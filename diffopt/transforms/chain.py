r"""Composition: each transformation takes the updates of the one before it."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.donation import check_donation
from diffopt.typing import Tree

__all__ = ["chain", "named_chain"]


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    r"""Apply transformations one after the other.

    .. math:: u = (T_n \circ \cdots \circ T_1)(g)

    Its own `step` runs the updates of all members but the last, then the last member's `step`, if that one
    has a step; extra keyword arguments go to the members whose signature takes them.

    Args:
        *transformations: The members, in order of application. None at all makes an identity.

    Returns:
        A transformation whose state is the tuple of its members' states.

    Raises:
        TypeError: If a member is not a `GradientTransformation`.
        ValueError: In update and step, if the state has not one entry a member.

    Example:
        >>> import torch
        >>> from diffopt.transforms import scale, trace
        >>> transformation = chain(trace(0.9), scale(-0.1))
        >>> params = torch.ones(2)
        >>> updates, state = transformation.update(params, transformation.init(params))
        >>> updates
        tensor([-0.1000, -0.1000])
    """
    for i, member in enumerate(transformations):
        if not isinstance(member, GradientTransformation):
            raise TypeError(
                f"`chain` needs GradientTransformations; argument {i} is a {type(member).__name__}. "
                "Unpack lists: chain(*members)."
            )

    def init(params: Tree) -> tuple[Any, ...]:
        return tuple(member.init(params) for member in transformations)

    def update(
        updates: Tree, state: tuple[Any, ...], params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, tuple[Any, ...]]:
        _check_state(state, len(transformations))
        new_state = []
        for member, substate in zip(transformations, state, strict=True):
            updates, substate = member.update(updates, substate, params, **_accepted(member.update, extra))
            new_state.append(substate)
        return updates, tuple(new_state)

    if not transformations or transformations[-1].step is None:
        return GradientTransformation(init, update)
    prefix, last_step = chain(*transformations[:-1]), transformations[-1].step

    def step(grads: Tree, state: tuple[Any, ...], params: Tree, **extra: Any) -> tuple[Tree, tuple[Any, ...]]:
        _check_state(state, len(transformations))
        given = {name: value for name, value in extra.items() if name != "donate"}
        updates, new_state = prefix.update(grads, state[:-1], params, **given)
        if extra.get("donate") and not torch.compiler.is_compiling():
            # a member may keep the parameters that it saw, as they are
            check_donation(_floating((params, state[-1])), _floating(new_state))
        params, last_state = last_step(updates, state[-1], params, **_accepted(last_step, extra))
        return params, (*new_state, last_state)

    return GradientTransformation(init, update, step)


def named_chain(*members: tuple[str, GradientTransformation]) -> GradientTransformation:
    r"""Apply transformations one after the other, each with its state under a name.

    .. math:: u = (T_n \circ \cdots \circ T_1)(g)

    Args:
        *members: Pairs of a name and a transformation, in order of application.

    Returns:
        A transformation whose state is a dict from names to the members' states.

    Raises:
        TypeError: If a member is not a pair of a string and a `GradientTransformation`.
        ValueError: If a name is used twice.

    Example:
        >>> import torch
        >>> from diffopt.transforms import scale, trace
        >>> named = named_chain(("momentum", trace(0.9)), ("step", scale(-0.1)))
        >>> named.init(torch.zeros(1))["momentum"]
        TraceState(trace=tensor([0.]))
    """
    for member in members:
        if not isinstance(member, tuple) or len(member) != 2 or not isinstance(member[0], str):
            raise TypeError(f"`named_chain` needs pairs of a name and a transformation; got {member!r:.60}.")
    names = [name for name, _ in members]
    if len(set(names)) < len(names):
        raise ValueError(f"`named_chain` needs different names; got {names}.")
    inner = chain(*(transformation for _, transformation in members))

    def named(states: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(names, states, strict=True))

    def init(params: Tree) -> dict[str, Any]:
        return named(inner.init(params))

    def update(
        updates: Tree, state: dict[str, Any], params: Tree | None = None, **extra: Any
    ) -> tuple[Tree, dict[str, Any]]:
        updates, states = inner.update(updates, tuple(state[name] for name in names), params, **extra)
        return updates, named(states)

    inner_step = inner.step
    if inner_step is None:
        return GradientTransformation(init, update)

    def step(grads: Tree, state: dict[str, Any], params: Tree, **extra: Any) -> tuple[Tree, dict[str, Any]]:
        params, states = inner_step(grads, tuple(state[name] for name in names), params, **extra)
        return params, named(states)

    return GradientTransformation(init, update, step)


def _check_state(state: tuple[Any, ...], members: int) -> None:
    if not isinstance(state, tuple) or len(state) != members:
        got = f"{len(state)} entries" if isinstance(state, tuple) else type(state).__name__
        raise ValueError(
            f"`chain` of {members} needs a state of {members} entries; got {got}. Take the state from this "
            "chain's own init."
        )


def _floating(trees: Any) -> list[Tensor]:
    return [x for x in tree.leaves(trees) if x.is_floating_point()]


def _accepted(function: Callable[..., Any], extra: dict[str, Any]) -> dict[str, Any]:
    # torch.compile does not trace `inspect`; compiled members must take **extra, as the grammar says.
    if not extra or torch.compiler.is_compiling():
        return extra
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return extra
    return {name: value for name, value in extra.items() if name in parameters}
