"""Quadratic programs of several shapes, and an oracle that solves them by linear algebra alone."""

import torch
from torch import Tensor
from torch.func import grad, jacrev

from diffopt import random
from diffopt.multilevel import Edge, Level, graph
from diffopt.optimizers import sgd

SHAPES = {
    "two levels": {"a": "b", "b": "a"},
    "three, the top reads all": {"a": "bc", "b": "ac", "c": "ab"},
    "three, by neighbours": {"a": "b", "b": "ac", "c": "b"},
    "three, the top acts through the response of the middle alone": {"a": "c", "b": "ac", "c": "b"},
    "four, by neighbours": {"a": "b", "b": "ac", "c": "bd", "d": "c"},
    "diamond": {"a": "bcd", "b": "ad", "c": "ad", "d": "bc"},
    "two lower levels": {"a": "bc", "b": "a", "c": "a"},
    "one lower level of two": {"a": "c", "b": "c", "c": "ab"},
}
EDGES = {
    "two levels": ["ab"],
    "three, the top reads all": ["ab", "bc"],
    "three, by neighbours": ["ab", "bc"],
    "three, the top acts through the response of the middle alone": ["ab", "bc"],
    "four, by neighbours": ["ab", "bc", "cd"],
    "diamond": ["ab", "ac", "bd", "cd"],
    "two lower levels": ["ab", "ac"],
    "one lower level of two": ["ac", "bc"],
}
SIZES = {"a": 2, "b": 3, "c": 4, "d": 2}


def quadratic(name: str, reads: str):
    """A strongly convex loss of a level's own vector, with cross terms of what it reads, and of that alone."""
    key = random.fold_in(random.key(7), ord(name))
    names = [name, *reads]
    sizes = [SIZES[n] for n in names]
    A = random.normal(key, (sum(sizes), sum(sizes)), dtype=torch.float64) / 4
    H = A @ A.T + torch.eye(sum(sizes), dtype=torch.float64)
    g = random.normal(random.fold_in(key, 1), (sum(sizes),), dtype=torch.float64)

    def loss(own: Tensor, *others) -> Tensor:
        z = torch.cat([own, *others[: len(reads)]])
        return z @ H @ z / 2 + g @ z

    return loss


def program(shape: str, method, *, response="total", **options):
    """The graph of a shape, with one method on all edges."""
    reads = SHAPES[shape]
    levels = {name: Level(quadratic(name, r), sgd(0.1), reads=tuple(r), **options) for name, r in reads.items()}
    return graph(levels, [Edge(u, l, method, response=response) for u, l in EDGES[shape]])


def groups_below(shape: str, name: str) -> list[str]:
    """The levels below one, upper ones first; those that answer each other together."""
    found: list[str] = []
    for upper, lower in EDGES[shape]:
        if upper == name or any(upper in group for group in found):
            found.append(lower)
    found = list(dict.fromkeys(found))
    return ["bc", "d"] if found == ["b", "c", "d"] and shape == "diamond" else found


def solved(shape: str, name: str, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """What lies below a level at its best response, given the vectors of the level and of those above."""
    known = {n: x for n, x in known.items() if not any(n in group for group in groups_below(shape, name))}
    for group in groups_below(shape, name):
        sizes = [SIZES[member] for member in group]

        def slopes(z, group=group, known=dict(known), sizes=sizes):  # noqa: B006
            here = {**known, **dict(zip(group, z.split(sizes), strict=True))}
            at = lambda member: lambda x: value(shape, member, {**here, member: x})  # noqa: E731
            return torch.cat([grad(at(member))(here[member]) for member in group])

        zero = torch.zeros(sum(sizes), dtype=torch.float64)
        z = torch.linalg.solve(jacrev(slopes)(zero), -slopes(zero))  # the losses are quadratic
        known |= dict(zip(group, z.split(sizes), strict=True))
    return known


def value(shape: str, name: str, known: dict[str, Tensor]) -> Tensor:
    """The loss of a level where all below it is at its best response."""
    known = solved(shape, name, known)
    return quadratic(name, SHAPES[shape][name])(known[name], *(known[r] for r in SHAPES[shape][name]))


def true_gradient(shape: str, name: str, known: dict[str, Tensor]) -> Tensor:
    """The total gradient of a level, by central differences of the oracle's value, exact for a quadratic."""
    units = torch.eye(SIZES[name], dtype=torch.float64)
    at = lambda x: value(shape, name, {**known, name: x})  # noqa: E731
    return torch.stack([(at(known[name] + e) - at(known[name] - e)) / 2 for e in units])


def start(shape: str) -> dict[str, Tensor]:
    """A vector for each level; what lies below the roots is at its best response."""
    key = random.key(3)
    known = {n: random.normal(random.fold_in(key, ord(n)), (SIZES[n],), dtype=torch.float64) for n in SHAPES[shape]}
    lowers = {lower for _, lower in EDGES[shape]}
    for name in known.keys() - lowers:
        known |= solved(shape, name, {n: x for n, x in known.items() if n not in lowers})
    return known
