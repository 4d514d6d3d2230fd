r"""Bounds on trees, as bounds on flat vectors.

.. math:: l \le x \le u
"""

import torch
from torch import Tensor

from diffopt import tree
from diffopt.typing import Tree

__all__ = ["check_bounds", "flat_bounds"]


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
    lower, upper = (None, None) if bounds is None else (_flat(bound, init) for bound in bounds)
    return lower, upper


def _flat(bound: Tree, init: Tree) -> Tensor | None:
    if bound is None:
        return None
    if isinstance(bound, (int, float)) or (isinstance(bound, Tensor) and not isinstance(init, Tensor)):
        bound = tree.map(lambda x: torch.as_tensor(bound), init)
    return tree.ravel(
        tree.map(lambda x, b: torch.as_tensor(b, dtype=x.dtype, device=x.device).expand(x.shape), init, bound)
    )[0]
