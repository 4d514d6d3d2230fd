"""Evolution strategies and estimated gradients against their peers: python benchmarks/zero_order.py.

The peers are no dependencies: `pip install evosax evotorch cma torchopt` into an environment of your own; rows of those
that are missing are left out. All run on one thread of one processor, JAX compiled and in a process of its own. Times
are of the processor, not of the clock, so that what else the machine does counts little. Both sides evaluate the same
function of the same data in float32, with the same population.
"""

import importlib.util
import math
import multiprocessing
import os
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from timing import record
from torch.func import vmap
from torch.nn.functional import cross_entropy, relu

import diffopt
from diffopt import adam, random
from diffopt.zero_order import cma_es, es_grad, make_generation, open_es, pgpe, sep_cma_es

IMAGES, SHAPES, MEMBERS = 100, ((64, 32), (32,), (32, 10), (10,)), 256
UNKNOWNS, MANY = 1000, 1024
RATE, SIGMA, SAMPLES = 0.01, 0.1, 256
SEEDS, DIMENSION, TARGET, BUDGET = 5, 10, 1e-8, 12_000
LONG, CHUNK = 100_000, 16


def row(case: str, value: float, unit: str = "x", bar: str = "none") -> dict[str, Any]:
    """One row of the results."""
    return {"case": case, "value": value, "unit": unit, "bar": bar}


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def pin() -> None:
    """Take one processor, for this process and those that it starts: JAX knows no other limit."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def cpu_us(fns: list[Callable[[], Any]], repeats: int = 30) -> list[float]:
    """Median processor times in microseconds, the calls interleaved."""
    for fn in fns:
        for _ in range(3):
            fn()
    times: list[list[float]] = [[] for _ in fns]
    for _ in range(repeats):
        for fn, seen in zip(fns, times, strict=True):
            start = time.process_time()
            fn()
            seen.append((time.process_time() - start) * 1e6)
    return [statistics.median(seen) for seen in times]


def digits() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Images in [0, 1], labels, and the parameters of a network."""
    images, labels = load_digits(return_X_y=True)
    r = np.random.default_rng(0)
    params = [(0.1 * r.standard_normal(shape)).astype(np.float32) for shape in SHAPES]
    return (images[:IMAGES] / 16).astype(np.float32), labels[:IMAGES], params


def start() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(UNKNOWNS).astype(np.float32)


def network(activation: Callable = relu) -> tuple[Callable, list[torch.Tensor]]:
    """The loss of a network on the images, and its parameters."""
    X, y, params = digits()
    X, y = torch.tensor(X), torch.tensor(y)

    def loss(p):
        return cross_entropy(activation(X @ p[0] + p[1]) @ p[2] + p[3], y)

    return loss, [torch.tensor(p) for p in params]


def rastrigin(x):
    return (x * x - 10 * torch.cos(2 * math.pi * x)).sum(-1) + 10 * x.shape[-1]


def jax_us() -> dict[str, float]:
    """Times of evosax's generations; called in a process of its own."""
    import jax
    import jax.numpy as jnp
    import optax
    from evosax.algorithms import Open_ES

    X, y, params = digits()
    X, y = jnp.asarray(X), jnp.asarray(y)

    def loss(p, activation):
        logits = activation(X @ p[0] + p[1]) @ p[2] + p[3]
        return (jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], 1)[:, 0]).mean()

    cases = {
        "relu": (lambda p: loss(p, jax.nn.relu), [jnp.asarray(p) for p in params], MEMBERS),
        "tanh": (lambda p: loss(p, jnp.tanh), [jnp.asarray(p) for p in params], MEMBERS),
        "rastrigin": (lambda x: (x * x - 10 * jnp.cos(2 * jnp.pi * x)).sum() + 10 * UNKNOWNS, start(), MANY),
    }
    times = {}
    for name, (f, x, members) in cases.items():
        width = optax.constant_schedule(SIGMA)
        es = Open_ES(members, x, optimizer=optax.adam(RATE), std_schedule=width)
        settings, key = es.default_params, jax.random.key(0)
        state = es.init(key, x, settings)

        @jax.jit
        def generation(key, state, es=es, f=f, settings=settings):
            asked, told = jax.random.split(key)
            population, state = es.ask(asked, state, settings)
            return es.tell(told, population, jax.vmap(f)(population), state, settings)[0]

        times[name] = cpu_us([lambda g=generation, k=key, s=state: jax.block_until_ready(g(k, s))])[0]
    return times


def our_generations() -> list[dict]:
    """A generation of OpenAI's evolution strategy: ask, evaluate and tell."""
    theirs = {}
    if installed("evosax"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            theirs = pool.apply(jax_us)
    rows, key = [], random.key(0)
    count = sum(math.prod(shape) for shape in SHAPES)
    cases = {
        "relu": (f"OpenAI-ES, ReLU network of {count}", *network(), MEMBERS),
        "tanh": (f"OpenAI-ES, tanh network of {count}", *network(torch.tanh), MEMBERS),
        "rastrigin": (f"OpenAI-ES, Rastrigin of {UNKNOWNS}", rastrigin, torch.tensor(start()), MANY),
    }
    for name, (title, f, params, members) in cases.items():
        strategy = open_es(adam(RATE), SIGMA, members)
        eager = make_generation(strategy, f)
        compiled, state = diffopt.compile(eager), strategy.init(params)
        fast, slow = cpu_us([lambda c=compiled, s=state: c(key, s), lambda e=eager, s=state: e(key, s)])
        title = f"{title}, {members} members, a generation"
        if name in theirs:
            rows.append(row(f"{title}, compiled / evosax jitted", fast / theirs[name], bar="<= 1"))
            rows.append(row("- evosax jitted", theirs[name] / 1e3, "ms"))
        rows += [
            row("- ours compiled" if name in theirs else title, fast / 1e3, "ms"),
            row("- ours eager", slow / 1e3, "ms"),
        ]
    return rows


def our_pgpe() -> list[dict]:
    """A generation of PGPE, eager on both sides."""
    if not installed("evotorch"):
        return []
    import logging

    from evotorch import Problem
    from evotorch.algorithms import PGPE
    from evotorch.decorators import vectorized

    logging.disable(logging.WARNING)
    problem = Problem("min", vectorized(rastrigin), solution_length=UNKNOWNS, initial_bounds=(-1, 1))
    searcher = PGPE(
        problem, popsize=MANY, center_learning_rate=RATE, stdev_learning_rate=0.1, stdev_init=SIGMA, optimizer="adam"
    )
    strategy, key = pgpe(SIGMA, MANY, optimizer=adam(RATE)), random.key(0)
    advance, state = make_generation(strategy, rastrigin, batching="batched"), strategy.init(torch.tensor(start()))
    ours, theirs = cpu_us([lambda: advance(key, state), searcher.step])
    return [
        row(f"PGPE, Rastrigin of {UNKNOWNS}, {MANY} members, a generation, eager / evotorch", ours / theirs),
        row("- evotorch", theirs / 1e3, "ms"),
        row("- ours", ours / 1e3, "ms"),
    ]


def rosenbrock(x):
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


def our_estimates() -> list[dict]:
    """The gradient of a smoothed function, estimated from as many evaluations on both sides."""
    loss, params = network()
    rows = []
    for title, f, x in (("Rosenbrock of 100", rosenbrock, torch.tensor(start()[:100])), ("ReLU network", loss, params)):
        name = f"gradient of {SAMPLES} evaluations, {title}"
        rows += _estimate(name, f, x)
    return rows


def _estimate(name: str, f: Callable, x: Any) -> list[dict]:
    leaves = x if isinstance(x, list) else [x]
    key, estimate = random.key(0), es_grad(f, SIGMA, SAMPLES)
    compiled = diffopt.compile(estimate)
    ours = [lambda: compiled(key, x), lambda: estimate(key, x)]
    if not installed("torchopt"):
        return [row(f"{name}, compiled", cpu_us(ours)[0] / 1e3, "ms")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchopt.diff.zero_order import zero_order
    normal = torch.distributions.Normal(0.0, 1.0)
    places = tuple(range(len(leaves)))
    smooth = zero_order(normal, method="naive", argnums=places, num_samples=SAMPLES, sigma=SIGMA)(
        lambda *leaves: f(list(leaves) if isinstance(x, list) else leaves[0])
    )
    traced = [leaf.clone().requires_grad_() for leaf in leaves]
    fast, eager, slow = cpu_us([*ours, lambda: torch.autograd.grad(smooth(*traced), traced)], repeats=15)
    return [
        row(f"{name}, torchopt / ours compiled", slow / fast, bar=">= 10"),
        row("- torchopt / ours eager", slow / eager),
        row("- torchopt", slow / 1e3, "ms"),
        row("- ours compiled", fast / 1e3, "ms"),
    ]


def grown_mb(samples: int) -> float:
    """By how much the memory of a new process grows in an estimate of so many samples, in chunks."""
    torch.set_num_threads(1)
    x, key = torch.linspace(-1, 2, LONG), random.key(0)
    f = lambda x: (x * x).sum()  # noqa: E731
    es_grad(f, SIGMA, 4, chunk_size=4)(key, x[:100])
    before = most_mb()
    es_grad(f, SIGMA, samples, chunk_size=CHUNK)(key, x)
    return most_mb() - before


def most_mb() -> float:
    """The most memory that this process has had, counted from its own start, as getrusage's is not."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def our_memory() -> list[dict]:
    """What an estimate in chunks holds does not grow with its samples."""
    if not pathlib.Path("/proc/self/status").exists():
        return []
    few, many = 4 * CHUNK, 128 * CHUNK
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        grown = [pool.apply(grown_mb, (samples,)) for samples in (few, many)]
    name = f"es_grad, {LONG} unknowns in chunks of {CHUNK}, memory of {many} samples / of {few}"
    return [row(name, grown[1] / grown[0], bar="<= 1.1"), row(f"- of {many} samples", grown[1], "MB")]


def sphere(x):
    return (x * x).sum(-1)


def ellipsoid(x):
    scales = torch.logspace(0, 6, x.shape[-1], dtype=x.dtype)
    return (scales * x * x).sum(-1)


def evaluations(strategy: Any, f: Callable, members: int) -> float:
    """The median of evaluations until a value below the target, over runs side by side."""
    keys = random.split(random.key(0), SEEDS)
    advance = vmap(make_generation(strategy, f))
    state = vmap(lambda x: strategy.init(x))(torch.ones(SEEDS, DIMENSION, dtype=torch.float64) / 2)
    counts = torch.full((SEEDS,), math.inf)
    for t in range(1, BUDGET // members + 1):
        state, _ = advance(keys, state)
        counts = torch.where((state.best_loss < TARGET) & counts.isinf(), t * members, counts)
        if counts.isfinite().all():
            break
    return counts.median().item()


def pycma_evaluations(f: Callable, diagonal: bool) -> float:
    """The same of pycma, with its defaults."""
    import cma

    counts = []
    for seed in range(1, SEEDS + 1):
        options = {"verbose": -9, "seed": seed, "CMA_diagonal": diagonal}
        es = cma.CMAEvolutionStrategy(DIMENSION * [0.5], 0.5, options)
        lowest = math.inf
        while lowest >= TARGET and es.countevals < BUDGET:
            X = es.ask()
            losses = f(torch.tensor(np.array(X))).tolist()
            es.tell(X, losses)
            lowest = min(lowest, *losses)
        counts.append(es.countevals if lowest < TARGET else math.inf)
    return statistics.median(counts)


def our_searches() -> list[dict]:
    """Evaluations to the target, from the same start, width and budget."""
    members, rows = 4 + int(3 * math.log(DIMENSION)), []
    for name, make, f, diagonal in (
        ("CMA-ES, sphere", cma_es, sphere, False),
        ("CMA-ES, ellipsoid", cma_es, ellipsoid, False),
        ("CMA-ES, Rosenbrock", cma_es, rosenbrock, False),
        ("separable CMA-ES, ellipsoid", sep_cma_es, ellipsoid, True),
    ):
        ours = evaluations(make(0.5), f, members)
        title = f"{name} {DIMENSION}-d, median evaluations to {TARGET:.0e}"
        if not installed("cma"):
            rows.append(row(title, ours, ""))
            continue
        theirs = pycma_evaluations(f, diagonal)
        rows += [
            row(f"{title} / pycma", ours / theirs, bar="<= 1.2"),
            row("- ours", ours, ""),
            row("- pycma", theirs, ""),
        ]
    return rows


def main() -> None:
    pin()
    torch.set_num_threads(1)
    rows = [*our_generations(), *our_pgpe(), *our_estimates(), *our_memory(), *our_searches()]
    record("zero_order", rows, packages=("jax", "evosax", "evotorch", "torchopt", "cma"))


if __name__ == "__main__":
    main()
