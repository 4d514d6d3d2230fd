"""The strategies that the tests of this folder share, each with 8 members by default, and functions to minimize."""

import torch

from diffopt import adam, sgd
from diffopt.zero_order import ars, cem, cma_es, open_es, pgpe, run, sep_cma_es, snes, xnes

__all__ = ["RANKED", "STRATEGIES", "ellipsoid", "rastrigin", "rosenbrock", "search", "sphere", "start"]

STRATEGIES = {
    "open_es": lambda sigma=0.3, size=8, **options: open_es(adam(0.1), sigma, size, **options),
    "plain open_es": lambda sigma=0.3, size=8, **options: open_es(sgd(0.1), sigma, size, antithetic=False, **options),
    "pgpe": lambda sigma=0.3, size=8, **options: pgpe(sigma, size, **options),
    "snes": lambda sigma=0.3, size=8, **options: snes(sigma, size, **options),
    "xnes": lambda sigma=0.3, size=8, **options: xnes(sigma, size, **options),
    "sep_cma_es": lambda sigma=0.3, size=8, **options: sep_cma_es(sigma, size, **options),
    "active sep_cma_es": lambda sigma=0.3, size=8, **options: sep_cma_es(sigma, size, active=True, **options),
    "cma_es": lambda sigma=0.3, size=8, **options: cma_es(sigma, size, **options),
    "passive cma_es": lambda sigma=0.3, size=8, **options: cma_es(sigma, size, active=False, **options),
    "cem": lambda sigma=0.3, size=8, **options: cem(sigma, size, elites=3, momentum=0.2, extra_noise=1e-4, **options),
    "ars": lambda sigma=0.3, size=8, **options: ars(sgd(0.1), sigma, size, top=3, **options),
}
"""Each takes sigma, the size of the population and bounds."""

RANKED = [name for name in STRATEGIES if name != "ars"]
"""Those that see ranks only."""


def start(dtype=torch.float64):
    """A tree of 5 unknowns."""
    return {"w": torch.tensor([[0.7, -0.4], [1.1, 0.3]], dtype=dtype), "b": torch.tensor(-0.9, dtype=dtype)}


def sphere(x):
    """|x|^2 of a tree or a tensor."""
    return sum((leaf**2).sum() for leaf in (x.values() if isinstance(x, dict) else [x]))


def ellipsoid(x):
    """A quadratic with condition number 1e6."""
    n = x.shape[0]
    return (10.0 ** (6 * torch.arange(n, dtype=x.dtype) / (n - 1)) * x**2).sum()


def rosenbrock(x):
    """The banana valley."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def rastrigin(x):
    """A quadratic under a cosine: about 10^n local minima in [-5, 5]^n."""
    return (x**2 - 10 * torch.cos(2 * torch.pi * x) + 10).sum()


def search(strategy, f, x, key, size, *, target, evaluations):
    """Run until the best loss is at most the target: it, and the evaluations that took."""
    found = run(strategy, f, x, key, evaluations // size, callback=lambda state, losses: state.best_loss <= target)
    return float(found.loss), int(found.state.generation) * size
