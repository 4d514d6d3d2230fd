r"""Bounds on trees, as bounds on flat vectors.

.. math:: l \le x \le u
"""

import torch
from torch import Tensor

from diffopt import tree
from diffopt.typing import Tree

__all__ = ["check_bounds", "crossed_bounds", "flat_bounds"]


def check_bounds(bounds: tuple[Tree, Tree] | None) -> None:
    """Raise unless bounds are None or a pair.

    Args:
        bounds: What a verb was given.

    Raises:
        ValueError: If they are anything else.
    """
    if bounds is not None and not (isinstance(bounds, tuple) and len(bounds) == 2):
        raise ValueError(f"bounds must be a pair (lower, upper), each possibly None; got {bounds!r}")


def flat_bounds(bounds: tuple[Tree, Tree] | None, init: Tree) -> tuple[Tensor | None, Tensor | None]:
    """Both bounds as vectors.

    Args:
        bounds: A pair, or None. Each is a tree like `init`, whose leaves may be expanded; or a number, or for a tree a
            tensor, that holds for every leaf; or None.
        init: The tree of the unknowns.

    Returns:
        The lower and the upper bounds, differentiable in those given; None where there are none.

    Example:
        >>> flat_bounds((0.0, None), {"a": torch.ones(2), "b": torch.ones(())})
        (tensor([0., 0., 0.]), None)
    """
    if bounds is None:
        return None, None
    return _flat(bounds[0], init, "the lower bound"), _flat(bounds[1], init, "the upper bound")


def crossed_bounds(bounds: tuple[Tree, Tree] | None, init: Tree) -> Tensor | None:
    """Whether a lower bound lies above its upper one.

    Args:
        bounds: A pair, or None.
        init: The tree of the unknowns.

    Returns:
        A bool tensor, or None where there are no two bounds.

    Example:
        >>> crossed_bounds((0.0, torch.tensor([1.0, -1.0])), torch.ones(2))
        tensor(True)
    """
    if bounds is None or bounds[0] is None or bounds[1] is None:
        return None
    lower, upper = flat_bounds(bounds, init)
    assert lower is not None
    assert upper is not None
    return (lower.detach() > upper.detach()).any()


def _flat(bound: Tree, init: Tree, name: str) -> Tensor | None:
    if bound is None:
        return None
    if isinstance(bound, (int, float)) or (isinstance(bound, Tensor) and not isinstance(init, Tensor)):
        bound = tree.map(lambda x: bound, init)
    tree.check_same_structure(bound, init, name=name, reference_name="init")
    return tree.ravel(tree.map(lambda x, b: _expanded(b, x, name), init, bound))[0]


def _expanded(bound: Tensor | float, x: Tensor, name: str) -> Tensor:
    if not isinstance(bound, (int, float, Tensor)):
        raise TypeError(f"{name} must hold numbers or tensors; got {type(bound).__name__}")
    bound = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    ends = x.shape[x.dim() - bound.dim() :] if bound.dim() <= x.dim() else ()
    if bound.dim() > x.dim() or any(b not in (1, n) for b, n in zip(bound.shape, ends, strict=True)):
        raise ValueError(f"{name} must expand to the shape of init, {tuple(x.shape)}; got {tuple(bound.shape)}")
    return bound.expand(x.shape)
