"""Where the batches of a training run come from, such that a run can go on exactly where it was.

A source is a function of the number of a batch, which has no position to lose, or an iterable with `state_dict`.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffopt import random, tree
from diffopt.multilevel.graph import Graph
from diffopt.multilevel.responses import PerStep
from diffopt.typing import Tree

__all__ = ["Batches", "Sources", "minibatches"]

Batches: TypeAlias = Callable[[int], Mapping[str, Any]] | Mapping[str, Callable[[int], Any] | Iterable[Any]]


def minibatches(key: Tensor, data: Tree, size: int) -> Callable[[int], Tree]:
    r"""Batches of data in random order, anew in each epoch, as a pure function of the number of the batch.

    Batch `i` has the entries :math:`\pi_e(b, \dots, b + \text{size} - 1)`, where :math:`b = (i \bmod n)\,\text{size}`,
    the epoch is :math:`e = \lfloor i / n \rfloor`, and `n` batches make an epoch. Entries that fill no batch are left
    out of that epoch.

    Args:
        key: A key.
        data: A tree of tensors with a common leading axis.
        size: How many entries a batch has.

    Returns:
        `i -> batch`, a tree like the data.

    Raises:
        TypeError: If a leaf is not a tensor.
        ValueError: If the leading axes differ, or the size is not between 1 and theirs.

    Example:
        >>> batch = minibatches(random.key(0), torch.arange(10), 5)
        >>> torch.cat([batch(0), batch(1)]).sort().values
        tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
        >>> bool((batch(7) == batch(7)).all())
        True
    """
    tree.check_tensors(data, name="data")
    lengths = {leaf.shape[0] if leaf.dim() else 0 for leaf in tree.leaves(data)}
    if len(lengths) != 1:
        raise ValueError(f"data must have one leading axis in common; got lengths {sorted(lengths)}")
    length = lengths.pop()
    if not isinstance(size, int) or not 1 <= size <= length:
        raise ValueError(f"size must be an int between 1 and the {length} entries of the data; got {size!r}")

    @functools.lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        return random.permutation(random.fold_in(key, epoch), length)

    def batch(number: int) -> Tree:
        epoch, place = divmod(number, length // size)
        chosen = order(epoch)[place * size : (place + 1) * size]
        return tree.map(lambda leaf: leaf[chosen.to(leaf.device)], data)

    return batch


class Sources:
    """The sources of a run, with the position of those that have one.

    Args:
        batches: `update -> {level: batch}`, or for each level a source.
        graph: The program.
        lasting: Whether positions must be known, so that each iterable needs `state_dict`.

    Raises:
        TypeError: If they are neither, or an iterable has no `state_dict` where it needs one.
        ValueError: If there is a source for a level that is none.
    """

    def __init__(self, batches: Batches | None, graph: Graph, *, lasting: bool):
        self.counts = graph.counts
        self.accumulate = {name: level.accumulate for name, level in graph.program.levels.items()}
        self.whole = batches if callable(batches) else None
        self.each = {} if batches is None or self.whole else _checked(batches, self.counts)
        self.iterables = {name: source for name, source in self.each.items() if not callable(source)}
        self.iterators: dict[str, Any] = {}
        for name, source in self.iterables.items():
            if lasting and not (hasattr(source, "state_dict") and hasattr(source, "load_state_dict")):
                raise TypeError(
                    f"a run that is to go on needs to know where the batches of {name!r} are: give a function of the "
                    f"number of the batch, such as `minibatches(key, data, size)`, or an iterable with state_dict "
                    f"and load_state_dict; got {type(source).__name__}"
                )

    def __call__(self, update: int) -> Mapping[str, Any]:
        """The batches of an update."""
        if self.whole:
            return self.whole(update)
        return {name: self._drawn(name, update) for name in self.each}

    def position(self) -> dict[str, Any]:
        """Where the iterables are, apart from what they do next."""
        return {name: copy.deepcopy(source.state_dict()) for name, source in self.iterables.items()}

    def seek(self, position: Mapping[str, Any]) -> None:
        """Put the iterables where they were."""
        self.iterators.clear()
        for name, source in self.iterables.items():
            source.load_state_dict(copy.deepcopy(position[name]))

    def _drawn(self, name: str, update: int) -> Any:
        count, micro = self.counts[name], self.accumulate[name]
        first = update * count * micro
        steps = [self._step(name, first + step * micro, micro) for step in range(count)]
        return steps[0] if count == 1 else PerStep(_stacked(steps))

    def _step(self, name: str, number: int, micro: int) -> Any:
        parts = [self._one(name, number + part) for part in range(micro)]
        return parts[0] if micro == 1 else _stacked(parts)

    def _one(self, name: str, number: int) -> Any:
        if name not in self.iterables:
            return self.each[name](number)
        for _ in range(2):  # where an epoch has ended, another begins
            if name not in self.iterators:
                self.iterators[name] = iter(self.iterables[name])
            try:
                return next(self.iterators[name])
            except StopIteration:
                del self.iterators[name]
        raise ValueError(f"the iterable of {name!r} has no batches left: give one that begins anew, such as a list")


def _checked(batches: Any, counts: Mapping[str, int]) -> dict[str, Any]:
    if not isinstance(batches, Mapping):
        raise TypeError(f"batches must be a function of the update, or a mapping from level to source; got {batches!r}")
    for name, source in batches.items():
        if name not in counts:
            raise ValueError(f"there are batches for {name!r}, which is no level; the levels are {sorted(counts)}")
        if isinstance(source, torch.Tensor) or not (callable(source) or isinstance(source, Iterable)):
            raise TypeError(
                f"the batches of {name!r} must be a function of their number or an iterable; got {type(source)}. "
                f"For one batch that all steps see, write `batches=lambda update: {{{name!r}: batch}}`"
            )
        if isinstance(source, tuple | Mapping):
            raise TypeError(
                f"the batches of {name!r} are a {type(source).__name__}, which would be taken for the batches one by "
                f"one. For one batch that all steps see, write `batches=lambda update: {{{name!r}: batch}}`; for "
                f"several, a list"
            )
        if inspect.isclass(source):
            raise TypeError(f"the batches of {name!r} are a class, {source.__name__}: make one of it")
    return dict(batches)


def _stacked(parts: list[Any]) -> Any:
    for part in parts:
        tree.check_tensors(part, name="a batch of a level with several steps or micro-batches")
    shapes = [[tuple(leaf.shape) for leaf in tree.leaves(part)] for part in parts]
    if any(each != shapes[0] for each in shapes):
        odd = next(each for each in shapes if each != shapes[0])
        raise ValueError(
            f"the batches of one update must have the same shapes; got {shapes[0]} and {odd}. Leave out a last one "
            f"that is smaller, as `drop_last=True` of a DataLoader does"
        )
    return tree.map(lambda *leaves: torch.stack(leaves), *parts)
