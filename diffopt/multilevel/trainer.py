r"""`train`: a thin loop around `Graph.update`, for those who want one.

.. math:: s_{t+1} = \text{update}(s_t, \text{batches}(t)), \qquad \bar x_{t+1} = d\,\bar x_t + (1 - d)\,x_{t+1}
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diffopt import tree
from diffopt.multilevel.checkpoints import load, save
from diffopt.multilevel.graph import Graph, GraphState, Metrics
from diffopt.multilevel.sources import Batches, Sources
from diffopt.typing import Tree

__all__ = ["NotFiniteError", "Trained", "train"]

_FAULTS_IN_A_ROW = 10


class Trained(NamedTuple):
    """The state of a training run, tensors alone.

    Attributes:
        state: The state of the program.
        average: The running averages of the levels that have one.
        best: The parameters of all levels at the best validation; none without `validate`.
        score: What it gave there.
        since: The validations since.
        faults: The updates that were not finite, and were left out.
        faults_in_a_row: Those of them since the last one that was finite.
    """

    state: GraphState
    average: dict[str, Tree]
    best: dict[str, Tree]
    score: Tensor
    since: Tensor
    faults: Tensor
    faults_in_a_row: Tensor


class NotFiniteError(ArithmeticError):
    """An update that was not finite.

    Attributes:
        trained: Where the run was before it; nothing is lost.
    """

    def __init__(self, message: str, trained: Trained):
        super().__init__(message)
        self.trained = trained

    def __reduce__(self):
        return type(self), (str(self), self.trained)


def train(
    graph: Graph,
    state: GraphState,
    batches: Batches | None = None,
    *,
    updates: int,
    validate: Callable[[Trained], float | Tensor] | None = None,
    validate_every: int = 100,
    patience: int | None = None,
    average: Mapping[str, float] | None = None,
    on_nan: Literal["raise", "skip", "rollback"] = "raise",
    checkpoint: str | os.PathLike | None = None,
    save_every: int = 100,
    resume: bool = False,
    log: Callable[[int, dict[str, float]], None] | None = None,
    log_every: int = 10,
    quiet: bool = False,
) -> Trained:
    r"""Update a program many times.

    With `checkpoint`, a run that was killed at any moment and is started again with `resume=True` ends in the same
    state as one that was not, bit by bit: the file holds the state, the position of the batches, and that of torch's
    random generators, and is replaced as a whole. What is logged since the last save is logged twice.

    Args:
        graph: The program.
        state: Where it starts.
        batches: A function of the number of the update that gives the batches by level, as `Graph.update` takes them;
            or for each level a source, of which each of its steps takes one batch (`accumulate` many): a function of
            their number, such as `minibatches(key, data, size)`, or an iterable, which begins anew where it ends, and
            which for `checkpoint` needs `state_dict` and `load_state_dict`.
        updates: How many updates `state.updates` counts at the end, those before included.
        validate: `(trained) -> score`, lower is better; the parameters are in `trained.state.params`.
        validate_every: How many updates are between two validations.
        patience: How many validations in a row may fail to improve; then the run stops. None never stops it.
        average: The decay of the running average of a level's parameters, for the levels that are to have one.
        on_nan: What to do where a loss, a gradient or the state is not finite after an update: "raise"
            `NotFiniteError`, which holds the state before; "skip" the update; "rollback" to the last save, and go on
            with the batches that come next. Ten such updates in a row raise in any case.
        checkpoint: The file to save to, every `save_every` updates, at the end, at an interrupt, and before raising.
        save_every: How many updates are between two saves; also how far "rollback" goes without a file.
        resume: Whether to go on from the file, if it is there. Without, a file that is there is an error.
        log: `(update, values) -> None`, such as `log_to_tensorboard(folder)`.
        log_every: How many updates are between two logs.
        quiet: Whether to show no progress.

    Returns:
        The state of the run at the end.

    Raises:
        NotFiniteError: See `on_nan`.
        FileExistsError: If there is a file, and `resume` is False.
        TypeError: If batches or options have the wrong type.
        ValueError: If an option is out of range or names no level, the state requires grad in grad mode, or the file is
            of another program.

    Example:
        >>> import torch
        >>> from diffopt import random
        >>> from diffopt.multilevel import Edge, Level, graph
        >>> from diffopt.optimizers import sgd
        >>> levels = {
        ...     "penalty": Level(lambda p, w, batch: (w - 2) ** 2, sgd(0.1), reads=("weights",)),
        ...     "weights": Level(lambda w, p, batch: (w - 3) ** 2 + p * w**2, sgd(0.2), reads=("penalty",), steps=9),
        ... }
        >>> program = graph(levels, [Edge("penalty", "weights")])
        >>> state = program.init(random.key(0), {"penalty": torch.tensor(1.0), "weights": torch.zeros(())})
        >>> train(program, state, updates=100, quiet=True).state.params["weights"]
        tensor(2.)
    """
    sources = Sources(batches, graph, lasting=checkpoint is not None)
    average = _decays(average, graph)
    if not isinstance(updates, int) or updates < 0:
        raise ValueError(f"updates must be an int of at least 0; got {updates!r}")
    for name, value in {"validate_every": validate_every, "save_every": save_every, "log_every": log_every}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int; got {value!r}")
    if patience is not None and (validate is None or not isinstance(patience, int) or patience < 1):
        raise ValueError(f"patience must be a positive int, and needs validate; got {patience!r}")
    if validate is not None and validate_every > updates > 0:
        raise ValueError(f"validate_every={validate_every} is more than updates={updates}: nothing would be validated")
    if resume and checkpoint is None:
        raise ValueError("resume=True goes on from a file: give its name as `checkpoint`")
    if on_nan not in ("raise", "skip", "rollback"):
        raise ValueError(f'on_nan must be "raise", "skip" or "rollback"; got {on_nan!r}')
    run = _Run(graph, sources, average, on_nan, None if checkpoint is None else Path(checkpoint))
    trained = run.begin(_started(state, average, validate is not None), resume)
    first = int(trained.state.updates)
    with run, tqdm(total=updates, initial=min(first, updates), disable=quiet, desc="train") as bar:
        for done in range(first + 1, updates + 1):
            if patience is not None and int(trained.since) >= patience:
                break
            trained, metrics = run.update(trained, done - 1)
            values = _values(metrics) if done % log_every == 0 else {}
            if validate is not None and done % validate_every == 0:
                trained, values["validation"] = _validated(trained, validate(trained))
            run.hold(trained, lasting=done % save_every == 0)
            if values and log is not None:
                log(done, values)
            if values and not quiet:
                shown = {
                    name: f"{value:.3g}" for name, value in values.items() if name.endswith(("/loss", "validation"))
                }
                bar.set_postfix(shown)
            bar.update()
        run.finish()
    return trained


class _Run:
    """What a run holds on to: the last state that is whole, and the last that was saved."""

    def __init__(self, graph: Graph, sources: Sources, average: dict[str, float], on_nan: str, file: Path | None):
        self.graph, self.sources, self.average, self.on_nan, self.file = graph, sources, average, on_nan, file

    def begin(self, trained: Trained, resume: bool) -> Trained:
        """Start at a state, or where the file is."""
        self.written = True  # there is nothing to lose yet
        if self.file is not None and self.file.exists():
            if not resume:
                raise FileExistsError(f"{self.file} is there: go on with it by resume=True, or give another name")
            trained, extra = load(self.file, trained)
            self.sources.seek(extra["position"])
            _set_generators(extra["generators"])
        self.saved = self.whole = trained
        self.extra = self._extra()
        return trained

    def update(self, trained: Trained, number: int) -> tuple[Trained, dict[str, Metrics]]:
        """The run after one more update, or after what is done about one that is not finite."""
        batches = self.sources(number)
        with torch.no_grad():  # nobody asks for a derivative of the run, which need not be looked for then
            state, metrics = self.graph.update(trained.state, batches)
        where = _not_finite(self.graph, state, metrics, number)
        if not where:
            average = {
                name: tree.map(lambda a, x, d=decay: d * a + (1 - d) * x, trained.average[name], state.params[name])
                for name, decay in self.average.items()
            }
            row = torch.zeros_like(trained.faults_in_a_row)
            return trained._replace(state=state, average=average, faults_in_a_row=row), metrics
        if self.on_nan == "raise" or trained.faults_in_a_row + 1 >= _FAULTS_IN_A_ROW:
            raise NotFiniteError(
                f"update {number} gave numbers that are not finite in {', '.join(where)}; the state before it is in "
                f"`trained` of this error{f', and in {self.file}' if self.file else ''}. Look at the batch of this "
                "update, at the learning rates, at the residuals of its reports (damping bounds a solve), and at "
                "derivatives of optimizers' steps (Adam's, of a root of 0, need eps_root), or go on with "
                'on_nan="skip" or "rollback"',
                trained,
            )
        back = self.saved if self.on_nan == "rollback" else trained
        return trained._replace(
            state=back.state._replace(updates=state.updates),
            average=back.average,
            faults=trained.faults + 1,
            faults_in_a_row=trained.faults_in_a_row + 1,
        ), metrics

    def hold(self, trained: Trained, lasting: bool) -> None:
        """Make a state the last whole one, and save it if it is to last."""
        self.whole, self.extra, self.written = trained, self._extra(), False
        if lasting:
            self.saved = trained
            self.finish()

    def finish(self) -> None:
        """Write the last whole state, unless it is written."""
        if self.file is not None and not self.written:
            save(self.file, self.whole, self.extra)
            self.written = True

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        if kind is not None:
            self.finish()

    def _extra(self) -> dict[str, Any]:
        if self.file is None:
            return {}
        return {"position": self.sources.position(), "generators": _generators()}


def _decays(average: Mapping[str, float] | None, graph: Graph) -> dict[str, float]:
    """The decays of the running averages, checked."""
    if not isinstance(average, Mapping | None):
        raise TypeError(f"average must be a dict from levels to decays; got {average!r}")
    for name, decay in (average or {}).items():
        if name not in graph.program.levels:
            raise ValueError(f"there is no level {name!r} to average; the levels are {sorted(graph.program.levels)}")
        if not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise ValueError(f"the decay of an average must be in [0, 1); got {decay!r} for {name!r}")
    return dict(average or {})


def _started(state: GraphState, average: Mapping[str, float], validates: bool) -> Trained:
    if not isinstance(state, GraphState):
        raise TypeError(f"state must be a GraphState, as of graph.init; got {type(state).__name__}")
    if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in tree.leaves(state)):
        raise ValueError(
            "a tensor of the state requires grad, so memory would grow with each update: detach the parameters, as "
            "`tree.from_module` does, or call train under torch.no_grad(). For derivatives, loop over graph.update"
        )
    zero = torch.zeros_like(state.updates)
    return Trained(
        state=state,
        average={name: state.params[name] for name in average},
        best=dict(state.params) if validates else {},
        score=torch.full_like(zero, math.inf, dtype=torch.get_default_dtype()),
        since=zero,
        faults=zero,
        faults_in_a_row=zero,
    )


def _validated(trained: Trained, score: float | Tensor) -> tuple[Trained, float]:
    """The run with its best parameters brought up to date, and the score."""
    value = torch.as_tensor(score).detach().to(trained.score)
    if value.dim():
        raise ValueError(f"validate must give one number; got shape {tuple(value.shape)}")
    if value < trained.score:
        best = dict(trained.state.params)
        return trained._replace(best=best, score=value, since=torch.zeros_like(trained.since)), float(value)
    return trained._replace(since=trained.since + 1), float(value)


def _not_finite(graph: Graph, state: GraphState, metrics: Mapping[str, Metrics], number: int) -> list[str]:
    """The levels whose loss, gradient or state is not finite, the lowest first."""
    found = {}
    for name in graph.program.shape.order:
        level, seen = graph.program.levels[name], metrics[name]
        values = [state.params[name]]
        if number >= level.warmup and not state.scales[name]:  # else NaN is a level that waits, inf one that rescales
            values += [seen.loss, seen.gradient_norm]
        carried = state.optimizers[name], [kept for (upper, _), kept in state.methods.items() if upper == name]
        wrong = [~leaf.isfinite().all() for leaf in tree.leaves(values)]
        wrong += [leaf.isnan().any() for leaf in tree.leaves(carried)]
        found[name] = torch.stack([w.to(state.updates.device) for w in wrong]).any()
    verdicts = torch.stack(list(found.values())).tolist()
    return [repr(name) for name, wrong in zip(found, verdicts, strict=True) if wrong]


def _values(metrics: Mapping[str, Metrics]) -> dict[str, float]:
    """What a log shows: losses, gradients, and how far those can be trusted where the method says."""
    values = {}
    for name, seen in metrics.items():
        values |= {f"{name}/loss": float(seen.loss), f"{name}/gradient_norm": float(seen.gradient_norm)}
        for lower, report in seen.reports.items():
            if report.steps >= 0:
                values |= {f"{name}/{lower}/residual": float(report.residual)}
                values |= {f"{name}/{lower}/error": float(report.error)}
    return values


def _generators() -> dict[str, Any]:
    """Where torch's own generators are, for losses or iterables that draw from them."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_generators(generators: Mapping[str, Any]) -> None:
    torch.set_rng_state(generators["cpu"])
    if generators["cuda"]:
        torch.cuda.set_rng_state_all(generators["cuda"])
