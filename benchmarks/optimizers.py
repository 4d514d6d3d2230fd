"""Adam steps against their peers, on three trees of parameters: python benchmarks/optimizers.py.

The peers are no dependencies: `pip install torchopt optax jax` into an environment of your own; rows of those that are
missing are left out. Every function of a group takes the same leaves and gradients through the same step.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from timing import alternate, median_us, record
from torch import Tensor

import diffopt
from diffopt.optimizers import adam

TREES = {"A: 1M in 100 leaves": (100, 10_000), "B: 10M in 20": (20, 500_000), "C: 1000 leaves of 100": (1000, 100)}
DONATED_BARS = {"A": "<= 1.05", "B": "<= 1.05", "C": "<= 0.6"}
BACKWARD_BARS = {"A": ">= 6", "B": ">= 3.5"}
RATE = 1e-3

MALLOC = {
    f"MALLOC_{name}_": str(1 << k) for name, k in (("MMAP_THRESHOLD", 30), ("TRIM_THRESHOLD", 34), ("TOP_PAD", 28))
}
"""glibc keeps freed memory. By default it gives large blocks back at some times and not at others, and what then takes
most of a step, its own or a peer's, is to map new pages.
"""


def peer(name: str) -> ModuleType | None:
    """A peer, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"{name} is not installed: its rows are left out")
        return None


def leaves(count: int, size: int) -> list[Tensor]:
    """So many random leaves."""
    return [torch.randn(size) for _ in range(count)]


def row(case: str, value: float, unit: str = "x", bar: str = "none") -> dict[str, Any]:
    """One row of the results."""
    return {"case": case, "value": value, "unit": unit, "bar": bar}


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Without compiled bodies."""
    os.environ["DIFFOPT_COMPILE"] = "0"
    try:
        yield
    finally:
        del os.environ["DIFFOPT_COMPILE"]


def in_place(optimizer: diffopt.GradientTransformation, params: Any, grads: Any) -> Callable[[], None]:
    """Donated steps, one after the other."""
    held = [params, optimizer.init(params)]

    def run() -> None:
        with torch.no_grad():
            held[:] = diffopt.step(optimizer, grads, held[1], held[0], donate=True)

    return run


def by_torch(params: list[Tensor], grads: list[Tensor], **options: Any) -> Callable[[], None]:
    """Steps of torch.optim.Adam."""
    copies = [p.clone().requires_grad_() for p in params]
    for p, g in zip(copies, grads, strict=True):
        p.grad = g
    return torch.optim.Adam(copies, RATE, **options).step


def optax_us(count: int, size: int) -> float:
    """The median time of a compiled and donated step of optax; in a process of its own, whose threads end with it."""
    jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
    optimizer = optax.adam(RATE)
    params, grads = ([jax.numpy.asarray(x.numpy()) for x in leaves(count, size)] for _ in range(2))
    held = [params, optimizer.init(params)]

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))

    def run() -> None:
        held[:] = jax.block_until_ready(step(*held, grads))

    return median_us(run)


def donated(label: str, params: list[Tensor], grads: list[Tensor], optax: bool) -> list[dict]:
    """Steps in place: ours of lists and of one flat vector, torch's, optax's."""
    optimizer = adam(RATE)
    (flat, _), (flat_grad, _) = diffopt.tree.ravel(params), diffopt.tree.ravel(grads)
    runs = {
        "ours": in_place(optimizer, [p.clone() for p in params], grads),
        "ours, one flat vector": in_place(optimizer, flat.clone(), flat_grad),
        "torch.optim fused": by_torch(params, grads, fused=True),
        "torch.optim foreach": by_torch(params, grads, foreach=True),
    }
    times = dict(zip(runs, alternate(list(runs.values())), strict=True))
    if optax:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            times["optax jitted and donated"] = pool.apply(optax_us, (len(params), params[0].numel()))
    base = times.pop("torch.optim fused")
    rows = [row(f"donated step / torch.optim fused, {label}", times.pop("ours") / base, bar=DONATED_BARS[label[0]])]
    rows += [row(f"  {name} / torch.optim fused", value / base) for name, value in times.items()]
    return [*rows, row("  torch.optim fused", base / 1e3, "ms")]


def pure(label: str, params: list[Tensor], grads: list[Tensor], torchopt: ModuleType | None) -> list[dict]:
    """Steps into fresh memory against a copy of as many bytes: four columns are read and three are written."""
    optimizer = adam(RATE)
    state = optimizer.init(params)
    half = grads[: len(grads) // 2]
    runs = {
        "ours": lambda: diffopt.step(optimizer, grads, state, params),
        "copy": lambda: [[x.clone() for x in column] for column in (params, state[0].mu, state[0].nu, half)],
    }
    if torchopt is not None:
        for name, accelerated in (("torchopt", False), ("torchopt accelerated", True)):
            runs[name] = torchopt_step(torchopt, params, grads, accelerated)
    times = dict(zip(runs, alternate(list(runs.values()), repeats=15), strict=True))
    rows = [row(f"pure step / copy of the same bytes, {label}", times["ours"] / times["copy"], bar="<= 1.5")]
    for name in ("torchopt", "torchopt accelerated"):
        if name in times:
            bar = ">= 1" if name == "torchopt" else "none"
            rows.append(
                row(f"{name} / pure step, which compiles nothing, {label}", times[name] / times["ours"], bar=bar)
            )
    return [*rows, row("  copy", times["copy"] / 1e3, "ms")]


def torchopt_step(torchopt: ModuleType, params: list[Tensor], grads: list[Tensor], accelerated: bool) -> Callable:
    """A functional step of torchopt."""
    optimizer = torchopt.adam(RATE, use_accelerated_op=accelerated)
    state = optimizer.init(params)

    def run(params: list[Tensor] = params, grads: list[Tensor] = grads) -> list[Tensor]:
        updates, _ = optimizer.update(grads, state, inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False)

    return run


def forward_and_backward(step: Callable[..., Any], params: Any, grads: Any, cotangents: Any) -> Callable[[], Any]:
    """One differentiable step, and its derivative in the parameters and the gradients."""

    def run() -> Any:
        p, g = (diffopt.tree.map(lambda x: x.detach().requires_grad_(), x) for x in (params, grads))
        wanted = [*diffopt.tree.leaves(p), *diffopt.tree.leaves(g)]
        return torch.autograd.grad(diffopt.tree.leaves(step(p, g)), wanted, diffopt.tree.leaves(cotangents))

    return run


def our_step(params: Any) -> Callable[..., Any]:
    """A differentiable step of ours."""
    optimizer = adam(RATE)
    state = optimizer.init(params)
    return lambda p, g: diffopt.step(optimizer, g, state, p)[0]


def differentiable(label: str, params: list[Tensor], grads: list[Tensor], torchopt: ModuleType | None) -> list[dict]:
    """One differentiable step and its backward pass, of lists, of one flat vector, and without compiling."""
    cotangents = leaves(len(params), params[0].numel())
    flat = [diffopt.tree.ravel(x)[0] for x in (params, grads, cotangents)]
    ours = forward_and_backward(our_step(params), params, grads, cotangents)

    def uncompiled() -> None:
        with eager():
            ours()

    runs = {"ours": ours, "flat": forward_and_backward(our_step(flat[0]), *flat), "eager": uncompiled}
    if torchopt is not None:
        for name, accelerated in (("torchopt", False), ("torchopt accelerated", True)):
            step = torchopt_step(torchopt, params, grads, accelerated)
            runs[name] = forward_and_backward(step, params, grads, cotangents)
    times = dict(zip(runs, alternate(list(runs.values()), repeats=15, budget_s=1.0), strict=True))
    rows = [row(f"forward and backward, {label}", times["ours"] / 1e3, "ms")]
    if torchopt is not None:
        best = min(times["torchopt"], times["torchopt accelerated"])
        bar = BACKWARD_BARS.get(label[0], "none")
        case = "torchopt, its best / ours, forward and backward"
        rows.append(row(f"{case}, {label}", best / times["ours"], bar=bar))
        rows.append(row(f"{case}, ours one flat vector, {label}", best / times["flat"], bar=bar))
        rows.append(row(f"{case}, ours not compiled, {label}", best / times["eager"], bar=">= 1"))
    return rows


def peak_bytes(fn: Callable[[], Any]) -> int:
    """The most memory that torch's CPU allocator held above what it holds before the call."""
    fn()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = fn()
    del result
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def memory(torchopt: ModuleType | None) -> list[dict]:
    """Peak memory of one differentiable step and its backward pass."""
    params, grads, cotangents = (leaves(20, 500_000) for _ in range(3))
    column = sum(p.nbytes for p in params)
    ours = peak_bytes(forward_and_backward(our_step(params), params, grads, cotangents))
    rows = [row("peak memory of a differentiable step and its backward, in columns", ours / column, "columns")]
    if torchopt is not None:
        step = torchopt_step(torchopt, params, grads, accelerated=False)
        theirs = peak_bytes(forward_and_backward(step, params, grads, cotangents))
        rows.append(row("peak memory / torchopt's", ours / theirs, bar="<= 0.6"))
        step = torchopt_step(torchopt, params, grads, accelerated=True)
        theirs = peak_bytes(forward_and_backward(step, params, grads, cotangents))
        rows.append(row("  peak memory / torchopt accelerated's", ours / theirs))
    return rows


def main() -> None:
    if MALLOC.keys() - os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    torch.manual_seed(0)
    torchopt, optax = peer("torchopt"), peer("optax")
    rows = []
    for label, (count, size) in TREES.items():
        params, grads = leaves(count, size), leaves(count, size)
        rows += donated(label, params, grads, optax is not None)
        rows += pure(label, params, grads, torchopt)
        rows += differentiable(label, params, grads, torchopt)
    record("optimizers", [*rows, *memory(torchopt)], packages=("torchopt", "optax", "jax"))


if __name__ == "__main__":
    main()
