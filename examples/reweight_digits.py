"""Learning to reweight imbalanced digits, and the plain rivals that have the same data.

Of five digits there are 100 training images each, of the other five 4 each; some labels may be wrong as well. A meta
set of 5 clean images a digit is balanced, as the test set is. In each step `reweight` weighs the training images by
how much a step on each would lower the loss on the meta set (Ren et al. 2018), and the network takes a step on them.

The meta set are 50 labeled images, and it is only fair to ask what they are worth without any weights: the rivals
train on the training set alone, on the meta set alone, on both together, and on both with each class weighted by
one over its size. `vmap` runs the seeds side by side.

The weights are worth it where labels are wrong, and then on both sets together: far fewer test errors than by plain
training on both, and somewhat fewer than on the meta set alone. Where labels are right, weights by class do as well.
The script prints the figures.

Run it: python examples/reweight_digits.py
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from label_noise import flip_labels
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from diffopt import random, tree
from diffopt.meta import reweight
from diffopt.optimizers import sgd
from diffopt.transforms import step
from diffopt.typing import Tree

COUNTS = torch.tensor([100] * 5 + [4] * 5)
META, TEST, STEPS = 5, 60, 200


class Digits(NamedTuple):
    """One split: images (n, 64) and labels (n,) of three sets, and which training labels are wrong (n,)."""

    train: Tensor
    labels: Tensor
    meta: Tensor
    meta_labels: Tensor
    test: Tensor
    test_labels: Tensor
    wrong: Tensor


class Result(NamedTuple):
    """Test errors by method (seeds,), and for the learned weights what share of them is on each kind of image."""

    errors: dict[str, Tensor]
    shares: dict[str, Tensor]


def split(seed: int, corruption: float) -> Digits:
    """Draw the sets, and give some training images the label of another digit."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order, which, shift = random.split(random.key(seed), 3)
    places = random.permutation(order, len(images))
    images, labels = images[places].float() / 16 - 0.3, labels[places]
    places = [torch.where(labels == digit)[0] for digit in range(10)]
    sizes = [(TEST, META, int(count)) for count in COUNTS]
    parts = [p[: sum(s)].split(s) for p, s in zip(places, sizes, strict=True)]
    test, meta, train = (torch.cat(part) for part in zip(*parts, strict=True))
    noisy, wrong = flip_labels(labels[train], corruption, which, shift)
    return Digits(images[train], noisy, images[meta], labels[meta], images[test], labels[test], wrong)


def init_params(key: Tensor, width: int = 32) -> list[dict[str, Tensor]]:
    """A network 64 - width - 10."""
    sizes = [(64, width), (width, 10)]
    weights = [random.normal(k, s) / s[0] ** 0.5 for k, s in zip(random.split(key, 2), sizes, strict=True)]
    return [{"weight": weight, "bias": torch.zeros(weight.shape[1])} for weight in weights]


def network(params: Tree, x: Tensor) -> Tensor:
    """Logits (n, 10) of images (n, 64)."""
    hidden = torch.tanh(x @ params[0]["weight"] + params[0]["bias"])
    return hidden @ params[1]["weight"] + params[1]["bias"]


def losses(params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The cross-entropy of each image."""
    return cross_entropy(network(params, batch[0]), batch[1], reduction="none")


def mean_loss(params: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy."""
    return losses(params, batch).mean()


learned_weights = reweight(losses, mean_loss)


def equal(params: Tree, batch: tuple[Tensor, Tensor], meta: tuple[Tensor, Tensor]) -> Tensor:
    """The same weight for every image."""
    return torch.full((len(batch[1]),), 1 / len(batch[1]))


def by_class(params: Tree, batch: tuple[Tensor, Tensor], meta: tuple[Tensor, Tensor]) -> Tensor:
    """One over the number of images of the same label."""
    sizes = torch.nn.functional.one_hot(batch[1], 10).sum(0)
    return (1 / sizes)[batch[1]] / 10


def train(weigh: Callable, key: Tensor, data: tuple[Tensor, Tensor], meta: tuple[Tensor, Tensor], bar: Callable):
    """Train for all seeds at once by weighted steps; also returns the mean of the weights, (seeds, n)."""
    optimizer, params = sgd(0.1, momentum=0.9), vmap(init_params)(key)
    state, total = optimizer.init(params), torch.zeros(data[1].shape)

    def advance(params, data, meta):
        weights = weigh(params, data, meta)
        return grad(lambda p: weights @ losses(p, data))(params), weights

    for _ in bar(range(STEPS)):
        grads, weights = vmap(advance)(params, data, meta)
        params, state = step(optimizer, grads, state, params)
        total = total + weights
    return params, total / STEPS


def run(seeds: Sequence[int] = range(5), corruption: float = 0.0, *, quiet: bool = False) -> Result:
    """Train by learned weights and by the rivals."""
    data = Digits(*(torch.stack(parts) for parts in zip(*(split(s, corruption) for s in seeds), strict=True)))
    keys = torch.stack([random.fold_in(random.key(s), 1) for s in seeds])
    noisy, meta = (data.train, data.labels), (data.meta, data.meta_labels)
    both = tree.map(lambda a, b: torch.cat([a, b], 1), noisy, meta)
    methods = {
        "training set": (equal, noisy),
        "meta set": (equal, meta),
        "both": (equal, both),
        "both, classes weighted": (by_class, both),
        "learned weights": (learned_weights, noisy),
        "learned weights, both": (learned_weights, both),
    }
    errors, weights = {}, {}
    for name, (weigh, chosen) in methods.items():
        bar = lambda steps, name=name: tqdm(steps, desc=name, disable=quiet)  # noqa: E731
        params, weights[name] = train(weigh, keys, chosen, meta, bar)
        errors[name] = (vmap(network)(params, data.test).argmax(-1) != data.test_labels).float().mean(1)
    found, rare = weights["learned weights"], data.labels >= 5
    shares = {"rare digits": (found * rare).sum(1), "wrong labels": (found * data.wrong).sum(1)}
    return Result(errors, shares)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for corruption in (0.0, 0.4):
        result = run(corruption=corruption)
        print(f"{100 * corruption:.0f}% wrong labels")
        for name, error in result.errors.items():
            print(f"  test error, {name}: {100 * error.mean():.1f}% +- {100 * error.std() / len(error) ** 0.5:.1f}")
        for name, share in result.shares.items():
            print(f"  share of the learned weights on {name}: {100 * share.mean():.1f}%")
