"""An update under way: whose turn it is, and what a turn does."""

import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import transforms_active
from diffopt.multilevel.precision import next_scale
from diffopt.multilevel.responses import Block, Context, PerStep, Program, Report, moved, total_gradient
from diffopt.transforms.fusion import inner_loop
from diffopt.typing import Tree

__all__ = ["GraphState", "Metrics", "Run", "Turn", "chunks", "compiled_steps", "turns"]


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


class Turn(NamedTuple):
    """One entry of the schedule: a level takes steps, perhaps the first of a block or the last, or goes back."""

    name: str
    first: bool = False
    back: bool = False
    last: bool = False
    steps: int = 1


class Run:
    """An update under way: the state, taken apart."""

    def __init__(self, program: Program, state: GraphState, batches: Mapping[str, Any], *, donate: bool = False):
        self.program, self.before, self.given, self.donate = program, state, batches, donate
        self.params, self.optimizers = dict(state.params), dict(state.optimizers)
        self.methods, self.scales = dict(state.methods), dict(state.scales)
        self.blocks: dict[str, Block] = {}
        self.fresh = False  # whether what a level steps from is needed later on
        self.position = dict.fromkeys(program.levels, 0)
        self.batches = {name: _one(batch, 0) for name, batch in batches.items()}

    def state(self) -> GraphState:
        return GraphState(
            self.params, self.optimizers, self.methods, self.scales, self.before.initial, self.before.updates + 1
        )

    def context(self) -> Context:
        return Context(self.params, self.optimizers, self.methods, self.batches, self.blocks)

    def begin(self, name: str) -> None:
        """Begin a block of steps."""
        level = self.program.levels[name]
        if level.start == "reset":
            self.params[name] = self.before.initial[name]
            self.optimizers[name] = level.optimizer.init(self.params[name])
        self.fresh = level.start == "reset"
        if level.start == "rollback" or name in self.program.shape.retraced:
            self.blocks[name] = Block(self.params[name], self.optimizers[name], self.part(name, level.steps))
            self.fresh = True

    def part(self, name: str, count: int) -> Any:
        """The batch of a level's next steps."""
        batch, here = self.given.get(name), self.position[name]
        if not isinstance(batch, PerStep):
            return batch
        tensors, merge = tree.partition(batch.batches)
        return PerStep(merge([t[here : here + count] for t in tensors]))

    def play(
        self, schedule: Sequence[Turn], act: Callable[[Turn], Metrics | None]
    ) -> tuple[GraphState, dict[str, Metrics]]:
        """All turns, those that take steps by `act`: the new state, and what each level saw."""
        metrics: dict[str, Metrics] = {}
        for turn in schedule:
            if turn.back:
                self.params[turn.name], self.optimizers[turn.name], _ = self.blocks[turn.name]
                continue
            if turn.first:
                self.begin(turn.name)
            seen = act(turn)
            if seen is not None:
                metrics[turn.name] = seen
        return self.state(), metrics

    def steps_compiled(self, steps: Callable[..., Any], name: str, count: int) -> Metrics:
        """Steps of a level by a compiled function that takes so many."""
        before = self.before._replace(
            params=self.params, optimizers=self.optimizers, methods=self.methods, scales=self.scales, initial={}
        )
        part = self.part(name, count)
        self.params, self.optimizers, self.methods, self.scales, metrics = steps(
            before, self.batches, part, self.blocks
        )
        self.position[name] += count
        if name in self.given:
            self.batches[name] = _one(part, count - 1)
        return metrics

    def steps(self, name: str, count: int, *, measured: bool) -> Metrics | None:
        """Steps of a level that follow each other, and what the last one saw if that is asked for."""
        if count > 2:
            self.step(name, measured=False)
            count -= 1 + self.steps_in_loop(name, count - 2)
        for _ in range(count - 1):
            self.step(name, measured=False)
        return self.step(name, measured=measured)

    def steps_in_loop(self, name: str, most: int) -> int:
        """Steps over the state that the step before made, which is nobody else's: how many could be taken."""
        level = self.program.levels[name]
        if self.donate or not level.simple or self.program.shape.groups[name]:
            return 0
        loop = inner_loop(level.loss, level.optimizer, self.params[name], self.optimizers[name])
        if loop is None:
            return 0
        reads, first = [self.params[read] for read in level.reads], self.position[name]
        for here in range(first, first + most):
            if not loop.step(*reads, _one(self.given.get(name), here)):
                break
            self.position[name] += 1
        self.params[name], self.optimizers[name] = loop.params, loop.state
        return self.position[name] - first

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
            self.program, name, self.context(), scale.scale if scale else None
        )
        size = tree.norm(gradient) if measured or scale else None
        seen = None if size is None or not measured else Metrics(loss, size, reports)
        options = {"donate": True} if self.donate and not (self.fresh or scale) else {}
        params, optimizer = moved(self.program, name, gradient, self.optimizers[name], self.params[name], **options)
        self.fresh = False
        if scale and size is not None:
            finite = size.isfinite()
            self.scales[name] = next_scale(scale, finite)
            params = tree.where(finite, params, self.params[name])
            optimizer = tree.where(finite, optimizer, self.optimizers[name])
        if waiting is not None:
            params = tree.where(waiting, self.params[name], params)
            optimizer = tree.where(waiting, self.optimizers[name], optimizer)
        self.params[name], self.optimizers[name] = params, optimizer
        self.methods.update(methods)
        return seen


def turns(program: Program, names: Sequence[str]) -> list[Turn]:
    """A block of steps of some levels at once, each step after those of the levels below."""
    found: list[Turn] = []
    for tick in range(max(program.levels[name].steps for name in names)):
        active = [name for name in names if tick < program.levels[name].steps]
        direct = dict.fromkeys(lower for name in active for lower in program.shape.lowers[name])
        inner = [name for name in direct if not any(name in program.shape.below[other] for other in direct)]
        if inner:
            found += turns(program, inner)
        found += [Turn(name, first=tick == 0) for name in active]
        found += [Turn(name, back=True) for name in inner if program.levels[name].start == "rollback"]
    last = {turn.name: i for i, turn in enumerate(found) if not turn.back}
    return [turn._replace(last=last[turn.name] == i) for i, turn in enumerate(found)]


def _one(batch: Any, position: int) -> Any:
    if not isinstance(batch, PerStep):
        return batch
    tensors, merge = tree.partition(batch.batches)
    return merge([t[position] for t in tensors])


def chunks(schedule: Sequence[Turn], most: float = math.inf) -> tuple[Turn, ...]:
    """The schedule with up to `most` turns of one level that follow each other in one."""
    found: list[Turn] = []
    for turn in schedule:
        before = found[-1] if found else None
        if before and before.name == turn.name and before.steps < most and not (turn.first or turn.back or before.back):
            found[-1] = before._replace(last=turn.last, steps=before.steps + 1)
        else:
            found.append(turn)
    return tuple(found)


def compiled_steps(program: Program, name: str, count: int, backend: str) -> Callable[..., Any]:
    def steps(state: GraphState, batches: Mapping[str, Any], part: Any, blocks: dict[str, Block]):
        with torch.no_grad():
            run = Run(program, state, {} if part is None else {name: part})
            run.batches, run.blocks = {**batches}, blocks
            for _ in range(count - 1):
                run.step(name, measured=False)
            metrics = run.step(name, measured=True)
        return run.params, run.optimizers, run.methods, run.scales, metrics

    # torch limits the compiled versions of a code object, which all of these share: give each its own
    own = types.FunctionType(steps.__code__.replace(), steps.__globals__, "steps", None, steps.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
