"""Multilevel programs against Betty and hand-written loops: python benchmarks/multilevel.py.

Betty is no dependency: `pip install --ignore-requires-python betty-ml` into an environment of your own; its rows are
left out where it is missing. Each side solves the same problem from the same start, and what it finds is compared
before anything is timed: three updates of the hand-written loop, one of Betty's, of one product (from the second on its
directions are made of the residual before), and one of the meta-weight net. An update's time is the difference of 20
and 5, so that engines are set up outside of it. Peak memory is that of a process of its own, over what it had before.
"""

import functools
import importlib.util
import itertools
import logging
import multiprocessing
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timing import alternate, record
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from diffopt import random, tree
from diffopt.linalg import CG
from diffopt.multilevel import SAMA, Edge, FiniteDifference, Implicit, Level, graph
from diffopt.optimizers import sgd

INNER_STEPS, CG_STEPS, FEATURES, EXAMPLES = 100, 3, 20, 500
HAVE_BETTY = importlib.util.find_spec("betty") is not None


def row(case: str, value: float, unit: str = "x", bar: str = "none") -> dict[str, Any]:
    """One row of the results."""
    return {"case": case, "value": value, "unit": unit, "bar": bar}


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Examples with two classes."""
    a, b = random.split(random.key(seed))
    x = random.normal(a, (EXAMPLES, FEATURES))
    return x, (x @ random.normal(b, (FEATURES,)) > 0).float()


def training(w: Tensor, decay: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of the weights, with a decay of their own each."""
    x, y = batch
    return binary_cross_entropy_with_logits(x @ w, y) + 0.5 * (decay * w * w).sum()


def validation(decay: Tensor, w: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of the weights on other data."""
    x, y = batch
    return binary_cross_entropy_with_logits(x @ w, y)


def ours(products: int = CG_STEPS) -> tuple[Any, Any, dict[str, Any]]:
    """The program, its state at the start, and its batches."""
    levels = {
        "decay": Level(validation, sgd(1.0, momentum=0.9), reads=("w",), project=lambda p: p.clamp(min=1e-8)),
        "w": Level(training, sgd(0.1, momentum=0.9), reads=("decay",), steps=INNER_STEPS),
    }
    program = graph(levels, [Edge("decay", "w", Implicit(CG(max_steps=products, rtol=0.0)))])
    start = {"decay": torch.ones(FEATURES), "w": torch.zeros(FEATURES)}
    return program, program.init(random.key(0), start), {"decay": data(1), "w": data(0)}


def by_hand() -> Callable[[int], Tensor]:
    """The same in plain autograd, with the least that it takes."""
    train, valid = data(0), data(1)

    def run(updates: int) -> Tensor:
        decay, w = torch.ones(FEATURES, requires_grad=True), torch.zeros(FEATURES, requires_grad=True)
        inner, outer = torch.zeros(FEATURES), torch.zeros(FEATURES)
        v = torch.zeros(FEATURES)
        for _ in range(updates):
            for _ in range(INNER_STEPS):
                (g,) = torch.autograd.grad(training(w, decay.detach(), train), w)
                inner = 0.9 * inner + g
                w = (w.detach() - 0.1 * inner).requires_grad_()
            (b,) = torch.autograd.grad(validation(decay, w, valid), w)
            (g,) = torch.autograd.grad(training(w, decay, train), w, create_graph=True)
            product = functools.partial(torch.autograd.grad, g, w, retain_graph=True)
            r = b - product(v)[0]
            p, rr = r, r @ r
            for _ in range(CG_STEPS):
                Hp = product(p)[0]
                alpha = rr / (p @ Hp)
                v, r = v + alpha * p, r - alpha * Hp
                p, rr = r + (r @ r) / rr * p, r @ r
            (hypergrad,) = torch.autograd.grad(g, decay, -v)
            outer = 0.9 * outer + hypergrad
            decay = (decay.detach() - outer).clamp(min=1e-8).requires_grad_()
        return decay.detach()

    return run


def by_betty(products: int = CG_STEPS) -> Callable[[int], Tensor]:
    """The same in Betty, engine and all."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    class Weights(torch.nn.Module):
        def __init__(self, start):
            super().__init__()
            self.w = torch.nn.Parameter(start)

        def forward(self):
            return self.w

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            return {"loss": validation(self.module(), self.inner(), batch)}

        def param_callback(self):
            for p in self.trainable_parameters():
                p.data.clamp_(min=1e-8)

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            return training(self.module(), self.outer(), batch)

    def problem(kind, name, start, rate, batch, config):
        module = Weights(start)
        optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
        return kind(name=name, module=module, optimizer=optimizer, train_data_loader=[batch], config=config)

    def run(updates: int) -> Tensor:
        upper = Config(type="cg", cg_iterations=products, cg_alpha=1.0)
        lower = Config(type="cg", cg_iterations=products, cg_alpha=1.0, unroll_steps=INNER_STEPS)
        outer = problem(Outer, "outer", torch.ones(FEATURES), 1.0, data(1), upper)
        inner = problem(Inner, "inner", torch.zeros(FEATURES), 0.1, data(0), lower)
        config = EngineConfig(train_iters=INNER_STEPS * updates, valid_step=10**9, logger_type="none")
        order = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]}}
        Engine(config=config, problems=[outer, inner], dependencies=order).run()
        return outer.module.w.detach().clone()

    return run


def hyperparameters() -> list[dict]:
    """Betty's example: a decay for each weight of a logistic regression, 100 inner steps and three of CG."""
    program, start, batches = ours()
    compiled = program.compiled(chunk=20)

    @torch.no_grad()  # as in `train`; the levels' own derivatives are not affected
    def run(update: Callable, updates: int) -> Tensor:
        state = start
        for _ in range(updates):
            state, _ = update(state, batches)
        return state.params["decay"]

    hand = by_hand()
    reference = hand(3)
    for name, found in (("eager", run(program.update, 3)), ("compiled", run(compiled, 3))):
        print(name, "against the hand-written loop:", (found - reference).abs().max().item())
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)
    runs = [functools.partial(run, program.update), functools.partial(run, compiled), hand]
    if HAVE_BETTY:
        single = ours(products=1)
        found = single[0].update(single[1], single[2])[0].params["decay"]
        torch.testing.assert_close(by_betty(products=1)(1), found, rtol=1e-4, atol=1e-5)
        runs.append(by_betty())
    times = alternate([functools.partial(each, count) for each in runs for count in (5, 20)], repeats=15, budget_s=3.0)
    eager, jitted, handmade, *theirs = ((many - few) / 15 for few, many in zip(times[::2], times[1::2], strict=True))
    name = "hyperparameters of a logistic regression"
    rows = [
        row(f"{name}, an update, eager", eager / 1e3, "ms"),
        row("- compiled", jitted / 1e3, "ms"),
        row("- by hand in autograd", handmade / 1e3, "ms"),
    ]
    for each in theirs:
        rows += [
            row("- Betty, with its engine", each / 1e3, "ms"),
            row("Betty / eager", each / eager, bar=">= 1.5"),
            row("Betty / compiled", each / jitted, bar=">= 5"),
        ]
    return rows


def chains() -> list[dict]:
    """The time of a hypergradient through chains of levels, with a fixed number of products at each."""
    rows, times = [], {}
    for response in ("partial", "total"):
        for levels in (2, 3, 4):
            found = chain_hypergrad(levels, 100, response)
            times[response, levels] = alternate([found], repeats=5, budget_s=0.5)[0]
            rows.append(
                row(f"a chain of {levels} levels of 100, {response} responses", times[response, levels] / 1e3, "ms")
            )
    for size in (100, 1000, 10_000):
        us = alternate([chain_hypergrad(2, size, "total")], repeats=5, budget_s=0.5)[0]
        rows.append(row(f"two levels of {size}, 5 products with a dense matrix", us / 1e3, "ms"))
    return rows


def chain_hypergrad(count: int, size: int, response: str) -> Callable[[], Any]:
    """The gradient of the top level of a chain of quadratic levels."""
    A = random.normal(random.key(0), (size, size)) / size**0.5
    coupled = lambda own, *rest: 2 * own @ own + sum((own @ A) @ other for other in rest[:-1])  # noqa: E731
    names = [f"level {i}" for i in range(count)]
    levels = {
        name: Level(coupled, sgd(0.1), reads=(*names[max(i - 1, 0) : i], *names[i + 1 : i + 2]))
        for i, name in enumerate(names)
    }
    method = Implicit(CG(max_steps=5, rtol=0.0))
    edges = [Edge(a, b, method, response=response) for a, b in itertools.pairwise(names)]
    program = graph(levels, edges)
    starts = {name: random.normal(random.fold_in(random.key(1), i), (size,)) for i, name in enumerate(names)}
    state = program.init(random.key(2), starts)
    return lambda: program.hypergrad(names[0])(state)


class Size(NamedTuple):
    """A classifier: its width and depth."""

    width: int
    layers: int


def network(size: Size) -> torch.nn.Module:
    """A perceptron, the same at every call."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        *(m for _ in range(size.layers) for m in (torch.nn.Linear(size.width, size.width), torch.nn.ReLU())),
        torch.nn.Linear(size.width, 10),
    )


def classifier(size: Size) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor], Tensor], Tensor]]:
    """The perceptron as parameters and a function."""
    function, params, _ = tree.from_module(network(size))
    return params, lambda params, x: function(params, {}, x)[0]


def weigher() -> dict[str, Tensor]:
    """The weights of the meta-weight net."""
    return {"a": random.normal(random.key(3), (1, 100)) / 10, "b": random.normal(random.key(4), (100, 1)) / 10}


def reweighting(size: Size, method: Any) -> Callable[[], dict[str, Tensor]]:
    """An update of a meta-weight net: a small net weighs the losses of the examples of a large one."""
    (params, forward), meta = classifier(size), weigher()
    x, y = random.normal(random.key(5), (64, size.width)), torch.arange(64) % 10

    def weighted(w, meta, batch):
        losses = cross_entropy(forward(w, batch), y, reduction="none")
        return (torch.sigmoid(torch.relu(losses.detach()[:, None] @ meta["a"]) @ meta["b"])[:, 0] * losses).mean()

    levels = {
        "meta": Level(lambda meta, w, batch: cross_entropy(forward(w, batch), y), sgd(0.1), reads=("w",)),
        "w": Level(weighted, sgd(0.01), reads=("meta",)),
    }
    program = graph(levels, [Edge("meta", "w", method)])
    held = [program.init(random.key(0), {"meta": meta, "w": params})]

    def update() -> dict[str, Tensor]:
        held[:] = [program.update(held.pop(), {"meta": x, "w": x}, donate=True)[0]]
        return held[0].params["meta"]

    return update


def plain(size: Size) -> Callable[[], Any]:
    """A step of plain training of the same classifier."""
    params, forward = classifier(size)
    x, y = random.normal(random.key(5), (64, size.width)), torch.arange(64) % 10
    program = graph({"w": Level(lambda w, batch: cross_entropy(forward(w, batch), y), sgd(0.01))})
    held = [program.init(random.key(0), {"w": params})]

    def update() -> None:
        held[:] = [program.update(held.pop(), {"w": x}, donate=True)[0]]

    return update


def betty_reweighting(size: Size, updates: int = 3) -> Callable[[], dict[str, Tensor]]:
    """Updates of a meta-weight net in Betty, by its difference of gradients, "darts"."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    x, y = random.normal(random.key(5), (64, size.width)), torch.arange(64) % 10
    classify = network(size)
    weigh = torch.nn.Sequential(
        torch.nn.Linear(1, 100, bias=False), torch.nn.ReLU(), torch.nn.Linear(100, 1, bias=False)
    )
    with torch.no_grad():
        for layer, weight in zip((weigh[0], weigh[2]), weigher().values(), strict=True):
            layer.weight.copy_(weight.T)

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            return {"loss": cross_entropy(self.inner(batch[0]), y)}

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            losses = cross_entropy(self.module(batch[0]), y, reduction="none")
            return (torch.sigmoid(self.outer(losses.detach()[:, None]))[:, 0] * losses).mean()

    def problem(kind, name, module, rate):
        optimizer = torch.optim.SGD(module.parameters(), lr=rate)
        config = Config(type="darts", unroll_steps=1)
        return kind(name=name, module=module, optimizer=optimizer, train_data_loader=[(x,)], config=config)

    outer, inner = problem(Outer, "outer", weigh, 0.1), problem(Inner, "inner", classify, 0.01)
    order = {"l2u": {inner: [outer]}, "u2l": {outer: [inner]}}
    engine = Engine(
        config=EngineConfig(train_iters=updates, valid_step=10**9, logger_type="none"), problems=[outer, inner],
        dependencies=order,
    )  # fmt: skip

    def run() -> dict[str, Tensor]:
        engine.run()
        return {"a": weigh[0].weight.detach().T, "b": weigh[2].weight.detach().T}

    return run


def peak_mb(make: Callable[..., Callable[[], Any]], *args: Any, repeats: int = 3) -> float:
    """The peak memory of a few updates in a process of its own, over what the process had before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_mb, (make, args, repeats))


def _peak_mb(make: Callable[..., Callable[[], Any]], args: tuple, repeats: int) -> float:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # a process inherits its parent's peak
    before = _status_mb("VmRSS")
    run = make(*args)
    for _ in range(repeats):
        run()
    return _status_mb("VmHWM") - before


def _status_mb(field: str) -> float:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def memory() -> list[dict]:
    """A meta-weight net over a classifier of 10 million parameters: memory and time against plain training."""
    size = Size(1024, 10)
    base = peak_mb(plain, size)
    difference, sama = (peak_mb(reweighting, size, method) for method in (FiniteDifference(0.01), SAMA()))
    rows = [
        row("10M parameters, plain training, peak memory", base, "MB"),
        row("- meta-weight net by FiniteDifference / plain", difference / base),
        row("- meta-weight net by SAMA / plain", sama / base),
    ]
    if HAVE_BETTY:
        # Betty's "darts" moves the weights by 0.01, and takes a lower step of rate 1
        ours, theirs = reweighting(Size(32, 2), FiniteDifference(1.0, 0.01))(), betty_reweighting(Size(32, 2), 1)()
        moved = tree.map(lambda new, old: new - old, theirs, weigher())
        torch.testing.assert_close(tree.map(lambda new, old: new - old, ours, weigher()), moved, rtol=1e-2, atol=1e-7)
        betty = peak_mb(betty_reweighting, size, repeats=1)
        rows.append(row("- FiniteDifference / Betty's darts", difference / betty, bar="<= 0.86"))
    runs = [plain(size), reweighting(size, FiniteDifference(0.01)), reweighting(size, SAMA())]
    us = alternate(runs, repeats=3, budget_s=1.0)
    rows.append(row("- a step of plain training", us[0] / 1e3, "ms"))
    return [*rows, row("- FiniteDifference / plain, time", us[1] / us[0]), row("- SAMA / plain, time", us[2] / us[0])]


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    record("multilevel", [*hyperparameters(), *chains(), *memory()], packages=("betty-ml",))


if __name__ == "__main__":
    main()
