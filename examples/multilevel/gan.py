"""A generative adversarial network as a graph of two players, on a ring of eight Gaussians.

The generator maps noise to points, the discriminator tells them from real ones. Each answers the other's moves
without foreseeing them, `Detached()`; the running average of the generator is the model. The plain rivals are one
Gaussian, and a kernel density estimate, which on two-dimensional data is hard to beat.

The measure is the energy distance to fresh data, 0 for the same distribution; its scale is that of a second real
sample.

Run it: python examples/multilevel/gan.py
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffopt import random
from diffopt.multilevel import Detached, Edge, Graph, Level, graph, train
from diffopt.optimizers import adam
from diffopt.typing import Tree

WIDTH, BATCH = 64, 256


def real(key: Tensor, count: int) -> Tensor:
    """Points of the ring."""
    mode, spread = random.split(key)
    angle = (8 * random.uniform(mode, (count,))).floor() * (2 * math.pi / 8)
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.08 * random.normal(spread, (count, 2))


def network(key: Tensor, sizes: tuple[int, ...]) -> Tree:
    """The weights of a network."""
    keys = random.split(key, len(sizes) - 1)
    ends = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [(random.normal(k, (m, n)) * math.sqrt(2 / m), torch.zeros(n)) for k, m, n in ends]


def apply(weights: Tree, x: Tensor) -> Tensor:
    """Evaluate a network."""
    for W, b in weights[:-1]:
        x = torch.nn.functional.leaky_relu(x @ W + b, 0.2)
    W, b = weights[-1]
    return x @ W + b


def program() -> Graph:
    """The generator above, the discriminator below; the latter sees real points and noise."""

    def fool(generator, discriminator, batch):
        return softplus(-apply(discriminator, apply(generator, batch[1]))).mean()

    def tell(discriminator, generator, batch):
        points, noise = batch
        fake = apply(generator, noise)
        return softplus(-apply(discriminator, points)).mean() + softplus(apply(discriminator, fake)).mean()

    levels = {
        "generator": Level(fool, adam(1e-3, b1=0.5), reads=("discriminator",)),
        "discriminator": Level(tell, adam(1e-3, b1=0.5), reads=("generator",), steps=2),
    }
    return graph(levels, [Edge("generator", "discriminator", Detached())])


def batch(key: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Real points and noise, as a function of the number of the batch."""
    points, noise = random.split(random.fold_in(key, number))
    return real(points, BATCH), random.normal(noise, (BATCH, 4))


def distance(x: Tensor, y: Tensor) -> float:
    """The energy distance of two samples."""
    mean = lambda a, b: torch.cdist(a, b).mean()  # noqa: E731
    return float(2 * mean(x, y) - mean(x, x) - mean(y, y))


def run(seed: int = 0, updates: int = 1500, *, quiet: bool = False) -> dict[str, float]:
    """Energy distances to real points."""
    init, players, fresh, noise = random.split(random.key(seed), 4)
    first, second = random.split(init)
    start = {"generator": network(first, (4, WIDTH, WIDTH, 2)), "discriminator": network(second, (2, WIDTH, WIDTH, 1))}
    sources = {
        name: lambda number, key=key: batch(key, number)
        for name, key in zip(start, random.split(players), strict=True)
    }  # fmt: skip
    game = program()
    trained = train(
        game, game.init(random.key(seed), start), sources, updates=updates, average={"generator": 0.99}, quiet=quiet
    )
    held, seen, other = (real(key, 1000) for key in random.split(fresh, 3))
    z = random.normal(noise, (1000, 4))
    samples = {
        "start": apply(start["generator"], z),
        "generator": apply(trained.average["generator"], z),
        "one Gaussian": z[:, :2] @ torch.linalg.cholesky(seen.T.cov()).T + seen.mean(0),
        "kernel density estimate": seen + 0.05 * z[:, :2],
        "another real sample": other,
    }
    return {name: distance(sample, held) for name, sample in samples.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, value in run().items():
        print(f"energy distance, {name}: {value:.4f}")
