"""A meta-weight net over transformers of 10 and 100 million parameters: python benchmarks/transformers.py.

A small net weighs the losses of the examples of a large classifier of random tokens, by methods that build no graph of
second order. Memory and time are held against plain training of the same classifier, by the same optimizer on the same
batches; each case has a process of its own. On a GPU where there is one, in bfloat16; else on the CPU, in float32.
"""

import argparse
import functools
import logging
import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timing import record
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from diffopt import random, tree
from diffopt.multilevel import SAMA, Edge, FiniteDifference, Level, graph
from diffopt.optimizers import adam

VOCABULARY, CLASSES, TOKENS, EXAMPLES = 20_000, 10, 64, 16
METHODS: dict[str, Any] = {"plain": None, "FiniteDifference": FiniteDifference(1e-4), "SAMA": SAMA()}


class Size(NamedTuple):
    """A transformer: its width, which heads of 64 share, and its layers."""

    width: int
    layers: int


SIZES = {"10M": Size(320, 4), "100M": Size(768, 12)}


class Classifier(nn.Module):
    """A transformer that reads tokens, and classifies by the mean of what it made of them."""

    def __init__(self, size: Size, *, checkpointed: bool = False):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, size.width), nn.Embedding(TOKENS, size.width)
        layer = functools.partial(
            nn.TransformerEncoderLayer,
            size.width, size.width // 64, 4 * size.width, dropout=0.0, batch_first=True, norm_first=True,
        )  # fmt: skip
        self.layers = nn.ModuleList(layer() for _ in range(size.layers))
        self.head, self.checkpointed = nn.Linear(size.width, CLASSES), checkpointed

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits, shape (examples, classes)."""
        x = self.tokens(tokens) + self.places.weight
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.head(x.mean(1))


def program(size: Size, method: Any, device: str, *, checkpointed: bool = False) -> Callable[[], Any]:
    """An update of the classifier, and of the net that weighs its examples if there is a method."""
    torch.manual_seed(0)
    with torch.device(device):
        function, params, _ = tree.from_module(Classifier(size, checkpointed=checkpointed))
    key = random.key(1, device=device)
    tokens = (random.uniform(key, (EXAMPLES, TOKENS)) * VOCABULARY).long()
    labels = torch.arange(EXAMPLES, device=device) % CLASSES

    def losses(w, batch):
        return cross_entropy(function(w, {}, batch)[0], labels, reduction="none")

    def weighted(w, meta, batch):
        each = losses(w, batch)
        return (torch.sigmoid(torch.relu(each.detach()[:, None] @ meta["a"]) @ meta["b"])[:, 0] * each).mean()

    precision = torch.bfloat16 if device == "cuda" else None
    train = functools.partial(Level, optimizer=adam(1e-4), precision=precision)
    if method is None:
        run = graph({"w": train(lambda w, batch: losses(w, batch).mean())})
        state = run.init(key, {"w": params})
    else:
        a, b = random.split(random.key(2, device=device))
        meta = {"a": random.normal(a, (1, 100)) / 10, "b": random.normal(b, (100, 1)) / 10}
        levels = {
            "meta": train(lambda meta, w, batch: losses(w, batch).mean(), reads=("w",)),
            "w": train(weighted, reads=("meta",)),
        }
        run = graph(levels, [Edge("meta", "w", method)])
        state = run.init(key, {"meta": meta, "w": params})
    batches, held = dict.fromkeys(state.params, tokens), [state]

    @torch.no_grad()
    def update() -> dict[str, Tensor]:
        state, metrics = run.update(held.pop(), batches, donate=True)
        held.append(state)
        if method is not None and not bool(metrics["meta"].gradient_norm > 0):
            raise RuntimeError("no gradient reached the net that weighs the examples")
        return metrics["w"].loss

    return update


def measured(size: Size, method: str, device: str, options: dict[str, bool], repeats: int) -> tuple[float, float]:
    """The peak memory in MB over that of a small program, and the median time of an update in ms."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (size, method, device, options, repeats))


def _measured(size: Size, method: str, device: str, options: dict[str, bool], repeats: int) -> tuple[float, float]:
    logging.disable(logging.WARNING)
    program(Size(64, 1), METHODS[method], device, **options)()  # what torch imports when it is first used
    before = _peak_mb(device, start=True)
    update, times = program(size, METHODS[method], device, **options), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        update()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return _peak_mb(device) - before, statistics.median(times[1:]) * 1e3


def _peak_mb(device: str, *, start: bool = False) -> float:
    if device == "cuda":
        torch.cuda.init()
        return torch.cuda.max_memory_allocated() / 2**20
    status, field = pathlib.Path("/proc/self/status"), "VmRSS" if start else "VmHWM"
    if start:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # a process inherits its parent's peak
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith(field))


def rows(name: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """What the methods cost for a transformer of one size."""
    size = SIZES[name]
    count = sum(p.numel() for p in Classifier(size).parameters())
    memory, ms = measured(size, "plain", device, {}, repeats)
    found = [
        (f"{name}, {count / 1e6:.1f} million parameters, plain training, peak memory", memory, "MB"),
        ("- an update", ms, "ms"),
    ]
    for method in ("FiniteDifference", "SAMA"):
        its_memory, its_ms = measured(size, method, device, {}, repeats)
        found += [
            (f"- {method} / plain, memory", its_memory / memory, "x"),
            (f"- {method} / plain, time", its_ms / ms, "x"),
        ]
    again, again_ms = measured(size, "FiniteDifference", device, {"checkpointed": True}, repeats)
    found += [
        ("- FiniteDifference with layers checkpointed / plain, memory", again / memory, "x"),
        ("- FiniteDifference with layers checkpointed / plain, time", again_ms / ms, "x"),
    ]
    return [{"case": case, "value": value, "unit": unit, "bar": "none"} for case, value, unit in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3, help="updates that are timed, after one that is not")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record("transformers", [row for name in options.sizes for row in rows(name, device, options.repeats)])


if __name__ == "__main__":
    main()
