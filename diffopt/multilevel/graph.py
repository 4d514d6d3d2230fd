r"""The program itself: levels and edges, checked, with a pure `update` and the hypergradient of every level.

.. math:: x_i \leftarrow x_i - \eta_i\,\frac{d}{d x_i} L_i\big(x_i, \{x_j^\star(x_i)\}_{j \text{ below } i}\big)
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import random, tree
from diffopt.autodiff import transforms_active
from diffopt.multilevel.level import Edge, Level
from diffopt.multilevel.precision import first_scale, next_scale
from diffopt.multilevel.responses import Block, Moment, PerStep, Program, Report, moved, total_gradient
from diffopt.multilevel.topology import topology
from diffopt.typing import Tree

__all__ = ["Graph", "GraphState", "Metrics", "graph"]


class GraphState(NamedTuple):
    """The state of a program, tensors alone: it vmaps, and `torch.save` resumes it exactly.

    Attributes:
        params: The parameters of each level.
        optimizers: The state of each level's optimizer.
        methods: What each method carries along, such as the adjoint where its next solve starts.
        scales: The loss scale of each level in float16.
        initial: Where levels with `start="reset"` start.
        updates: How many there were.
    """

    params: dict[str, Tree]
    optimizers: dict[str, Any]
    methods: dict[tuple[str, str], Any]
    scales: dict[str, Any]
    initial: dict[str, Tree]
    updates: Tensor


class Metrics(NamedTuple):
    """What a level's last step saw; NaN for a level that is warming up.

    Attributes:
        loss: The loss before the step.
        gradient_norm: The norm of its gradient before clipping.
        reports: How far the gradient can be trusted, for each level below.
    """

    loss: Tensor
    gradient_norm: Tensor
    reports: dict[str, Report]


class _Turn(NamedTuple):
    """One entry of the schedule: a level takes a step, perhaps the first of a block or the last, or goes back."""

    name: str
    first: bool = False
    back: bool = False
    last: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A checked multilevel program; made by `graph`.

    Args:
        program: Its levels and their topology.
        schedule: Which level moves when, in one update.
    """

    program: Program
    schedule: tuple[_Turn, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many steps each level takes in an update; the length of its `PerStep` batches."""
        return dict(collections.Counter(turn.name for turn in self.schedule if not turn.back))

    def init(self, key: Tensor, params: Mapping[str, Tree]) -> GraphState:
        """The state at the start.

        Args:
            key: A key, for methods that draw random numbers.
            params: The parameters of each level, trees of floating-point tensors.

        Returns:
            The state.

        Raises:
            ValueError: If a level has no parameters, or parameters have no level.
            TypeError: If a leaf is not a floating-point tensor.
        """
        levels, shape = self.program
        if set(params) != set(levels):
            raise ValueError(f"params must name the levels {sorted(levels)}; got {sorted(params)}")
        for name, value in params.items():
            tree.check_tensors(value, name=f"params[{name!r}]")
            if not tree.leaves(value) or not all(leaf.is_floating_point() for leaf in tree.leaves(value)):
                raise TypeError(f"params[{name!r}] must hold floating-point tensors, at least one")
        groups = [(name, group) for name in shape.order for group in shape.groups[name]]
        keys = random.split(key, len(groups))
        return GraphState(
            params=dict(params),
            optimizers={name: level.optimizer.init(params[name]) for name, level in levels.items()},
            methods={
                (name, group.name): group.edge.method.begin({member: params[member] for member in group.members}, key)
                for (name, group), key in zip(groups, keys, strict=True)
            },
            scales={name: first_scale(level.precision, params[name]) for name, level in levels.items()},
            initial={name: params[name] for name, level in levels.items() if level.start == "reset"},
            updates=torch.zeros((), dtype=torch.int64, device=key.device),
        )

    def update(
        self, state: GraphState, batches: Mapping[str, Any] | None = None
    ) -> tuple[GraphState, dict[str, Metrics]]:
        """One step of the top level, with all the steps of the levels below that it takes.

        Args:
            state: The state; it is not changed.
            batches: The batch of each level, by name: a tree that all of its steps see, or `PerStep`. Levels that are
                not named get None.

        Returns:
            The new state, and what each level saw.

        Raises:
            ValueError: If a batch belongs to no level, or has the wrong number of steps.
        """
        batches = self._checked(batches)
        run = _Run(self.program, state, batches)
        metrics: dict[str, Metrics] = {}
        for turn in self.schedule:
            if turn.back:
                run.roll_back(turn.name)
                continue
            if turn.first:
                run.begin(turn.name)
            seen = run.step(turn.name, measured=turn.last)
            if seen is not None:
                metrics[turn.name] = seen
        return run.state(), metrics

    def hypergrad(self, name: str) -> Callable[..., tuple[Tree, dict[str, Report]]]:
        """The function that gives a level's total gradient, where the levels below are taken as solved.

        Args:
            name: The level.

        Returns:
            `(state, batches) -> (gradient, reports)`, reports by lower level. It composes with every transform; its own
            derivative is taken with the lower levels where they are. Through `Unrolled` edges it looks as many steps
            ahead as the lower level takes.

        Raises:
            ValueError: If there is no such level.
        """
        if name not in self.program.levels:
            raise ValueError(f"there is no level {name!r}; the levels are {sorted(self.program.levels)}")

        def hypergradient(state: GraphState, batches: Mapping[str, Any] | None = None):
            run = _Run(self.program, state, self._checked(batches))
            for each in self.program.levels:
                run.begin(each)
            _, gradient, _, reports = total_gradient(self.program, name, run.moment())
            return gradient, reports

        return hypergradient

    def _checked(self, batches: Mapping[str, Any] | None) -> Mapping[str, Any]:
        batches, counts = batches or {}, self.counts
        for name, batch in batches.items():
            if name not in counts:
                raise ValueError(f"there is a batch for {name!r}, which is no level; the levels are {sorted(counts)}")
            if isinstance(batch, PerStep):
                sizes = {t.shape[0] if t.dim() else 0 for t in tree.partition(batch.batches)[0]}
                if sizes != {counts[name]}:
                    raise ValueError(
                        f"level {name!r} takes {counts[name]} steps in an update, so its PerStep batches need that "
                        f"leading size; got {sorted(sizes)}"
                    )
        return batches


class _Run:
    """An update under way: the state, taken apart."""

    def __init__(self, program: Program, state: GraphState, batches: Mapping[str, Any]):
        self.program, self.before, self.given = program, state, batches
        self.params, self.optimizers = dict(state.params), dict(state.optimizers)
        self.methods, self.scales = dict(state.methods), dict(state.scales)
        self.blocks: dict[str, Block] = {}
        self.position = dict.fromkeys(program.levels, 0)
        self.batches = {name: _one(batch, 0) for name, batch in batches.items()}

    def state(self) -> GraphState:
        return GraphState(
            self.params, self.optimizers, self.methods, self.scales, self.before.initial, self.before.updates + 1
        )

    def moment(self) -> Moment:
        return Moment(self.params, self.optimizers, self.methods, self.batches, self.blocks)

    def begin(self, name: str) -> None:
        """Begin a block of steps."""
        level = self.program.levels[name]
        if level.start == "reset":
            self.params[name] = self.before.initial[name]
            self.optimizers[name] = level.optimizer.init(self.params[name])
        batch, here = self.given.get(name), self.position[name]
        if isinstance(batch, PerStep):
            tensors, merge = tree.partition(batch.batches)
            batch = PerStep(merge([t[here : here + level.steps] for t in tensors]))
        self.blocks[name] = Block(self.params[name], self.optimizers[name], batch)

    def roll_back(self, name: str) -> None:
        self.params[name], self.optimizers[name], _ = self.blocks[name]

    def step(self, name: str, *, measured: bool) -> Metrics | None:
        """One step of a level, and what it saw if that is asked for."""
        level, count = self.program.levels[name], self.before.updates
        if name in self.given:
            self.batches[name] = _one(self.given[name], self.position[name])
        self.position[name] += 1
        waiting = count < level.warmup if level.warmup else None
        if waiting is not None and not torch.compiler.is_compiling() and not transforms_active() and bool(waiting):
            nan = torch.full((), torch.nan, device=count.device)
            return Metrics(nan, nan, {}) if measured else None
        scale = self.scales[name]
        loss, gradient, methods, reports = total_gradient(
            self.program, name, self.moment(), scale.scale if scale else None
        )
        params, optimizer = moved(self.program, name, gradient, self.optimizers[name], self.params[name])
        if scale:
            finite = tree.norm(gradient).isfinite()
            self.scales[name] = next_scale(scale, finite)
            params = tree.where(finite, params, self.params[name])
            optimizer = tree.where(finite, optimizer, self.optimizers[name])
        if waiting is not None:
            params = tree.where(waiting, self.params[name], params)
            optimizer = tree.where(waiting, self.optimizers[name], optimizer)
        self.params[name], self.optimizers[name] = params, optimizer
        self.methods.update(methods)
        return Metrics(loss, tree.norm(gradient), reports) if measured else None


def graph(levels: Mapping[str, Level], edges: Sequence[Edge] = ()) -> Graph:
    r"""Check a multilevel program and make it ready to run.

    .. math:: \min_{x_1} L_1(x_1, x_2^\star(x_1)), \qquad x_2^\star(x_1) = \arg\min_{x_2} L_2(x_2, x_1), \dots

    Any shape without a cycle of edges: chains, several lower levels of one upper, several uppers of one lower,
    diamonds. Levels move from the lowest up: before each step, all levels below take their `steps`.

    Args:
        levels: The levels by name.
        edges: Which level is optimized over the response of which.

    Returns:
        The graph.

    Raises:
        TypeError: If a level is not a `Level`.
        ValueError: If a name is unknown, edges are double or form a cycle, a read has no edge that explains it, an
            edge explains nothing, or a level is joined to no other; the message names it.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> levels = {
        ...     "penalty": Level(lambda p, w, batch: (w - 2) ** 2, sgd(0.1), reads=("weights",)),
        ...     "weights": Level(lambda w, p, batch: (w - 3) ** 2 + p * w**2, sgd(0.2), reads=("penalty",), steps=9),
        ... }
        >>> program = graph(levels, [Edge("penalty", "weights")])
        >>> state = program.init(random.key(0), {"penalty": torch.tensor(1.0), "weights": torch.zeros(())})
        >>> for _ in range(100):
        ...     state, metrics = program.update(state)
        >>> state.params["weights"]
        tensor(2.)

    References:
        Choe et al. (2023), Betty: an automatic differentiation library for multilevel optimization, section 3.
    """
    program = Program(dict(levels), topology(levels, edges))
    turns = _turns(program, program.shape.roots)
    last = {turn.name: i for i, turn in enumerate(turns) if not turn.back}
    return Graph(program, tuple(turn._replace(last=last[turn.name] == i) for i, turn in enumerate(turns)))


def _turns(program: Program, names: Sequence[str]) -> list[_Turn]:
    """A block of steps of some levels at once, each step after those of the levels below."""
    turns: list[_Turn] = []
    for tick in range(max(program.levels[name].steps for name in names)):
        active = [name for name in names if tick < program.levels[name].steps]
        direct = dict.fromkeys(lower for name in active for lower in program.shape.lowers[name])
        inner = [name for name in direct if not any(name in program.shape.below[other] for other in direct)]
        if inner:
            turns += _turns(program, inner)
        turns += [_Turn(name, first=tick == 0) for name in active]
        turns += [_Turn(name, back=True) for name in inner if program.levels[name].start == "rollback"]
    return turns


def _one(batch: Any, position: int) -> Any:
    if not isinstance(batch, PerStep):
        return batch
    tensors, merge = tree.partition(batch.batches)
    return merge([t[position] for t in tensors])
