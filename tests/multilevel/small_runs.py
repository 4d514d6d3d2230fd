"""A program of two levels that is quick to run, and batches for it."""

import torch

from diffopt import random, tree
from diffopt.linalg import CG
from diffopt.multilevel import Edge, Implicit, Level, graph
from diffopt.optimizers import adam, sgd

DATA = random.normal(random.key(1), (12, 2), dtype=torch.float64)


def program(method=None, steps=3, **options):
    levels = {
        "a": Level(lambda a, b, x: ((b - 2.0) ** 2).mean() + 0 * a.sum(), adam(0.1), reads=("b",)),
        "b": Level(lambda b, a, x: ((b - a - x) ** 2).mean(), sgd(0.3), reads=("a",), steps=steps, **options),
    }
    two = graph(levels, [Edge("a", "b", method or Implicit(CG(max_steps=2)))])
    values = {"a": torch.full((2,), 0.5, dtype=torch.float64), "b": torch.full((2,), 1.0, dtype=torch.float64)}
    return two, two.init(random.key(0), values)


def same(found, want):
    pairs = zip(tree.leaves(found), tree.leaves(want), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def poisoned(bad, level="b"):
    """The batches of a function of the update, NaN for one level in some updates."""

    def batches(update):
        spoiled = {level: torch.nan} if update in bad else {}
        return {name: DATA[update % 12] * spoiled.get(name, 1.0) for name in "ab"}

    return batches
