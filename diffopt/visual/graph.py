"""The graph behind a tensor, as autograd holds it, and the part of it that has names."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Graph", "Place", "condense", "parents_of", "place_of", "trace"]


class Place(NamedTuple):
    """One output of one operation; of a leaf, its accumulation.

    Attributes:
        function: The node of autograd.
        index: Which of its outputs.
    """

    function: Any
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


class Graph(NamedTuple):
    """What a picture shows.

    Attributes:
        places: The nodes, every one before what it is made of.
        edges: Pairs (from, to), in the direction of the computation.
    """

    places: list[Place]
    edges: list[tuple[Place, Place]]


def place_of(tensor: Tensor) -> Place | None:
    """Where a tensor stands in a graph; None where it is a constant. An alias stands where its tensor does."""
    if not tensor.requires_grad:
        return None
    with torch.inference_mode(False), torch.enable_grad():
        alias = tensor.view_as(tensor)  # of a leaf, too, it has a node, with the leaf's above
    place = Place(alias.grad_fn, 0)
    while _renames(place, tensor):
        place = next(parents_of(place))
    return place


def _renames(place: Place, tensor: Tensor) -> bool:
    """Whether a node is a view of the whole, as inner gradients take of what they differentiate in."""
    sizes = getattr(place.function, "_saved_self_sym_sizes", None)
    return place.function.name() == "ViewBackward0" and tuple(sizes or ()) == tuple(tensor.shape)


def parents_of(place: Place) -> Iterator[Place]:
    """What an operation takes, of which a gradient is wanted."""
    for function, index in place.function.next_functions:
        if function is not None:
            yield Place(function, index)


def trace(roots: Iterable[Place]) -> Graph:
    """All that the roots are made of, operation by operation."""
    return _explore(roots, parents_of)


def condense(roots: Iterable[Place], kept: Callable[[Place], bool]) -> Graph:
    """What the roots are made of, of which only what is kept and leaves are shown: an edge is a way past the others."""
    return _explore(roots, lambda place: _kept_parents(place, kept))


def _explore(roots: Iterable[Place], above: Callable[[Place], Iterable[Place]]) -> Graph:
    places, edges, queue = {}, {}, list(roots)
    while queue:
        place = queue.pop()
        if place in places:
            continue
        places[place] = None
        for parent in above(place):
            edges[parent, place] = None
            queue.append(parent)
    return Graph(list(places), list(edges))


def _kept_parents(place: Place, kept: Callable[[Place], bool]) -> list[Place]:
    """The nearest kept ones above a place, leaves among them."""
    found, seen, queue = {}, set(), list(parents_of(place))
    while queue:
        parent = queue.pop()
        if parent in seen:
            continue
        seen.add(parent)
        if kept(parent) or not parent.function.next_functions:
            found[parent] = None
        else:
            queue.extend(parents_of(parent))
    return list(found)
