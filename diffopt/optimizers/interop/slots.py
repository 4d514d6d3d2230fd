"""States parameter by parameter: which of their tensors belong to one, and which to all that step together.

A transformation sees a group as the list of its parameters, with `MaskedNode` in place of those that do not step. So
the lists of that length in its state hold one entry a parameter; all else, such as a count, is shared.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms import GradientTransformation
from diffopt.transforms.masked import MaskedNode
from diffopt.typing import Tree

__all__ = ["Layout", "check_separable", "find_layout", "keeps_params", "place", "unaliased"]


class Layout(NamedTuple):
    """The structure of a state.

    Attributes:
        treespec: Its structure.
        slots: For each leaf a name, the same for all parameters, and the index of its parameter, or None if shared.
    """

    treespec: optree.PyTreeSpec
    slots: tuple[tuple[str, int | None], ...]


def place(values: Mapping[int, Tensor], size: int) -> list[Any]:
    """Make the list of a group of which some parameters step.

    Args:
        values: From indices in the group to tensors.
        size: The number of parameters of the group.

    Returns:
        A list of that length.

    Example:
        >>> place({1: torch.ones(1)}, 2)
        [MaskedNode(), tensor([1.])]
    """
    return [values.get(i, MaskedNode()) for i in range(size)]


def find_layout(state: Any, size: int) -> Layout:
    """Find out which leaves of a state belong to which parameter.

    Args:
        state: The state of a transformation for a list of parameters.
        size: The length of the list.

    Returns:
        The layout.

    Example:
        >>> from diffopt.optimizers import adam
        >>> find_layout(adam(0.1).init([torch.ones(1), torch.ones(2)]), 2).slots[:3]
        (('[0].count', None), ('[0].mu', 0), ('[0].mu', 1))
    """

    def is_place(x: Any) -> bool:
        return type(x) is list and len(x) == size

    slots: list[tuple[str, int | None]] = []
    accessors = optree.tree_accessors(state, is_leaf=is_place)
    for accessor, part in zip(accessors, optree.tree_leaves(state, is_leaf=is_place), strict=True):
        path = accessor.codify("")
        if is_place(part):
            slots += [(path + inner, i) for i, entry in enumerate(part) for inner in tree.paths(entry)]
        else:
            slots.append((path, None))
    return Layout(tree.flatten(state)[1], tuple(slots))


def unaliased(leaves: Iterable[Tensor], others: Iterable[Tensor], kept: Iterable[Tensor] = ()) -> list[Tensor]:
    """Copy the leaves of a state that lie in memory which will be written: parameters and gradients.

    Args:
        leaves: The leaves of the new state.
        others: The tensors that will be written.
        kept: Tensors known not to lie there.

    Returns:
        The leaves, or copies.

    Example:
        >>> gradient = torch.ones(1)
        >>> unaliased([gradient], [gradient])[0] is gradient
        False
    """
    written = {x.untyped_storage().data_ptr() for x in others}
    known = set(map(id, kept))
    return [x.clone() if id(x) not in known and x.untyped_storage().data_ptr() in written else x for x in leaves]


def check_separable(
    transformation: GradientTransformation,
    params: Sequence[Tensor],
    cohorts: Sequence[Sequence[int]],
    everyone: Sequence[int],
) -> None:
    """Raise if parameters that step apart would have an influence on each other if they stepped together.

    It takes a first step for each cohort alone, on one entry a parameter, and compares it with those in which the
    gradients of all others are NaN, and infinite.

    Args:
        transformation: The transformation.
        params: The parameters of the group.
        cohorts: The indices of those that step together, for each set that is to be checked against all others.
        everyone: The indices of all that have a state.

    Raises:
        ValueError: If they would.

    Example:
        >>> from diffopt.optimizers import adam, prodigy
        >>> check_separable(adam(0.1), [torch.ones(1), torch.ones(1)], [[0], [1]], [0, 1])
        >>> check_separable(prodigy(), [torch.ones(1), torch.ones(1)], [[0], [1]], [0, 1])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: Parameters of one group have had gradients at different steps, and this transformation...
    """
    small = [_stand_in(p) for p in params]
    for cohort in cohorts:
        alone = _first_step(transformation, small, cohort, cohort, 1.0)
        for poison in (math.nan, math.inf):
            if not all(map(_equal, alone, _first_step(transformation, small, everyone, cohort, poison))):
                raise ValueError(
                    "Parameters of one group have had gradients at different steps, and this transformation computes "
                    "over all of them together (as a global norm does). Give them groups of their own, or gradients "
                    "of 0 instead of None: zero_grad(set_to_none=False)."
                )


def keeps_params(transformation: GradientTransformation, params: Sequence[Tensor], members: Sequence[int]) -> bool:
    """Tell whether a state holds the very parameters, which then must not be written before it is copied.

    Args:
        transformation: The transformation.
        params: The parameters of the group.
        members: The indices of those that step.

    Returns:
        A bool, from a first step on one entry a parameter.

    Example:
        >>> from diffopt.optimizers import adam
        >>> keeps_params(adam(0.1), [torch.ones(3)], [0])
        False
    """
    small = place({i: _stand_in(params[i]) for i in members}, len(params))
    grads = tree.map(torch.ones_like, small)
    _, state = transformation.update(grads, transformation.init(small), small, **_EXTRA)
    leaves = tree.leaves(state)
    return any(x is not y for x, y in zip(leaves, unaliased(leaves, tree.leaves(small)), strict=True))


def _same(perturbed: Tree) -> Tree:
    return perturbed


_EXTRA = {"value": 1.0, "grad_fn": _same}


def _stand_in(param: Tensor) -> Tensor:
    return torch.ones((1,) * param.ndim, dtype=param.dtype, device=param.device)


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, 0, 0, equal_nan=True)


def _first_step(
    transformation: GradientTransformation,
    params: Sequence[Tensor],
    members: Sequence[int],
    own: Sequence[int],
    poison: float,
) -> list[Tensor]:
    """What the parameters in `own` get and keep from a first step, where the others' gradients are poisoned."""
    size, chosen = len(params), set(own)
    here = place({i: params[i] for i in members}, size)
    grads = place({i: torch.full_like(params[i], 1.0 if i in chosen else poison) for i in members}, size)
    updates, state = transformation.update(grads, transformation.init(here), here, **_EXTRA)
    found = [updates[i] for i in own]
    slots = find_layout(state, size).slots
    return found + [x for (_, i), x in zip(slots, tree.leaves(state), strict=True) if i is None or i in chosen]
