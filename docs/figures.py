"""Figures made at build time: the path of every optimizer down one valley."""

from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tables import build_optimizer, list_optimizers
from torch import Tensor
from torch.func import grad, vmap

import diffopt
from diffopt.transforms import GradientTransformation

__all__ = ["descend", "draw_optimizers", "valley"]

START = torch.tensor([[-1.6, 1.1]], dtype=torch.float64)  # a matrix, so that Muon takes it for one
RATES = torch.logspace(-3, 4, 141, dtype=torch.float64)
STEPS = 40


def valley(w: Tensor) -> Tensor:
    """A bowl 20 times as steep across as along, turned by 30 degrees; its least value is 0 at (1, -0.5)."""
    x, y = w[..., 0] - 1.0, w[..., 1] + 0.5
    along, across = 0.866 * x - 0.5 * y, 0.5 * x + 0.866 * y
    return 0.5 * (along**2 + 20 * across**2)


def descend(function: Callable[..., GradientTransformation]) -> tuple[Tensor, Tensor]:
    """The path, shape (steps + 1, 2), at the learning rate of least mean loss over it, and that rate."""
    gradient = grad(lambda w: valley(w).sum())

    def path(rate: Tensor) -> Tensor:
        optimizer, w = build_optimizer(function, rate), START
        state, visited = optimizer.init(w), [w]
        for _ in range(STEPS):
            w, state = diffopt.step(optimizer, gradient(w), state, w, grad_fn=gradient)
            visited.append(w)
        return torch.cat(visited)

    paths = vmap(path)(RATES)
    best = valley(paths).mean(1).nan_to_num(torch.inf).argmin()
    return paths[best], RATES[best]


def draw_optimizers(target: Path) -> None:
    """Draw the path of each optimizer in a panel of its own, unless the picture is newer than the code behind it."""
    sources = [Path(__file__), *Path(diffopt.__file__).parent.rglob("*.py")]
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return
    optimizers = list_optimizers()
    columns, rows = 5, -(-len(optimizers) // 5)
    figure = Figure(figsize=(9, 1.65 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    x, y = torch.meshgrid(torch.linspace(-2.0, 2.2, 120), torch.linspace(-1.5, 1.5, 100), indexing="xy")
    heights = valley(torch.stack([x, y], -1))
    for axis in axes.flat:
        axis.axis("off")
    for (name, function), axis in zip(optimizers.items(), axes.flat, strict=False):
        path, rate = descend(function)
        axis.contour(x, y, heights, levels=[0.25, 1, 2.25, 4, 9, 16, 25, 36], colors="#c9d3da", linewidths=0.7)
        axis.plot(path[:, 0], path[:, 1], ".-", color="#2a6f97", lw=1, ms=3)
        axis.plot(1.0, -0.5, "*", color="#e07a1f", ms=8)
        axis.set(xlim=(-2.0, 2.2), ylim=(-1.5, 1.5), aspect="equal")
        axis.set_title(f"{name}, rate {float(f'{rate:.2g}'):g}", fontsize=9)
    figure.savefig(target, dpi=130)
