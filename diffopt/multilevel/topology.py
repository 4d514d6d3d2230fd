"""The shape of a program: which levels lie below which, in what order they move, and what is missing."""

import graphlib
import inspect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from diffopt.multilevel.level import Edge, Level

__all__ = ["Group", "Topology", "topology"]


class Group(NamedTuple):
    """Levels whose best responses depend on each other, as of two that share a lower level; mostly one alone.

    Attributes:
        members: Their names.
        outside: What their joint response depends on.
        edge: The edge whose method differentiates it.
    """

    members: tuple[str, ...]
    outside: tuple[str, ...]
    edge: Edge

    @property
    def name(self) -> str:
        """What it is called in states and reports."""
        return "+".join(self.members)


class Topology(NamedTuple):
    """A valid program.

    Attributes:
        order: All names, lower levels first.
        lowers: The levels directly below each.
        below: All levels below each.
        groups: What lies below each level in groups, each before those that it depends on.
        outside: What the best response of each depends on: what it and those below it read, and do not contain.
        retraced: The levels whose last steps some method takes once more.
    """

    order: tuple[str, ...]
    lowers: dict[str, tuple[str, ...]]
    below: dict[str, frozenset[str]]
    groups: dict[str, tuple[Group, ...]]
    outside: dict[str, tuple[str, ...]]
    retraced: frozenset[str]

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
        TypeError: If levels or edges are something else, or a loss does not take what its level declares.
        ValueError: If a name is unknown, edges are double or form a cycle, a read has no edge that explains it, an
            edge explains nothing, or a level is joined to no other.
    """
    _check_kinds(levels, edges)
    _check_names(levels, edges)
    lowers = {name: tuple(e.lower for e in edges if e.upper == name) for name in levels}
    order = _ordered(lowers)
    below: dict[str, frozenset[str]] = {}
    for name in order:
        below[name] = frozenset(lowers[name]).union(*(below[lower] for lower in lowers[name]))
    _check_reads(levels, below)
    outside = {name: _outside(name, levels, below) for name in order}
    _check_edges(levels, edges, below, outside)
    groups = {name: _groups(name, edges, below, outside) for name in order}
    every = (group for level in groups.values() for group in level)
    retraced = frozenset(name for group in every if group.edge.method.retraces for name in group.members)
    return Topology(order, lowers, below, groups, outside, retraced)


def _check_kinds(levels: Mapping[str, Level], edges: Sequence[Edge]) -> None:
    if not isinstance(levels, Mapping):
        raise TypeError(f"levels must be a dict from names to Level; got {type(levels).__name__}")
    if not levels:
        raise ValueError("a program needs at least one level")
    for name, level in levels.items():
        if not isinstance(name, str) or not isinstance(level, Level):
            raise TypeError(f"levels must be a dict from names to Level; got {type(level).__name__} for {name!r}")
        if "+" in name:
            raise ValueError(f"the name of a level has no '+', which joins the names of several; got {name!r}")
        _check_signature(name, level)
    if not isinstance(edges, Sequence) or not all(isinstance(edge, Edge) for edge in edges):
        raise TypeError(f"edges must be a sequence of Edge; got {edges!r}")


def _check_signature(name: str, level: Level) -> None:
    """Raise unless the loss takes as many arguments as its level declares."""
    try:
        signature = inspect.signature(level.loss)
    except ValueError:  # a builtin that does not tell
        return
    declared = (name, *level.reads, "batch")
    try:
        signature.bind(*declared)
    except TypeError as error:
        raise TypeError(
            f"the loss of level {name!r} is called with {len(declared)} arguments, ({', '.join(declared)}), but its "
            f"signature is {signature}: make `reads` and the arguments fit, own parameters first, the batch last"
        ) from error


def _check_names(levels: Mapping[str, Level], edges: Sequence[Edge]) -> None:
    known = ", ".join(map(repr, levels))
    for name, level in levels.items():
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


def _groups(name, edges, below, outside) -> tuple[Group, ...]:
    inner = sorted(below[name])
    needs = {member: {other for other in outside[member] if other in below[name]} for member in inner}
    reach = {member: _reached(member, needs) for member in inner}
    members = {m: tuple(o for o in inner if o == m or (o in reach[m] and m in reach[o])) for m in inner}
    sorter: graphlib.TopologicalSorter[tuple[str, ...]] = graphlib.TopologicalSorter()
    for m in inner:
        sorter.add(members[m], *{members[o] for o in needs[m]} - {members[m]})
    return tuple(_group(name, group, edges, below, outside) for group in reversed(tuple(sorter.static_order())))


def _reached(name: str, needs: Mapping[str, set[str]]) -> set[str]:
    found, stack = set(), [name]
    while stack:
        new = needs[stack.pop()] - found
        found |= new
        stack += new
    return found


def _group(name, members, edges, below, outside) -> Group:
    depends = dict.fromkeys(other for member in members for other in outside[member])
    direct = [e for e in edges if e.upper == name and e.lower in members]
    inner = [e for e in edges if e.upper in below[name] and e.lower in members]
    return Group(members, tuple(other for other in depends if other not in members), (direct or inner)[0])
