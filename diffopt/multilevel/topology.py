"""The shape of a program: which levels lie below which, in what order they move, and what is missing."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffopt.multilevel.level import Edge, Level

__all__ = ["Topology", "topology"]


class Topology(NamedTuple):
    """A valid program.

    Attributes:
        order: All names, lower levels first.
        lowers: The levels directly below each.
        below: All levels below each.
        outside: What the best response of each depends on: what it and those below it read, and do not contain.
        edges: The edge from each level to each level below it; where that is not direct, the first along the way.
    """

    order: tuple[str, ...]
    lowers: dict[str, tuple[str, ...]]
    below: dict[str, frozenset[str]]
    outside: dict[str, tuple[str, ...]]
    edges: dict[tuple[str, str], Edge]

    @property
    def roots(self) -> tuple[str, ...]:
        """The levels below none."""
        covered = frozenset().union(*self.below.values()) if self.below else frozenset()
        return tuple(name for name in self.order if name not in covered)


def topology(levels: Mapping[str, Level], edges: Sequence[Edge]) -> Topology:
    """Check a program and order it.

    Args:
        levels: The levels by name.
        edges: The edges.

    Returns:
        Its shape.

    Raises:
        ValueError: If a name is unknown, edges are double or form a cycle, a read has no edge that explains it, an
            edge explains nothing, or a level is joined to no other.
    """
    _check_names(levels, edges)
    lowers = {name: tuple(e.lower for e in edges if e.upper == name) for name in levels}
    order = _ordered(lowers)
    below: dict[str, frozenset[str]] = {}
    for name in order:
        below[name] = frozenset(lowers[name]).union(*(below[lower] for lower in lowers[name]))
    _check_reads(levels, below)
    outside = {name: _outside(name, levels, below) for name in order}
    _check_edges(levels, edges, below, outside)
    direct = {(e.upper, e.lower): e for e in edges}
    chosen = {
        (upper, lower): direct.get((upper, lower)) or _last_edge(edges, below, upper, lower)
        for upper in order
        for lower in below[upper]
    }
    return Topology(order, lowers, below, outside, chosen)


def _check_names(levels: Mapping[str, Level], edges: Sequence[Edge]) -> None:
    if not levels:
        raise ValueError("a program needs at least one level")
    known = ", ".join(map(repr, levels))
    for name, level in levels.items():
        if not isinstance(level, Level):
            raise TypeError(f"levels must be a dict from names to Level; got {type(level).__name__} for {name!r}")
        for read in level.reads:
            if read not in levels:
                raise ValueError(f"level {name!r} reads {read!r}, which is no level; the levels are {known}")
            if read == name:
                raise ValueError(f"level {name!r} reads itself; its own parameters are the loss's first argument")
    for edge in edges:
        for name in (edge.upper, edge.lower):
            if name not in levels:
                raise ValueError(f"an edge joins {edge.upper!r} to {edge.lower!r}, but {name!r} is no level: {known}")
    pairs = [(e.upper, e.lower) for e in edges]
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise ValueError(f"there are two edges from {pair[0]!r} to {pair[1]!r}")


def _ordered(lowers: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Lower levels first; a cycle raises, naming its members."""
    order: list[str] = []
    path: list[str] = []

    def visit(name: str) -> None:
        if name in path:
            cycle = " > ".join([*path[path.index(name) :], name])
            raise ValueError(f"the edges form a cycle, {cycle}: of two players, give one an edge to the other alone")
        if name in order:
            return
        path.append(name)
        for lower in lowers[name]:
            visit(lower)
        path.pop()
        order.append(name)

    for name in lowers:
        visit(name)
    return tuple(order)


def _check_reads(levels: Mapping[str, Level], below: Mapping[str, frozenset[str]]) -> None:
    for name, level in levels.items():
        for read in level.reads:
            if read not in below[name] and name not in below[read]:
                raise ValueError(
                    f"level {name!r} reads {read!r}, but no edge says which of them is above: add "
                    f"Edge({name!r}, {read!r}, ...) if {name!r} is optimized over the response of {read!r}, the other "
                    f"way round if not, or with method=Detached() for players"
                )


def _outside(name: str, levels: Mapping[str, Level], below: Mapping[str, frozenset[str]]) -> tuple[str, ...]:
    inner = below[name] | {name}
    found = (read for member in (name, *sorted(below[name])) for read in levels[member].reads)
    return tuple(dict.fromkeys(read for read in found if read not in inner))


def _check_edges(levels, edges, below, outside) -> None:
    joined = {name for e in edges for name in (e.upper, e.lower)}
    for name in levels:
        if len(levels) > 1 and name not in joined:
            raise ValueError(f"level {name!r} is joined to no other by an edge: nothing that it does has an effect")
    for edge in edges:
        family = below[edge.upper] | {edge.upper}
        if not any(edge.lower in levels[member].reads for member in family - {edge.lower}):
            raise ValueError(
                f"Edge({edge.upper!r}, {edge.lower!r}): neither {edge.upper!r} nor a level below it reads "
                f"{edge.lower!r}, so its response has no effect"
            )
        if not family & set(outside[edge.lower]):
            raise ValueError(
                f"Edge({edge.upper!r}, {edge.lower!r}): the loss of {edge.lower!r} reads neither {edge.upper!r} nor a "
                f"level between them, so it has no response"
            )


def _last_edge(edges: Sequence[Edge], below: Mapping[str, frozenset[str]], upper: str, lower: str) -> Edge:
    return next(e for e in edges if e.lower == lower and e.upper in below[upper])
