r"""Composition: each transformation takes the updates of the one before it."""

import inspect
from collections.abc import Callable
from typing import Any

from diffopt.transforms.base import GradientTransformation
from diffopt.typing import Tree

__all__ = ["chain"]


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
        updates, new_state = prefix.update(grads, state[:-1], params, **extra)
        params, last_state = last_step(updates, state[-1], params, **_accepted(last_step, extra))
        return params, (*new_state, last_state)

    return GradientTransformation(init, update, step)


def _check_state(state: tuple[Any, ...], members: int) -> None:
    if not isinstance(state, tuple) or len(state) != members:
        got = f"{len(state)} entries" if isinstance(state, tuple) else type(state).__name__
        raise ValueError(
            f"`chain` of {members} needs a state of {members} entries; got {got}. Take the state from this "
            "chain's own init."
        )


def _accepted(function: Callable[..., Any], extra: dict[str, Any]) -> dict[str, Any]:
    if not extra:
        return extra
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return extra
    return {name: value for name, value in extra.items() if name in parameters}
