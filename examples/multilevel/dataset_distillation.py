"""Ten synthetic images, one for each digit, that a classifier learns from in ten steps.

    min_{X, r}  CE_train(w_10),   w_{t+1} = w_t - e^r grad CE(w_t; X, 0..9)

The lower level starts anew each time, `start="reset"`, and its ten steps are differentiated as they are,
`Unrolled()`. The plain rivals train on as many real images, on the mean image of each digit, and on the whole
training set, which is what a distilled set is measured against; each with the rate that does best on the test set, in
their favour.

Run it: python examples/multilevel/dataset_distillation.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad
from torch.nn.functional import cross_entropy

from diffopt import random
from diffopt.multilevel import Edge, Graph, Level, Unrolled, graph, minibatches, train
from diffopt.optimizers import adam, sgd

STEPS = 10
LABELS = torch.arange(10)


def split(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 65) with a constant pixel, and labels, of a training and a test set."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images = torch.cat([(images.float() - 8) / 8, torch.ones(len(images), 1)], 1)
    order = random.permutation(random.key(seed), len(labels))
    train, test = order[:1200], order[1200:]
    return images[train], labels[train], images[test], labels[test]


def learn(w: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of the classifier."""
    return cross_entropy(images @ w, labels)


def program() -> Graph:
    """The images and the rate above, the classifier below; the rate scales the lower loss."""
    levels = {
        "set": Level(lambda made, w, batch: learn(w, *batch), adam(0.02), reads=("classifier",)),
        "classifier": Level(
            lambda w, made, batch: made["rate"].exp() * learn(w, made["images"], LABELS),
            sgd(1.0), reads=("set",), steps=STEPS, start="reset",
        ),
    }  # fmt: skip
    return graph(levels, [Edge("set", "classifier", Unrolled())])


def trained_on(images: Tensor, labels: Tensor, rate: float, steps: int = STEPS) -> Tensor:
    """The classifier after a few steps on some images."""
    w = torch.zeros(65, 10)
    for _ in range(steps):
        w = w - rate * grad(learn)(w, images, labels)
    return w


def run(seed: int = 0, updates: int = 400, *, quiet: bool = False) -> dict[str, float]:
    """Test errors by training set."""
    images, labels, test, test_labels = split(seed)
    firsts = torch.stack([images[labels == digit][0] for digit in range(10)])
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    distilling = program()
    start = {"set": {"images": firsts, "rate": torch.tensor(-2.0)}, "classifier": torch.zeros(65, 10)}
    batches = minibatches(random.key(seed), (images, labels), 200)
    trained = train(
        distilling, distilling.init(random.key(seed), start), {"set": batches, "classifier": lambda step: 0 * LABELS},
        updates=updates, quiet=quiet,
    )  # fmt: skip
    made = trained.state.params["set"]
    error = lambda w: float(((test @ w).argmax(1) != test_labels).float().mean())  # noqa: E731
    best = lambda x, y, steps=STEPS: min(error(trained_on(x, y, r, steps)) for r in (0.01, 0.03, 0.1, 0.3))  # noqa: E731
    return {
        "ten distilled images": error(trained_on(made["images"], LABELS, float(made["rate"].exp()))),
        "ten real images": best(firsts, LABELS),
        "ten mean images": best(means, LABELS),
        "all images, as many steps": best(images, labels),
        "all images, 300 steps": best(images, labels, 300),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, share in run().items():
        print(f"test error, {name}: {100 * share:.1f}%")
