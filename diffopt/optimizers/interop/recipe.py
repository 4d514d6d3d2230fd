"""How a parameter group's options become a gradient transformation."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import required

from diffopt.transforms import GradientTransformation

__all__ = ["Recipe", "build", "check_options", "read_recipe"]

FREE_KEYS = {"params", "param_names", "name", "initial_lr"}
"""Keys of a group that are no hyperparameters: torch's own, and a label."""


class Recipe(NamedTuple):
    """What makes the transformation of a group.

    Attributes:
        factory: Gives the transformation from hyperparameters.
        names: From keys of the group to arguments of the factory.
        fixed: Arguments that are the same for all groups, and not stored in them: functions, trees, transformations.
    """

    factory: Callable[..., GradientTransformation]
    names: dict[str, str]
    fixed: dict[str, Any]


class _Constant(NamedTuple):
    """The factory of a ready transformation."""

    transformation: GradientTransformation

    def __call__(self) -> GradientTransformation:
        return self.transformation


def read_recipe(
    optimizer: GradientTransformation | Callable[..., GradientTransformation], given: Mapping[str, Any]
) -> tuple[Recipe, dict[str, Any]]:
    """Read a factory's signature.

    Args:
        optimizer: A factory, or a ready transformation.
        given: Hyperparameters by name; ``lr`` is the factory's ``learning_rate``.

    Returns:
        The recipe, and the defaults of the groups.

    Raises:
        TypeError: If a name is not one of the factory's, if that takes ``*args`` or ``**kwargs``, or if optimizer is
            neither factory nor transformation.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> read_recipe(sgd, {"lr": 0.1})[1]
        {'lr': 0.1, 'momentum': None, 'nesterov': False}
    """
    if isinstance(optimizer, GradientTransformation):
        if given:
            raise TypeError(
                f"`to_torch` of a ready transformation takes no hyperparameters; got {sorted(given)}. Pass the factory "
                "itself, such as to_torch(adam, params, lr=1e-3)."
            )
        return Recipe(_Constant(optimizer), {}, {}), {}
    if not callable(optimizer):
        raise TypeError(
            f"`to_torch` needs a transformation or a function that makes one, such as adam; got {optimizer!r:.60}."
        )
    options = {}
    for name, parameter in inspect.signature(optimizer).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(
                f"`to_torch` needs a factory whose arguments have names; {parameter} has none. Write one such as "
                "def factory(learning_rate, b1=0.9), or pass the ready transformation."
            )
        options[name] = required if parameter.default is parameter.empty else parameter.default
    names = {"lr" if name == "learning_rate" else name: name for name in options}
    _check_names(given, set(names), "`to_torch`")
    options = {key: given.get(key, options[name]) for key, name in names.items()}
    fixed = {names[key]: value for key, value in options.items() if not (value is required or _is_plain(value))}
    recipe = Recipe(optimizer, {key: name for key, name in names.items() if name not in fixed}, fixed)
    return recipe, {key: options[key] for key in recipe.names}


def check_options(recipe: Recipe, group: Mapping[str, Any]) -> None:
    """Check the keys of a new group, and that what it holds can be stored in a state dict.

    Args:
        recipe: What makes the transformation.
        group: The group.

    Raises:
        TypeError: If a key is no hyperparameter, or its value no number, string, bool, None or 0-d tensor.

    Example:
        >>> check_options(Recipe(lambda learning_rate: None, {"lr": "learning_rate"}, {}), {"learning_rate": 1.0})
        Traceback (most recent call last):
        ...
        TypeError: A parameter group has no hyperparameter 'learning_rate': it is called 'lr'.
    """
    options = {key: value for key, value in group.items() if key not in FREE_KEYS}
    _check_names(options, set(recipe.names), "A parameter group")
    for key, value in options.items():
        if not _is_plain(value):
            raise TypeError(
                f"A group's {key!r} must be a number, string, bool, None or 0-d tensor, which a state dict can hold; "
                f"got {value!r:.60}. Give functions and trees to `to_torch`, for all groups."
            )


def build(recipe: Recipe, group: Mapping[str, Any]) -> GradientTransformation:
    """Make a group's transformation.

    Args:
        recipe: What makes it.
        group: The group.

    Returns:
        The transformation.

    Raises:
        TypeError: If the factory gives none, or as it raises.
        ValueError: If the group lacks a hyperparameter, or as the factory raises.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> isinstance(build(read_recipe(sgd, {})[0], {"lr": 0.1, "momentum": 0.9, "nesterov": False}), tuple)
        True
    """
    missing = sorted(set(recipe.names) - set(group))
    if missing:
        raise ValueError(
            f"A parameter group lacks the hyperparameters {missing}. Was the state dict another optimizer's?"
        )
    made = recipe.factory(**{name: group[key] for key, name in recipe.names.items()}, **recipe.fixed)
    if not isinstance(made, GradientTransformation):
        raise TypeError(f"The factory must give a GradientTransformation; got a {type(made).__name__}.")
    return made


def _check_names(given: Mapping[str, Any], known: set[str], subject: str) -> None:
    for key in given:
        if key in known:
            continue
        if key == "learning_rate" and "lr" in known:
            raise TypeError(f"{subject} has no hyperparameter 'learning_rate': it is called 'lr'.")
        raise TypeError(f"{subject} has no hyperparameter {key!r}; the factory's are {sorted(known)}.")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str)) or (isinstance(value, Tensor) and not value.ndim)
