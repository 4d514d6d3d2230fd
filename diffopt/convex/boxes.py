r"""Projections onto boxes, the non-negative orthant, and the section of a box by a hyperplane.

.. math:: \min_y \tfrac12 \|y - x\|^2 \quad\text{s.t.}\quad l \le y \le u, \quad w^\top y = c
"""

from typing import TypeAlias

import torch
from torch import Tensor

from diffopt import tree
from diffopt.convex.arguments import (
    detached,
    flatten_floating,
    flatten_vector,
    like_vector,
    scalar,
    spread,
    spread_vector,
    unless,
)
from diffopt.typing import Numeric, Tree

__all__ = ["clip", "projection_box", "projection_box_section", "projection_non_negative"]

_Section: TypeAlias = tuple[Tensor, Tensor, Tensor, Numeric]  # the bounds, the normal and the offset


def projection_non_negative(x: Tree) -> Tree:
    r"""Project onto the non-negative orthant: :math:`y = \max(x, 0)`.

    Args:
        x: A tree of floating-point tensors of any shapes.

    Returns:
        A tree like x. The derivative at an entry of 0 is 0.

    Raises:
        TypeError: If a leaf is not a floating-point tensor.

    Example:
        >>> projection_non_negative(torch.tensor([1.0, -2.0]))
        tensor([1., 0.])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.2.4.
    """
    leaves, treespec = flatten_floating(x, "x")
    return tree.unflatten(treespec, [torch.relu(leaf) for leaf in leaves])


def projection_box(x: Tree, lower: Tree, upper: Tree) -> Tree:
    r"""Project onto a box: :math:`y = \min(\max(x, l), u)`.

    Args:
        x: A tree of floating-point tensors of any shapes.
        lower: The bound l: a number, a tensor that broadcasts to each leaf, or a tree like x of those; may be -inf.
        upper: The bound u, likewise; may be inf.

    Returns:
        A tree like x. Bounds carry gradient where they hold.

    Raises:
        TypeError: If a leaf or a bound is not floating-point.
        ValueError: If a bound has another shape, or a lower bound is above an upper one.

    Example:
        >>> projection_box(torch.tensor([1.5, -2.0, 0.3]), 0.0, 1.0)
        tensor([1.0000, 0.0000, 0.3000])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.2.4.
    """
    leaves, treespec = flatten_floating(x, "x")
    lowers, uppers = spread(lower, leaves, treespec, "lower"), spread(upper, leaves, treespec, "upper")
    triples = list(zip(leaves, lowers, uppers, strict=True))
    for _, low, high in triples:
        _check_bounds(low, high)
    return tree.unflatten(treespec, [clip(leaf, low, high) for leaf, low, high in triples])


def projection_box_section(x: Tree, lower: Tree, upper: Tree, w: Tree, c: Numeric) -> Tree:
    r"""Project onto the part of a box that lies in a hyperplane.

    .. math:: \arg\min_y \tfrac12 \|y - x\|^2 \ \text{s.t.}\ l \le y \le u,\ w^\top y = c
              \;=\; \min(\max(x - \tau w, l), u)

    The threshold :math:`\tau` is found exactly, by a binary search among the entries' breakpoints; the derivatives are
    those of its formula on the entries that are strictly between their bounds.

    Args:
        x: A tree of floating-point tensors of one dtype, taken as one vector.
        lower: The bound l, as in `projection_box`.
        upper: The bound u, likewise.
        w: The normal, a tree like x, of any signs; entries may be 0.
        c: The offset, a number or a 0-d tensor.

    Returns:
        A tree like x. `w = 1, l = 0, u = 1, c = 1` is the simplex.

    Raises:
        TypeError: If a leaf is not floating-point.
        ValueError: If shapes differ, a lower bound is above an upper one, or no point of the box has `w y = c`.

    Example:
        >>> x, ones = torch.tensor([0.6, 0.1, -0.4, 0.55]), torch.ones(4)
        >>> projection_box_section(x, 0.0, 1.0, ones, 1.0)
        tensor([0.5167, 0.0167, 0.0000, 0.4667])

    References:
        Kiwiel, "Breakpoint searching algorithms for the continuous quadratic knapsack problem", 2008, eq. 1.3.
    """
    vector, unravel = flatten_vector(x, "x")
    low = spread_vector(lower, x, "lower").to(vector.dtype)
    high = spread_vector(upper, x, "upper").to(vector.dtype)
    w, c = like_vector(w, x, vector, "w"), scalar(c, "c", vector)
    _check_bounds(low, high)
    fixed = low.detach(), high.detach(), w.detach(), detached(c)
    _check_section(*fixed)
    # a shift along w moves no projection, and once the threshold is near 0 no digits are lost to large entries
    start = vector.detach()
    vector = vector - _threshold(start, fixed, _active_sets(start, fixed)) * w
    sets = _active_sets(vector.detach(), fixed)
    free, at_low, _ = sets
    inner = clip(vector - _threshold(vector, (low, high, w, c), sets) * w, fixed[0], fixed[1])
    return unravel(torch.where(free, inner, torch.where(at_low, low, high)))


def clip(x: Tensor, lower: Numeric, upper: Numeric) -> Tensor:
    """The tensor between its bounds, whose derivative goes to the bound that holds, else to the tensor."""
    return torch.where(x < lower, lower, torch.where(x > upper, upper, x))


def _active_sets(x: Tensor, problem: _Section) -> tuple[Tensor, Tensor, Tensor]:
    """Which entries are strictly between the bounds, at the lower, and at the upper one, at the threshold."""
    lower, upper, w, _ = problem
    moving = w != 0
    slope = torch.where(moving, w, 1.0)
    to_upper, to_lower = (x - upper) / slope, (x - lower) / slope
    first = torch.where(moving, torch.minimum(to_upper, to_lower), torch.inf)
    last = torch.where(moving, torch.maximum(to_upper, to_lower), torch.inf)
    left, right = _segment(x, problem, torch.cat([first, last]))
    before, after = first >= right, last <= left
    pinned_low = torch.where(moving, torch.where(w > 0, after, before), x <= lower)
    pinned_high = torch.where(moving, torch.where(w > 0, before, after), x >= upper)
    still = ~moving & ~pinned_low & ~pinned_high
    return (moving & ~before & ~after) | still, pinned_low, pinned_high


def _segment(x: Tensor, problem: _Section, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The neighbours among the breakpoints between which w y(t) - c, which falls with t, changes its sign."""
    lower, upper, w, c = problem
    finite = ends.isfinite()
    filler = torch.where(finite, ends, -torch.inf).amax()
    ends = torch.where(finite, ends, torch.where(filler.isfinite(), filler, 0.0)).sort().values
    some = finite.any()
    low = torch.zeros((), dtype=torch.int64, device=x.device)
    high = torch.full_like(low, ends.numel())
    for _ in range(ends.numel().bit_length()):  # low counts the breakpoints whose value is known to be at least 0
        middle = (low + high) // 2
        at = ends.gather(0, middle.clamp(max=ends.numel() - 1).reshape(1))
        value = torch.where(w != 0, w * clip(x - at * w, lower, upper), 0.0).sum() - c
        rising = (low < high) & (value >= 0)
        low, high = torch.where(rising, middle + 1, low), torch.where(rising, high, middle)
    left = ends.gather(0, (low - 1).clamp(min=0).reshape(1)).squeeze(0)
    right = ends.gather(0, low.clamp(max=ends.numel() - 1).reshape(1)).squeeze(0)
    return (
        torch.where(some & (low > 0), left, -torch.inf),
        torch.where(some & (low < ends.numel()), right, torch.inf),
    )


def _threshold(x: Tensor, problem: _Section, sets: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    (lower, upper, w, c), (free, at_low, at_high) = problem, sets
    pinned = torch.where(at_low, lower, torch.where(at_high, upper, 0.0))
    slope = torch.where(free, w, 0.0)
    total = (slope * x).sum() + (w * pinned).sum() - c
    squares = (slope * slope).sum()
    return torch.where(squares > 0, total / torch.where(squares > 0, squares, 1.0), 0.0)


def _check_bounds(lower: Numeric, upper: Numeric) -> None:
    if isinstance(lower, Tensor) or isinstance(upper, Tensor):
        sound = torch.as_tensor(detached(lower)) <= torch.as_tensor(detached(upper))
        unless(sound, "`lower` must be at most `upper`; an entry is above it, or NaN. Are the bounds swapped?")
    elif not lower <= upper:
        raise ValueError(f"`lower` must be at most `upper`; got {lower} and {upper}. Are the bounds swapped?")


def _check_section(lower: Tensor, upper: Tensor, w: Tensor, c: Numeric) -> None:
    ends = torch.where(w != 0, w * lower, 0.0), torch.where(w != 0, w * upper, 0.0)
    least, most = torch.minimum(*ends).sum(), torch.maximum(*ends).sum()
    finite = torch.where(torch.maximum(*ends).isfinite(), torch.maximum(*ends).abs(), 0.0).sum()
    finite = finite + torch.where(torch.minimum(*ends).isfinite(), torch.minimum(*ends).abs(), 0.0).sum()
    slack = 8 * torch.finfo(w.dtype).eps * finite
    unless(
        (least - slack <= c) & (c <= most + slack),
        "no point of the box has `w y = c`: c must lie between the least and the greatest value of w y over the box. "
        "Widen the bounds or change c.",
    )
