r"""The program itself: levels and edges, checked, with a pure `update` and the hypergradient of every level.

.. math:: x_i \leftarrow x_i - \eta_i\,\frac{d}{d x_i} L_i\big(x_i, \{x_j^\star(x_i)\}_{j \text{ below } i}\big)
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffopt import random, tree
from diffopt.multilevel.level import Edge, Level
from diffopt.multilevel.precision import first_scale
from diffopt.multilevel.responses import PerStep, Program, Report, total_gradient
from diffopt.multilevel.topology import topology
from diffopt.multilevel.update import GraphState, Metrics, Run, Turn, chunks, compiled_steps, turns
from diffopt.schedules.hyperparameters import check_count
from diffopt.transforms.donation import check_donation
from diffopt.transforms.leaves import check_scalar
from diffopt.typing import Tree

__all__ = ["Graph", "graph"]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A checked multilevel program; made by `graph`.

    Args:
        program: Its levels and their topology.
        schedule: Which level moves when, in one update.
        blocks: The same, where a level's turns that follow each other are one.
        counts: How many steps each level takes in an update; the length of its `PerStep` batches.
    """

    program: Program
    schedule: tuple[Turn, ...]
    blocks: tuple[Turn, ...]
    counts: dict[str, int]

    def __repr__(self) -> str:
        return f"Graph({', '.join(f'{name}: {count}' for name, count in self.counts.items())})"

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
            if isinstance(value, nn.Module):
                raise TypeError(
                    f"params[{name!r}] is a {type(value).__name__}, a module: give the parameters that "
                    f"`function, params, buffers = tree.from_module(module)` makes of it, and call `function` in losses"
                )
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
        self, state: GraphState, batches: Mapping[str, Any] | None = None, *, donate: bool = False
    ) -> tuple[GraphState, dict[str, Metrics]]:
        """One step of the top level, with all the steps of the levels below that it takes.

        Args:
            state: The state; it is not changed, unless it is donated.
            batches: The batch of each level, by name: a tree that all of its steps see, or `PerStep`. Levels that are
                not named get None.
            donate: Whether the memory of the state may be written over, as in `step`: use only what comes back. Where
                the optimizers step in place, that saves a copy of the parameters and of the optimizers' states.

        Returns:
            The new state, and what each level saw.

        Raises:
            TypeError: If the state or the batches are something else, or a loss is no floating-point scalar.
            ValueError: If a batch belongs to no level, or has the wrong number of steps. With donate, also if tensors
                of the state, or of it and the batches, share memory.
            RuntimeError: With donate, under a live transform, or if a tensor requires grad in grad mode.
        """
        batches = self._checked(state, batches)
        if donate and not torch.compiler.is_compiling():
            check_donation(tree.leaves(state.params), tree.partition(batches)[0])
        run = Run(self.program, state, batches, donate=donate)
        return run.play(self.blocks, lambda turn: run.steps(turn.name, turn.steps, measured=turn.last))

    def compiled(
        self, chunk: int = 16, *, backend: str = "inductor"
    ) -> Callable[..., tuple[GraphState, dict[str, Metrics]]]:
        """`update` in compiled pieces: a level's steps that follow each other, up to `chunk` of them, are one.

        Whole updates may be compiled, too, under `torch.no_grad()`, but then compiling takes time in proportion to the
        number of steps. The first call compiles, from seconds to a minute a piece. Iterative solvers take all of their
        `max_steps`, at most 64.

        Args:
            chunk: The most steps in a piece.
            backend: As in `torch.compile`.

        Returns:
            A function like `update`, without derivatives.

        Raises:
            ValueError: If the chunk is not a positive int.
        """
        check_count("chunk", chunk)
        schedule = chunks(self.schedule, chunk)
        kinds = {(turn.name, turn.steps) for turn in schedule if not turn.back}
        steps = {(name, count): compiled_steps(self.program, name, count, backend) for name, count in kinds}

        def update(state: GraphState, batches: Mapping[str, Any] | None = None):
            run = Run(self.program, state, self._checked(state, batches))
            return run.play(
                schedule, lambda turn: run.steps_compiled(steps[turn.name, turn.steps], turn.name, turn.steps)
            )

        return update

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
            run = Run(self.program, state, self._checked(state, batches))
            for each in self.program.levels:
                run.begin(each)
            _, gradient, _, reports = total_gradient(self.program, name, run.context())
            return gradient, reports

        return hypergradient

    def _checked(self, state: GraphState, batches: Mapping[str, Any] | None) -> Mapping[str, Any]:
        batches, counts = {} if batches is None else batches, self.counts
        if not isinstance(state, GraphState):
            raise TypeError(f"state must be a GraphState, as of graph.init; got {type(state).__name__}")
        if state.params.keys() != counts.keys():
            raise ValueError(f"the state is of another program: {sorted(state.params)}, not {sorted(counts)}")
        if not isinstance(batches, Mapping):
            raise TypeError(f"batches must be a dict from levels to their batches; got {type(batches).__name__}")
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
        TypeError: If levels or edges are something else, or a loss does not take its level, what it reads, and a batch.
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
    shape = topology(levels, edges)
    named = {name: dataclasses.replace(level, loss=_named(name, level.loss)) for name, level in levels.items()}
    program = Program(named, shape)
    schedule = tuple(turns(program, program.shape.roots))
    counts = collections.Counter(turn.name for turn in schedule if not turn.back)
    return Graph(program, schedule, chunks(schedule), dict(counts))


def _named(name: str, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss, with its level in the error if it gives something else than a number to minimize."""

    @functools.wraps(loss)
    def checked(*args: Any) -> Tensor:
        try:
            value = loss(*args)
        except Exception as error:
            kinds = ", ".join(type(arg).__name__ for arg in args)
            error.add_note(f"This is the loss of level {name!r}, called as (own, *reads, batch) with ({kinds}).")
            raise
        if isinstance(value, Tensor) and value.ndim == 0 and value.is_floating_point():
            return value
        return check_scalar(value, f"the loss of level {name!r}")

    return checked
