"""A penalty for each feature of a logistic regression, through 100 steps and three products with the Hessian.

    min_p  CE_valid(w*(p)),   w*(p) = argmin_w  CE_train(w) + 1/2 sum_j exp(p_j) w_j^2

Of 100 features 10 matter. The lower level takes 100 steps for one of the upper level's, warm from where it was, and
its response is differentiated by conjugate gradients that stop after three products (the benchmark of Betty, Choe et
al. 2023). The plain rivals: one penalty for all features from a grid, and the same fit on both sets together.

Run it: python examples/multilevel/hpo_logistic.py
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from diffopt import random
from diffopt.linalg import CG
from diffopt.multilevel import Edge, Graph, Implicit, Level, graph, train
from diffopt.optimizers import adam, sgd
from diffopt.solvers import minimize

FEATURES, INFORMATIVE = 100, 10
GRID = (-7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0)


class Split(NamedTuple):
    """One set of data: features (n, 100) and labels (n,) in {0, 1}."""

    x: Tensor
    y: Tensor


def draw(seed: int, sizes: tuple[int, ...] = (250, 250, 5000)) -> list[Split]:
    """Training, validation and test data of a logistic model."""
    weights, points, labels = random.split(random.key(seed), 3)
    w = random.normal(weights, (FEATURES,)) * (torch.arange(FEATURES) < INFORMATIVE)
    x = random.normal(points, (sum(sizes), FEATURES))
    y = (random.uniform(labels, (sum(sizes),)) < torch.sigmoid(x @ w)).float()
    return [Split(*parts) for parts in zip(x.split(sizes), y.split(sizes), strict=True)]


def fit_loss(w: Tensor, penalty: Tensor, data: Split) -> Tensor:
    """The loss of the lower level."""
    return cross_entropy(data.x @ w, data.y) + (penalty.exp() * w**2).sum() / 2


def program(steps: int = 100) -> Graph:
    """The penalties above, the weights below."""
    levels = {
        "penalty": Level(
            lambda p, w, data: cross_entropy(data.x @ w, data.y), adam(0.1), reads=("weights",), project=_bounded
        ),
        "weights": Level(fit_loss, sgd(0.5), reads=("penalty",), steps=steps),
    }
    return graph(levels, [Edge("penalty", "weights", Implicit(CG(max_steps=3)))])


def run(seed: int = 0, updates: int = 100, *, steps: int = 100, quiet: bool = False) -> dict[str, float]:
    """Test errors by method."""
    training, valid, test = draw(seed)
    penalties = program(steps)
    start = {"penalty": torch.full((FEATURES,), -4.0), "weights": torch.zeros(FEATURES)}
    batches = lambda update: {"penalty": valid, "weights": training}  # noqa: E731
    trained = train(penalties, penalties.init(random.key(seed), start), batches, updates=updates, quiet=quiet)
    both = Split(torch.cat([training.x, valid.x]), torch.cat([training.y, valid.y]))
    fits = {f: torch.stack([fitted(torch.tensor(p), f) for p in GRID]) for f in (training, both)}
    best = torch.stack([cross_entropy(valid.x @ w, valid.y) for w in fits[training]]).argmin()
    found = {
        "100 penalties": trained.state.params["weights"],
        "100 penalties, fitted again to both sets": fitted(trained.state.params["penalty"], both),
        "one penalty from a grid": fits[training][best],
        "one penalty from a grid, fitted again to both sets": fits[both][best],
    }
    return {name: error(w, test) for name, w in found.items()}


def fitted(penalty: Tensor, data: Split) -> Tensor:
    """The weights that a penalty, or one for each feature, leads to."""
    return minimize(fit_loss, torch.zeros(FEATURES), (penalty, data), atol=1e-4).value


def error(w: Tensor, data: Split) -> float:
    """The share of wrong labels."""
    return float(((data.x @ w > 0) != (data.y > 0.5)).float().mean())


def _bounded(penalty: Tensor) -> Tensor:
    """Penalties that the lower level's step size can bear."""
    return penalty.clamp(-8.0, 0.0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, share in run().items():
        print(f"test error, {name}: {100 * share:.1f}%")
