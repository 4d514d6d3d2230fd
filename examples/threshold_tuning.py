"""Decision thresholds by zero-order search: tune the F1 score of a classifier, which has no gradient.

Digits 5 to 9 are rare in the training set: nine in ten of their examples are missing. A linear softmax classifier,
trained on what is left, overlooks them. Its logits z stay as they are; what is tuned is how they are read, by a slope
and a threshold for each of the ten classes, so that the macro F1 score on 500 validation digits is as high as can be:

    max_(a, b)  F1(y, argmax_c [exp(0.3 a_c) z_c + b_c])

F1 counts decisions, so it is piecewise constant in these 20 numbers. CMA-ES maximizes it by values alone; random
search gets as many evaluations at each of several widths, and keeps the best of all. `vmap` runs the seeds side by
side.

The test of success is the validation F1 at the same number of evaluations, for that is what is searched. On test
digits much of what either gained is lost again: the best of many tries is partly luck. Two remedies that need no
search are shown with them: dividing by the class frequencies, which needs no validation digits, and fitting the same
20 numbers by gradient descent on the cross-entropy, a smooth stand-in for F1. Where a metric has such a stand-in it
is about as good; the search needs none.

Run it: python examples/threshold_tuning.py
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy, one_hot
from tqdm import tqdm

from diffopt import random, tree
from diffopt.optimizers import adam
from diffopt.transforms import step
from diffopt.typing import Tree
from diffopt.zero_order import cma_es
from diffopt.zero_order import run as search

MEMBERS, GENERATIONS = 64, 40
WIDTHS = (0.5, 1.0, 2.0)
START = {"slope": torch.zeros(10), "threshold": torch.zeros(10)}


class Digits(NamedTuple):
    """One split of the data: images (n, 65) with a constant pixel, labels (n,), and which are trained on."""

    train: Tensor
    labels: Tensor
    kept: Tensor
    valid: Tensor
    valid_labels: Tensor
    test: Tensor
    test_labels: Tensor


class Result(NamedTuple):
    """The best validation F1 so far after each evaluation, (seeds, evaluations), and the final scores by method."""

    curves: dict[str, Tensor]
    valid: dict[str, Tensor]
    test: dict[str, Tensor]


def split(seed: int) -> Digits:
    """Split the digits at random, and keep a tenth of the training digits from 5 to 9."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images = torch.cat([(images.float() - 8) / 4, torch.ones(len(images), 1)], dim=1)
    order, which = random.split(random.key(seed), 2)
    places = random.permutation(order, len(images))
    images, labels = images[places], labels[places]
    kept = (labels[:800] < 5) | (random.uniform(which, (800,)) < 0.1)
    return Digits(images[:800], labels[:800], kept, images[800:1300], labels[800:1300], images[1300:], labels[1300:])


def train(data: Digits, *, steps: int = 100) -> Tensor:
    """The weights (65, 10) of a softmax classifier trained on the digits that are left."""

    def loss(W):
        losses = cross_entropy(data.train @ W, data.labels, reduction="none")
        return (data.kept * losses).sum() / data.kept.sum() + 1e-3 * (W**2).sum()

    return descend(loss, torch.zeros(65, 10), steps)


def descend(loss, values: Tree, steps: int) -> Tree:
    """Minimize a differentiable loss."""
    optimizer = adam(0.05)
    state = optimizer.init(values)
    for _ in range(steps):
        values, state = step(optimizer, grad(loss)(values), state, values)
    return values


def read(reading: Tree, logits: Tensor) -> Tensor:
    """The logits (n, 10) as a reading weighs them."""
    return (0.3 * reading["slope"]).exp() * logits + reading["threshold"]


def f1(reading: Tree, logits: Tensor, labels: Tensor) -> Tensor:
    """The F1 score of the decisions, the mean over classes."""
    classes = torch.arange(10)
    said, true = read(reading, logits).argmax(1)[:, None] == classes, labels[:, None] == classes
    return (2 * (said & true).sum(0) / (said.sum(0) + true.sum(0))).mean()


def evolve(key: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tree, Tensor]:
    """Search by CMA-ES: the centre it ends at, and the best F1 so far after each generation."""
    found = search(cma_es(0.5, MEMBERS), lambda r: -f1(r, logits, labels), START, key, GENERATIONS, history=True)
    return found.state.mean, -found.history.best


def draw(key: Tensor, logits: Tensor, labels: Tensor) -> tuple[Tree, Tensor]:
    """Search at random: the best reading of all widths, and the best F1 so far of its width."""
    tries = MEMBERS * GENERATIONS
    values = torch.tensor(WIDTHS)[:, None, None] * random.normal(key, (2, len(WIDTHS), tries, 10))
    readings = dict(zip(START, values.flatten(1, 2), strict=True))
    scores = vmap(f1, in_dims=(0, None, None), chunk_size=256)(readings, logits, labels)
    best = scores.argmax().reshape(1)
    curves = scores.reshape(len(WIDTHS), tries).cummax(1).values[:, MEMBERS - 1 :: MEMBERS]
    return tree.map(lambda x: x.index_select(0, best)[0], readings), curves.index_select(0, best // tries)[0]


def by_frequency(data: Digits) -> Tree:
    """The reading that takes for granted that all classes are as frequent."""
    counts = (one_hot(data.labels, 10) * data.kept[:, None]).sum(0)
    return {"slope": torch.zeros(10), "threshold": -(counts / counts.sum()).log()}


def by_cross_entropy(logits: Tensor, labels: Tensor) -> Tree:
    """The reading of the least cross-entropy, by its gradient."""
    return descend(lambda reading: cross_entropy(read(reading, logits), labels), START, 200)


def run(seeds: Sequence[int] = (0, 1, 2), *, quiet: bool = False) -> Result:
    """Train the classifiers of several seeds, and read them in each of the ways."""
    data = Digits(*(torch.stack(parts) for parts in zip(*map(split, seeds), strict=True)))
    keys = torch.stack([random.fold_in(random.key(seed), 1) for seed in seeds])
    W = vmap(train)(data)
    valid, test = (data.valid @ W, data.valid_labels), (data.test @ W, data.test_labels)
    searches = {"random search": draw, "CMA-ES": evolve}
    bar = tqdm(searches.items(), desc="threshold tuning", disable=quiet)
    found = {name: vmap(method)(keys, *valid) for name, method in bar}
    readings = {
        "as trained": tree.map(lambda x: x.expand(len(seeds), 10), START),
        **{name: reading for name, (reading, _) in found.items()},
        "class frequencies": vmap(by_frequency)(data),
        "cross-entropy": vmap(by_cross_entropy)(*valid),
    }
    scores = [{name: vmap(f1)(reading, *part) for name, reading in readings.items()} for part in (valid, test)]
    return Result({name: curve for name, (_, curve) in found.items()}, *scores)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = run()
    print(f"macro F1 (%), mean over seeds, after {MEMBERS * GENERATIONS} evaluations a search")
    for name in result.valid:
        valid, test = (100 * scores[name].mean() for scores in (result.valid, result.test))
        print(f"  {name:18s} validation {valid:.1f}, test {test:.1f}")
