"""The search for a cell of two operations on digits, relaxed: an architecture is a mixture, and has a gradient.

    min_a  CE_valid(w*(a); a),   w*(a) = argmin_w  CE_train(w; a),
    cell(x) = sum_k softmax(a_1)_k op_k(x), then the same with a_2

One step of the weights for one of the architecture, whose response is differentiated by two more gradients (DARTS,
Liu et al. 2019, second order). What counts is the discrete cell, trained anew on both sets; and the plain rivals are
cells drawn at random, trained the same way. They are as good: the median of all that were tried is no worse than the
cell found. The script prints the figures.

Run it: python examples/multilevel/architecture_search.py
"""

import itertools

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, cross_entropy, max_pool2d, one_hot

from diffopt import random
from diffopt.multilevel import Edge, FiniteDifference, Graph, Level, graph, minibatches, train
from diffopt.optimizers import adam
from diffopt.typing import Tree

OPERATIONS = ("convolution", "identity", "mean", "maximum")
CHANNELS, RATE = 6, 0.01

Labeled = tuple[Tensor, Tensor]


def split(seed: int) -> list[Labeled]:
    """Training, validation and test images (n, 1, 8, 8) with labels."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 16 - 0.3
    order = random.permutation(random.key(seed), len(labels))
    return [(images[part], labels[part]) for part in order.split([300, 300, len(labels) - 600])]


def start(key: Tensor) -> Tree:
    """The weights of the network: a stem, a convolution for each place of the cell, and a linear head."""
    stem, cell, head = random.split(key, 3)
    return {
        "stem": random.normal(stem, (CHANNELS, 1, 3, 3)) / 3,
        "cell": random.normal(cell, (2, CHANNELS, CHANNELS, 3, 3)) / (9 * CHANNELS) ** 0.5,
        "head": random.normal(head, (CHANNELS * 16, 10)) / (CHANNELS * 16) ** 0.5,
    }


def network(w: Tree, mixture: Tensor, x: Tensor) -> Tensor:
    """The logits (n, 10) of images, for a mixture (2, 4) of operations."""
    x = conv2d(x, w["stem"], padding=1)
    for weights, kernel in zip(mixture, w["cell"], strict=True):
        found = (conv2d(x.relu(), kernel, padding=1), x, avg_pool2d(x, 3, 1, 1), max_pool2d(x, 3, 1, 1))
        x = sum(weight * value for weight, value in zip(weights, found, strict=True))
    return max_pool2d(x, 2).flatten(1) @ w["head"]


def search() -> Graph:
    """The architecture above, the weights below."""

    def loss(w, a, batch):
        return cross_entropy(network(w, a.softmax(1), batch[0]), batch[1])

    levels = {
        "cell": Level(lambda a, w, batch: loss(w, a, batch), adam(0.03, b1=0.5), reads=("weights",), warmup=20),
        "weights": Level(loss, adam(RATE), reads=("cell",)),
    }
    return graph(levels, [Edge("cell", "weights", FiniteDifference(RATE))])


def fitted_error(mixture: Tensor, data: Labeled, test: Labeled, key: Tensor, updates: int) -> float:
    """The test error of a cell that is trained anew."""
    level = Level(lambda w, batch: cross_entropy(network(w, mixture, batch[0]), batch[1]), adam(RATE))
    alone = graph({"weights": level})
    trained = train(
        alone, alone.init(key, {"weights": start(key)}), {"weights": minibatches(key, data, 64)}, updates=updates,
        average={"weights": 0.9}, quiet=True,
    )  # fmt: skip
    return float((network(trained.average["weights"], mixture, test[0]).argmax(1) != test[1]).float().mean())


def run(seed: int = 0, updates: int = 200, *, rivals: int = 5, quiet: bool = False) -> tuple[str, dict[str, float]]:
    """The cell that was found, and test errors of it and of the others."""
    training, valid, test = split(seed)
    keys = random.split(random.key(seed), 4)
    searching = search()
    begin = {"cell": torch.zeros(2, len(OPERATIONS)), "weights": start(keys[0])}
    batches = {"weights": minibatches(keys[1], training, 64), "cell": minibatches(keys[2], valid, 64)}
    trained = train(searching, searching.init(keys[3], begin), batches, updates=updates, quiet=quiet)
    chosen = tuple(trained.state.params["cell"].argmax(1).tolist())
    both = torch.cat([training[0], valid[0]]), torch.cat([training[1], valid[1]])
    cells = list(itertools.product(range(len(OPERATIONS)), repeat=2))
    cells = [cells[place] for place in random.permutation(random.key(seed), len(cells))[:rivals].tolist()]
    cells = dict.fromkeys([chosen, *cells])
    errors = {
        cell: fitted_error(one_hot(torch.tensor(cell), len(OPERATIONS)).float(), both, test, keys[0], updates)
        for cell in cells
    }
    all_errors = torch.tensor(list(errors.values()))
    found = {"the cell found": errors[chosen], "the median of all tried": float(all_errors.median())}
    found |= {"the best of them": float(all_errors.min()), "the worst of them": float(all_errors.max())}
    return ", ".join(OPERATIONS[place] for place in chosen), found


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, errors = run()
    print("found:", name)
    for kind, share in errors.items():
        print(f"test error, {kind}: {100 * share:.1f}%")
