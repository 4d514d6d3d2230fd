"""A network that weighs examples by their losses, on digits with rare classes and wrong labels (meta-weight net).

    min_v  CE_meta(w*(v)),   w*(v) = argmin_w  mean_i V(l_i; v) l_i + ridge/2 |w|^2,   l_i = CE(w; x_i, y_i)

V maps a loss to a weight in (0, 1). Of five digits there are 100 training images each, of the other five 20 each, and
40% of the labels are wrong; the meta set has 5 clean images a digit. One step of the classifier for one of V, whose
response is that step, differentiated as it is, `Unrolled()`.

The meta set are 50 labeled images, and it is only fair to ask what they are worth without any weights: the plain
rivals train on the training set, and on both together. On average over seeds the weights do better than the training
set alone, as they tell wrong labels from right ones; but both sets together do better still: 50 images are worth more
as training data.

Run it: python examples/multilevel/reweighting.py
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).parents[1]))

from label_noise import flip_labels

from diffopt import random
from diffopt.multilevel import Edge, Graph, Level, Trained, Unrolled, graph, minibatches, train
from diffopt.optimizers import adam, sgd
from diffopt.typing import Tree

COUNTS = torch.tensor([100] * 5 + [20] * 5)
META, TEST, HIDDEN, NOISE = 5, 60, 32, 0.4
RATE, RIDGE = 0.1, 0.005

Labeled = tuple[Tensor, Tensor]


def split(seed: int) -> tuple[Labeled, Labeled, Labeled, Tensor]:
    """Training, meta and test images with labels, and which training labels are wrong."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order, which, shift = random.split(random.key(seed), 3)
    places = random.permutation(order, len(labels))
    images, labels = images[places].float() / 16 - 0.3, labels[places]
    test, meta, noisy = (torch.zeros(len(labels), dtype=torch.bool) for _ in range(3))
    for digit, count in enumerate(COUNTS.tolist()):
        found = torch.where(labels == digit)[0]
        test[found[:TEST]] = meta[found[TEST : TEST + META]] = noisy[found[TEST + META :][:count]] = True
    given, wrong = flip_labels(labels[noisy], NOISE, which, shift)
    return (images[noisy], given), (images[meta], labels[meta]), (images[test], labels[test]), wrong


def start(key: Tensor) -> dict[str, Tree]:
    """The parameters of both networks."""
    keys = random.split(key, 3)
    classifier = {
        "W": random.normal(keys[0], (64, HIDDEN)) / 8, "b": torch.zeros(HIDDEN),
        "V": random.normal(keys[1], (HIDDEN, 10)) / HIDDEN**0.5, "c": torch.zeros(10),
    }  # fmt: skip
    weigher = {"W": random.normal(keys[2], (1, 16)), "b": torch.zeros(16), "V": torch.zeros(16), "c": torch.zeros(1)}
    return {"classifier": classifier, "weigher": weigher}


def losses(w: Tree, x: Tensor, y: Tensor) -> Tensor:
    """The loss of each example."""
    return cross_entropy(torch.tanh(x @ w["W"] + w["b"]) @ w["V"] + w["c"], y, reduction="none")


def ridge(w: Tree) -> Tensor:
    """The penalty of the classifier, without which it learns the wrong labels too."""
    return RIDGE / 2 * sum((w[name] ** 2).sum() for name in ("W", "V"))


def weigh(v: Tree, loss: Tensor) -> Tensor:
    """The weight of each example, by its loss."""
    return torch.sigmoid(torch.tanh(loss[:, None] @ v["W"] + v["b"]) @ v["V"] + v["c"])


def program() -> Graph:
    """The weigher above, the classifier below."""

    def fit(w, v, batch):
        each = losses(w, *batch)
        return (weigh(v, each.detach()) * each).mean() + ridge(w)

    levels = {
        "weigher": Level(lambda v, w, batch: losses(w, *batch).mean(), adam(0.03), reads=("classifier",)),
        "classifier": Level(fit, sgd(10 * RATE), reads=("weigher",)),
    }
    return graph(levels, [Edge("weigher", "classifier", Unrolled())])


def run(seed: int = 0, updates: int = 400, *, quiet: bool = False) -> tuple[dict[str, float], dict[str, float]]:
    """Test errors by method, and the mean weights of right and of wrong labels."""
    training, meta, test, wrong = split(seed)
    keys = random.split(random.key(seed), 3)
    networks, weighing = start(keys[0]), program()
    batches = {"classifier": minibatches(keys[1], training, 100), "weigher": lambda step: meta}
    trained = train(weighing, weighing.init(keys[2], networks), batches, updates=updates, quiet=quiet)
    both = torch.cat([training[0], meta[0]]), torch.cat([training[1], meta[1]])
    errors = {"learned weights": error(trained.state.params["classifier"], test)}
    for name, data in {"training set": training, "training and meta set": both}.items():
        errors[name] = error(plainly(networks["classifier"], data, keys[1], updates).state.params["classifier"], test)
    weights = weigh(trained.state.params["weigher"], losses(trained.state.params["classifier"], *training))
    return errors, {"right": float(weights[~wrong].mean()), "wrong": float(weights[wrong].mean())}


def plainly(w: Tree, data: Labeled, key: Tensor, updates: int) -> Trained:
    """The classifier without weights; steps half as long, as the weights begin at one half."""
    level = Level(lambda w, batch: losses(w, *batch).mean() + 2 * ridge(w), sgd(5 * RATE))
    alone = graph({"classifier": level})
    batches = {"classifier": minibatches(key, data, 100)}
    return train(alone, alone.init(key, {"classifier": w}), batches, updates=updates, quiet=True)


def error(w: Tree, data: Labeled) -> float:
    """The share of images that are taken for other digits."""
    x, y = data
    found = torch.tanh(x @ w["W"] + w["b"]) @ w["V"] + w["c"]
    return float((found.argmax(1) != y).float().mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    errors, weights = zip(*(run(seed) for seed in range(4)), strict=True)
    for name in errors[0]:
        print(f"test error, {name}, by seed:", " ".join(f"{100 * share[name]:.1f}%" for share in errors))
    for name in weights[0]:
        print(f"mean weight of a label that is {name}, by seed:", " ".join(f"{mean[name]:.2f}" for mean in weights))
