"""Meta-gradients against their peers, each in one thread: python benchmarks/meta.py.

The peers are no dependencies: `pip install torchopt higher` into an environment of your own; rows of those that are
missing are left out. (learn2learn 0.2 has no build for Python 3.11.) Every way of a case takes the gradient of the same
meta-loss at the same place, and all are compared before any is timed. Times are those of the process, not of the clock,
so that other programs on the machine weigh little.
"""

import functools
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from timing import record
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy, mse_loss

import diffopt
from diffopt import tree
from diffopt.meta import maml
from diffopt.nn import MetaOptimizer, extract_state, recover_state
from optimizers import peak_bytes, peer, row

RATE = 0.05
STEPS, LONG = 5, 50
Loss = Callable[[Tensor, Tensor], Tensor]
Task = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def mlp(width: int = 40) -> nn.Module:
    """Two layers, of one number."""
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))


def conv_net(*, pooled: bool, channels: int = 8, ways: int = 5) -> nn.Module:
    """Two blocks of convolution and group norm on 8 x 8 images, each of which halves them, and a head.

    Blocks halve by a stride, as those of Finn, Abbeel and Levine (2017) for characters do, or by pooling.
    """
    layers: list[nn.Module] = []
    for inputs in (1, channels):
        convolution = nn.Conv2d(inputs, channels, 3, padding=1, stride=1 if pooled else 2)
        layers += [convolution, nn.GroupNorm(4, channels), nn.ReLU(), *[nn.AvgPool2d(2)] * pooled]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels, ways))


def sines(tasks: int, shots: int = 10) -> Task:
    """Support and query data of sines: x and y, each (tasks, shots, 1)."""
    amplitude, phase = 1 + torch.rand(tasks, 1, 1), torch.rand(tasks, 1, 1)
    xs = [4 * torch.rand(tasks, shots, 1) - 2 for _ in range(2)]
    support, query = ((x, amplitude * torch.sin(2 * x + phase)) for x in xs)
    return support, query


def images(tasks: int, ways: int = 5, shots: int = 5) -> Task:
    """Support and query data of noisy patterns: images (tasks, ways * shots, 1, 8, 8) and their classes."""
    patterns = torch.randn(tasks, ways, 1, 1, 8, 8)
    labels = torch.arange(ways).repeat_interleave(shots).expand(tasks, -1)
    seen = [(patterns + torch.randn(tasks, ways, shots, 1, 8, 8)).flatten(1, 2) for _ in range(2)]
    return (seen[0], labels), (seen[1], labels)


def ways_of(net: nn.Module, criterion: Loss, tasks: Task, torchopt: ModuleType | None, higher: ModuleType | None):
    """Every way to take the gradient of the meta-loss, as functions of nothing that give its leaves."""
    params = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return criterion(functional_call(net, params, (data[0],)), data[1])

    meta_loss = maml(loss, diffopt.sgd(RATE), STEPS)
    slopes = {"ours": diffopt.grad(meta_loss), "hand-written": torch.func.grad(by_hand(loss))}
    slopes["ours, compiled"] = diffopt.compile(slopes["ours"])
    slopes["hand-written, compiled"] = torch.compile(slopes["hand-written"], fullgraph=True)
    ways = {name: functools.partial(run, slope, params, tasks) for name, slope in slopes.items()}
    ways["ours, modules"] = functools.partial(by_loop, net, modules_of(net, criterion), tasks)
    if torchopt is not None:
        ways["torchopt.MetaSGD"] = functools.partial(by_loop, net, meta_sgd_of(torchopt, net, criterion), tasks)
        ways["torchopt.FuncOptimizer"] = functools.partial(by_loop, net, func_of(torchopt, net, loss), tasks)
    if higher is not None:
        ways["higher"] = functools.partial(by_loop, net, higher_of(higher, net, criterion), tasks)
    return ways


def run(slope: Callable[..., dict[str, Tensor]], params: dict[str, Tensor], tasks: Task) -> list[Tensor]:
    """A gradient in the order of the net's parameters."""
    found = slope(params, tasks)
    return [found[name] for name in params]


def by_hand(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The meta-loss as one writes it in torch.func."""

    def of_task(params: dict[str, Tensor], support: Any, query: Any) -> Tensor:
        for _ in range(STEPS):
            slope = torch.func.grad(loss)(params, support)
            params = {name: p - RATE * slope[name] for name, p in params.items()}
        return loss(params, query)

    return lambda params, tasks: vmap(of_task, in_dims=(None, 0, 0))(params, *tasks).mean()


def by_loop(net: nn.Module, of_task: Callable[[Any, Any], Tensor], tasks: Task) -> list[Tensor]:
    """The gradients of all tasks, one task after the other, as peers do."""
    parameters = list(net.parameters())
    for p in parameters:
        p.grad = None
    count = tasks[0][0].shape[0]
    for i in range(count):
        support, query = (tuple(x[i] for x in half) for half in tasks)
        (of_task(support, query) / count).backward()
    return [p.grad for p in parameters]


def modules_of(net: nn.Module, criterion: Loss) -> Callable[[Any, Any], Tensor]:
    """The query loss of a task by `diffopt.nn`."""

    def of_task(support: Any, query: Any) -> Tensor:
        start, inner = extract_state(net), MetaOptimizer(net, diffopt.sgd(RATE))
        for _ in range(STEPS):
            inner.step(criterion(net(support[0]), support[1]))
        value = criterion(net(query[0]), query[1])
        recover_state(net, start)
        return value

    return of_task


def meta_sgd_of(torchopt: ModuleType, net: nn.Module, criterion: Loss) -> Callable[[Any, Any], Tensor]:
    """The query loss of a task by torchopt's MetaSGD, as in its tutorial."""
    inner = torchopt.MetaSGD(net, lr=RATE)

    def of_task(support: Any, query: Any) -> Tensor:
        starts = [torchopt.extract_state_dict(x, by="reference") for x in (net, inner)]
        for _ in range(STEPS):
            inner.step(criterion(net(support[0]), support[1]))
        value = criterion(net(query[0]), query[1])
        for x, start in zip((net, inner), starts, strict=True):
            torchopt.recover_state_dict(x, start)
        return value

    return of_task


def func_of(torchopt: ModuleType, net: nn.Module, loss: Callable[..., Tensor]) -> Callable[[Any, Any], Tensor]:
    """The query loss of a task by torchopt's FuncOptimizer."""

    def of_task(support: Any, query: Any) -> Tensor:
        inner, params = torchopt.FuncOptimizer(torchopt.sgd(RATE)), dict(net.named_parameters())
        for _ in range(STEPS):
            params = inner.step(loss(params, support), params)
        return loss(params, query)

    return of_task


def higher_of(higher: ModuleType, net: nn.Module, criterion: Loss) -> Callable[[Any, Any], Tensor]:
    """The query loss of a task by higher's functional copy of the net."""
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)

    def of_task(support: Any, query: Any) -> Tensor:
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (copy, inner):
            for _ in range(STEPS):
                inner.step(criterion(copy(support[0]), support[1]))
            return criterion(copy(query[0]), query[1])

    return of_task


def check_equal(ways: dict[str, Callable[[], list[Tensor]]]) -> None:
    """All gradients agree to the rounding of float32 through the steps."""
    want = ways["hand-written"]()
    for name, way in ways.items():
        began = time.perf_counter()
        torch.testing.assert_close(way(), want, rtol=1e-3, atol=1e-5)
        print(f"{name} agrees; its first call took {time.perf_counter() - began:.1f} s", flush=True)


def process_ms(runs: dict[str, Callable[[], Any]], *, repeats: int = 15, budget_s: float = 0.6) -> dict[str, float]:
    """Median milliseconds of the process a call, in interleaved blocks."""
    counts, seen = {}, {name: [] for name in runs}
    for name, fn in runs.items():
        fn()
        began = time.process_time()
        fn()
        counts[name] = max(1, int(budget_s / repeats / max(time.process_time() - began, 1e-6)))
    for _ in range(repeats):
        for name, fn in runs.items():
            began = time.process_time()
            for _ in range(counts[name]):
                fn()
            seen[name].append((time.process_time() - began) / counts[name] * 1e3)
    return {name: statistics.median(times) for name, times in seen.items()}


def against(label: str, net: nn.Module, criterion: Loss, tasks: Task, bars: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of one case: ours against each peer."""
    ways = ways_of(net, criterion, tasks, peer("torchopt"), peer("higher"))
    check_equal(ways)
    times = process_ms(ways)
    rows = []
    for name in ("torchopt.MetaSGD", "torchopt.FuncOptimizer", "higher", "hand-written"):
        if name in times:
            bar = bars.get(f"compiled, {name}", "none")
            rows.append(row(f"{name} / ours compiled, {label}", times[name] / times["ours, compiled"], bar=bar))
            bar = bars.get(name, "none")
            rows.append(row(f"  {name} / ours eager", times[name] / times["ours"], bar=bar))
    ratio = times["ours, compiled"] / times["hand-written, compiled"]
    rows.append(row(f"ours compiled / hand-written compiled, {label}", ratio, bar=bars["hand-written, compiled"]))
    return rows + [row(f"  {name}", value, "ms") for name, value in times.items()]


def long_unroll() -> list[dict[str, Any]]:
    """Memory and time of many inner steps, with and without checkpoints."""
    (function, params, buffers), tasks = tree.from_module(mlp()), sines(32)

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(function(params, buffers, data[0])[0], data[1])

    runs = {
        str(name): functools.partial(diffopt.grad(maml(loss, diffopt.sgd(RATE), LONG, checkpoint=name)), params, tasks)
        for name in (None, "sqrt", "log")
    }
    want = tree.leaves(runs["None"]())
    for fn in runs.values():
        torch.testing.assert_close(tree.leaves(fn()), want, rtol=1e-4, atol=1e-6)
    peaks, times = {name: peak_bytes(fn) for name, fn in runs.items()}, process_ms(runs)
    rows = []
    for name in ("sqrt", "log"):
        first = name == "sqrt"
        case = f'{LONG} inner steps, checkpoint="{name}" / none'
        rows.append(row(f"peak memory, {case}", peaks[name] / peaks["None"], bar="<= 0.25" if first else "none"))
        rows.append(row(f"time, {case}", times[name] / times["None"], bar="<= 2" if first else "none"))
    return [*rows, row("  without", peaks["None"] / 2**20, "MiB"), row("  without", times["None"], "ms")]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bars = {"compiled, torchopt.MetaSGD": ">= 80", "torchopt.MetaSGD": ">= 8", "hand-written, compiled": "<= 1.1"}
    rows = against("MLP, 5 steps, 32 tasks", mlp(), mse_loss, sines(32), bars) + long_unroll()
    record("meta", rows, packages=("torchopt", "higher"))  # at once: the next cases compile for minutes
    bars = {"compiled, torchopt.MetaSGD": ">= 5", "hand-written, compiled": "<= 1.1"}
    for kind in ("strided", "pooled"):
        label = f"{kind} conv net, 5-way 5-shot, 5 steps, 8 tasks"
        rows += against(label, conv_net(pooled=kind == "pooled"), cross_entropy, images(8), bars)
        record("meta", rows, packages=("torchopt", "higher"))


if __name__ == "__main__":
    main()
