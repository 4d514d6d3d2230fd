"""Hyperparameters in the state, where they are seen, changed, vmapped and saved."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.leaves import check_hyperparameter, flatten_floating, zero_count
from diffopt.typing import Tree

__all__ = ["InjectHyperparamsState", "inject_hyperparams"]


class InjectHyperparamsState(NamedTuple):
    """The state of `inject_hyperparams`.

    Attributes:
        count: Steps taken, an int64 0-d tensor.
        hyperparams: From names to 0-d tensors: what the next step uses, but for schedules.
        inner_state: The state of the inner transformation.
    """

    count: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    hyperparams: dict[str, Tensor]
    inner_state: Any


def inject_hyperparams(
    inner_factory: Callable[..., GradientTransformation], static_args: Sequence[str] = ()
) -> Callable[..., GradientTransformation]:
    """Make a factory of transformations that keep their hyperparameters in the state.

    Numbers become 0-d float64 tensors. Change one by ``state._replace(hyperparams={**state.hyperparams, ...})``;
    vmap over states to run several values at once. Functions are schedules: their value at each step is written
    into the state. Everything else, and what `static_args` names, stays outside.

    Args:
        inner_factory: A function of hyperparameters that gives a transformation, such as `adam`.
        static_args: Names of arguments that are not hyperparameters, though they are numbers or functions (such as a
            mask that is a function).

    Returns:
        A function with the arguments of inner_factory, whose transformations have `InjectHyperparamsState`.

    Raises:
        TypeError: By the function, if an argument is unknown, or as inner_factory raises.
        ValueError: By the function, as inner_factory raises.

    Example:
        >>> from diffopt.transforms import scale
        >>> t = inject_hyperparams(scale)(step_size=-0.5)
        >>> state = t.init(torch.ones(1))
        >>> state.hyperparams
        {'step_size': tensor(-0.5000, dtype=torch.float64)}
        >>> t.update(torch.ones(1), state._replace(hyperparams={"step_size": torch.tensor(-2.0)}))[0]
        tensor([-2.])
    """
    signature = inspect.signature(inner_factory)
    unknown = sorted(set(static_args) - set(signature.parameters))
    if unknown:
        raise TypeError(f"`static_args` must name arguments of {inner_factory.__name__}; it has no {unknown}.")

    def factory(*args: Any, **kwargs: Any) -> GradientTransformation:
        inner_factory(*args, **kwargs)  # raises for values out of range, which tensors would hide
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name not in static_args}
        schedules: dict[str, Any] = {name: value for name, value in given.items() if callable(value)}
        numbers = {name: value for name, value in given.items() if _is_numeric(value)}

        def inner(hyperparams: dict[str, Tensor]) -> GradientTransformation:
            filled = inspect.BoundArguments(signature, type(bound.arguments)({**bound.arguments, **hyperparams}))
            return inner_factory(*filled.args, **filled.kwargs)

        def scheduled(count: Tensor) -> dict[str, Tensor]:
            values = {name: schedule(count) for name, schedule in schedules.items()}
            for name, value in values.items():
                check_hyperparameter(f"{name}(count)", value)
            return {name: _tensor(value, count) for name, value in values.items()}

        def init(params: Tree) -> InjectHyperparamsState:
            count = zero_count(flatten_floating(params, "params")[0])
            hyperparams = {name: _tensor(value, count) for name, value in numbers.items()} | scheduled(count)
            return InjectHyperparamsState(count, hyperparams, inner(hyperparams).init(params))

        def update(
            updates: Tree, state: InjectHyperparamsState, params: Tree | None = None, **extra: Any
        ) -> tuple[Tree, InjectHyperparamsState]:
            hyperparams = state.hyperparams | scheduled(state.count)
            updates, inner_state = inner(hyperparams).update(updates, state.inner_state, params, **extra)
            return updates, InjectHyperparamsState(state.count + 1, hyperparams, inner_state)

        return GradientTransformation(init, update)

    return factory


def _is_numeric(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.is_floating_point()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tensor(value: Any, count: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device=count.device)
