r"""Bounds of the search: members outside are reflected before they are evaluated, and the strategy does not know.

.. math:: x = l + \min(t, 2 w - t), \qquad t = (y - l) \bmod 2 w, \quad w = u - l

so that x runs up and down between the bounds as y grows; with one bound, :math:`x = l + |y - l|` or
:math:`u - |u - y|`.

A strategy learns from the members that it drew, so that what it knows of its own Gaussian stays true; learning from
clipped or reflected members instead lets active CMA-ES and xNES diverge where the optimum lies on the boundary.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from diffopt import tree
from diffopt.random.dispatch import runs_eagerly
from diffopt.typing import Tree

__all__ = ["Bounds", "check_bounds", "reflect"]

Bounds: TypeAlias = tuple[Tree, Tree] | None
"""A pair (lower, upper), or None. Each is a number or a tensor that holds for every leaf, or a tree like the parameters
whose leaves may be expanded, or None; entries may be infinite."""


def check_bounds(bounds: Bounds, params: Tree) -> None:
    """Raise unless bounds are None, or a pair in order that fits the parameters.

    Args:
        bounds: What a run was given.
        params: The parameters.

    Raises:
        ValueError: If they are no pair, structures or shapes differ, or a lower bound is above the upper one, where
            values can be read.

    Example:
        >>> check_bounds((1.0, -1.0), torch.ones(2))
        Traceback (most recent call last):
        ...
        ValueError: every lower bound must be at most the upper one; got a lower one above, or NaN, for `params`.
    """
    if bounds is None:
        return
    if not (isinstance(bounds, tuple) and len(bounds) == 2):
        raise ValueError(f"`bounds` must be a pair (lower, upper), each possibly None; got {bounds!r:.60}.")
    leaves, treespec = tree.flatten(params)
    for i, (x, lower, upper) in enumerate(zip(leaves, *_limits(bounds, leaves, treespec), strict=True)):
        if torch.broadcast_shapes(x.shape, lower.shape, upper.shape) != x.shape:
            raise ValueError(
                f"`bounds` must expand to the shape {tuple(x.shape)} of `params{tree.paths(params)[i]}`; "
                f"got {tuple(lower.shape)} and {tuple(upper.shape)}."
            )
        ordered = lower <= upper
        if runs_eagerly(ordered) and not bool(ordered.all()):
            raise ValueError(
                "every lower bound must be at most the upper one; got a lower one above, or NaN, for "
                f"`params{tree.paths(params)[i]}`."
            )


def reflect(population: Tree, bounds: Bounds) -> Tree:
    """Reflect what lies outside of bounds back into them, as often as it takes.

    Args:
        population: A tree of tensors, of one member or of many, with the members first.
        bounds: A pair (lower, upper), each a number or a tensor that holds for every leaf, a tree like a member, or
            None; or None for no bounds.

    Returns:
        A tree like the population.

    Raises:
        ValueError: If structures differ.

    Example:
        >>> reflect(torch.tensor([-0.5, 0.25, 1.5, 2.25]), (0.0, 1.0))
        tensor([0.5000, 0.2500, 0.5000, 0.2500])
        >>> reflect(torch.tensor([-0.5, 0.25]), (0.0, None))
        tensor([0.5000, 0.2500])
    """
    if bounds is None:
        return population
    leaves, treespec = tree.flatten(population)
    rows = zip(leaves, *_limits(bounds, leaves, treespec), strict=True)
    return tree.unflatten(treespec, [_reflected(x, lower, upper) for x, lower, upper in rows])


def _limits(bounds: tuple[Tree, Tree], leaves: list[Tensor], treespec) -> tuple[list[Tensor], list[Tensor]]:
    """Lower and upper bounds of each leaf, as tensors that broadcast with it."""
    lower, upper = (
        _spread(bound, leaves, treespec, name, default)
        for bound, name, default in zip(bounds, ("lower", "upper"), (-math.inf, math.inf), strict=True)
    )
    return lower, upper


def _spread(bound: Tree, leaves: list[Tensor], treespec, name: str, default: float) -> list[Tensor]:
    values = [default if bound is None else bound] * len(leaves)
    if bound is not None and not isinstance(bound, (int, float, Tensor)):
        values, spec = tree.flatten(bound)
        if spec != treespec:
            tree.check_same_structure(
                bound, tree.unflatten(treespec, leaves), name=f"{name} bounds", reference_name="params"
            )
    return [torch.as_tensor(value, dtype=x.dtype, device=x.device) for x, value in zip(leaves, values, strict=True)]


def _reflected(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    low, high = lower > -math.inf, upper < math.inf
    width = torch.where(low & high, upper - lower, 1.0)
    turn = torch.where(width > 0, 2 * width, 1.0)
    phase = torch.remainder(x - torch.where(low, lower, 0.0), turn)
    inside = torch.where(width > 0, lower + torch.minimum(phase, turn - phase), lower)
    either = torch.where(low, lower + (x - lower).abs(), torch.where(high, upper - (upper - x).abs(), x))
    return torch.where(low & high, torch.minimum(torch.maximum(inside, lower), upper), either)
