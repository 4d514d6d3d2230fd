"""Fused Adam steps on a GPU, against copy bandwidth and torch.optim: python benchmarks/gpu.py.

Without a GPU, `TRITON_INTERPRET=1 python benchmarks/gpu.py --interpret` runs every case small, through the kernels, and
checks their results; it times nothing and stores nothing.
"""

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
from timing import alternate, record
from torch import Tensor

import diffopt
from diffopt.optimizers import adam
from diffopt.transforms import apply_updates
from diffopt.transforms.fusion import launch

TREES = {"100M in one leaf": (1, 100_000_000), "100M in 300 leaves": (300, 333_333), "1000 leaves of 100": (1000, 100)}
SMALL = {"one leaf": (1, 5_000), "7 leaves": (7, 333)}
RATE = 1e-3
BYTES = 4 * 7  # an entry of Adam in float32: four columns are read, three written


def row(case: str, value: float, unit: str = "x", bar: str = "none") -> dict[str, Any]:
    """One row of the results."""
    return {"case": case, "value": value, "unit": unit, "bar": bar}


def leaves(count: int, size: int, device: str) -> list[Tensor]:
    """So many random leaves."""
    return [torch.randn(size, device=device) for _ in range(count)]


def cases(count: int, size: int, device: str) -> dict[str, Callable[[], Any]]:
    """Every way of taking the same step, as functions of nothing."""
    params, grads, cotangents = (leaves(count, size, device) for _ in range(3))
    optimizer = adam(RATE)
    state = optimizer.init(params)
    held = [[p.clone() for p in params], optimizer.init(params)]
    copies = [p.clone().requires_grad_() for p in params]
    for p, g in zip(copies, grads, strict=True):
        p.grad = g

    def donated() -> Any:
        with torch.no_grad():
            held[:] = diffopt.step(optimizer, grads, held[1], held[0], donate=True)
        return held[0]

    def eager(p: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        return apply_updates(p, optimizer.update(g, state, p)[0])

    def both(step: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> Any:
            p, g = ([x.detach().requires_grad_() for x in column] for column in (params, grads))
            return torch.autograd.grad(step(p, g), [*p, *g], cotangents)

        return run

    return {
        "copy": lambda: [p.clone() for p in params],
        "pure": lambda: diffopt.step(optimizer, grads, state, params)[0],
        "donated": donated,
        "torch.optim fused": torch.optim.Adam(copies, RATE, fused=device == "cuda").step,
        "fused, forward and backward": both(lambda p, g: diffopt.step(optimizer, g, state, p)[0]),
        "eager, forward and backward": both(eager),
    }


def measured(label: str, count: int, size: int) -> list[dict]:
    """The rows of one tree."""
    runs = cases(count, size, "cuda")
    times = dict(zip(runs, alternate(list(runs.values())), strict=True))
    bandwidth = 2 * 4 * count * size / times["copy"]
    large = count * size >= 10_000_000
    fused, backward = "fused, forward and backward", "eager, forward and backward"
    return [
        row(f"copy, {label}", bandwidth / 1e3, "GB/s"),
        row(
            f"fused pure step, share of copy bandwidth, {label}",
            BYTES * count * size / times["pure"] / bandwidth,
            bar=">= 0.85" if large else "none",
        ),
        row(f"donated step / torch.optim fused, {label}", times["donated"] / times["torch.optim fused"], bar="<= 1.0"),
        row(f"eager chain / fused, forward and backward, {label}", times[backward] / times[fused], bar=">= 10"),
    ]


def checked(label: str, count: int, size: int) -> None:
    """Run every case on the CPU through the kernels, and compare with the eager chain."""
    runs = cases(count, size, "cpu")
    found = runs["fused, forward and backward"]()
    torch.testing.assert_close(found, runs["eager, forward and backward"](), rtol=1e-5, atol=1e-6)
    want = runs["pure"]()
    torch.testing.assert_close(runs["donated"](), want, rtol=1e-5, atol=1e-6)
    print(f"{label}: the kernels agree with the chain")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--interpret", action="store_true", help="run small through Triton's interpreter, time nothing")
    if parser.parse_args().interpret:
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("set TRITON_INTERPRET=1 in the environment as well")
        launch.by_kernel = lambda leaves: True
        for label, (count, size) in SMALL.items():
            checked(label, count, size)
        return
    if not torch.cuda.is_available():
        print("no GPU was found: nothing is measured; --interpret runs the kernels small, without one")
        return
    torch.manual_seed(0)
    record("gpu", [entry for label, (count, size) in TREES.items() for entry in measured(label, count, size)])


if __name__ == "__main__":
    main()
