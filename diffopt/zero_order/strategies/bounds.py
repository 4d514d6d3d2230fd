r"""Bounds of the search: a member outside is moved to the nearest point of the box.

.. math:: x \leftarrow \min(\max(x, l), u)

The strategy learns from the members as moved, and its mean is moved in the same way. Clipping, unlike reflection,
reaches an optimum that lies on the boundary exactly, and takes bounds on one side.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from diffopt import tree
from diffopt.random.dispatch import runs_eagerly
from diffopt.typing import Tree

__all__ = ["Bounds", "Limit", "check_bounds", "clip", "flat_bounds"]

Bounds: TypeAlias = tuple[Tree, Tree] | None
"""A pair (lower, upper), or None. Each is a number, or a tree like the parameters whose leaves may be expanded (for a
tree of parameters, a tensor holds for every leaf), or None."""

Limit: TypeAlias = float | Tensor | None


def check_bounds(bounds: Bounds) -> None:
    """Raise unless bounds are None or a pair in order.

    Args:
        bounds: What a strategy was given.

    Raises:
        ValueError: If they are anything else, or two numbers of which the lower is the higher.

    Example:
        >>> check_bounds((1.0, -1.0))
        Traceback (most recent call last):
        ...
        ValueError: the lower bound must be at most the upper one; got (1.0, -1.0).
    """
    if bounds is None:
        return
    if not (isinstance(bounds, tuple) and len(bounds) == 2):
        raise ValueError(f"bounds must be a pair (lower, upper), each possibly None; got {bounds!r}.")
    lower, upper = bounds
    if isinstance(lower, (int, float)) and isinstance(upper, (int, float)) and not lower <= upper:
        raise ValueError(f"the lower bound must be at most the upper one; got {bounds!r}.")


def flat_bounds(bounds: Bounds, params: Tree) -> tuple[Limit, Limit]:
    """Both bounds as numbers or flat vectors.

    Args:
        bounds: As a strategy takes them.
        params: The tree of the unknowns.

    Returns:
        The lower and the upper bound; None where there is none.

    Raises:
        ValueError: If a lower bound is above the upper one, where values can be read, or if structures differ.

    Example:
        >>> flat_bounds((0.0, {"a": torch.tensor([1.0, 2.0])}), {"a": torch.ones(2)})
        (0.0, tensor([1., 2.]))
    """
    if bounds is None:
        return None, None
    lower, upper = (_flat(bound, params) for bound in bounds)
    if lower is not None and upper is not None:
        ordered = torch.as_tensor(lower) <= torch.as_tensor(upper)
        if runs_eagerly(ordered) and not bool(ordered.all()):
            raise ValueError("a lower bound is above the upper one, or NaN; make every lower bound at most the upper.")
    return lower, upper


def clip(x: Tensor, limits: tuple[Limit, Limit]) -> Tensor:
    """Move what lies outside to the nearest point of the box.

    Args:
        x: Shape (..., n).
        limits: From `flat_bounds`.

    Returns:
        A tensor like x.

    Example:
        >>> clip(torch.tensor([-1.0, 3.0]), (0.0, torch.tensor([1.0, 2.0])))
        tensor([0., 2.])
    """
    lower, upper = limits
    x = x if lower is None else x.clamp(min=lower)
    return x if upper is None else x.clamp(max=upper)


def _flat(bound: Tree, params: Tree) -> Limit:
    if bound is None or isinstance(bound, (int, float)):
        return bound
    if isinstance(bound, Tensor) and not isinstance(params, Tensor):
        bound = tree.map(lambda x: bound, params)
    expanded = tree.map(lambda x, b: torch.as_tensor(b, dtype=x.dtype, device=x.device).expand(x.shape), params, bound)
    return tree.ravel(expanded)[0]
