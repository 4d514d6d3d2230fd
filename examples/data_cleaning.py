"""Data cleaning by implicit differentiation: find the wrong labels of a training set by its effect on clean data.

Half of 1000 training digits have a wrong label, drawn from the nine others. Each training example i gets a weight
sigmoid(l_i); a ridge softmax classifier is trained on the weighted examples, and the logits l are moved so that
this classifier does well on 250 clean validation digits (bilevel optimization):

    min_l  L_valid(W(l)),   W(l) = argmin_W  mean_i sigmoid(l_i) CE(W x_i, y_i) + ridge/2 |W|^2

`custom_root` differentiates W(l) through its optimality condition, with one conjugate-gradient solve a step; how
the classifier was trained does not matter. `vmap` runs the seeds side by side.

The test of success is how well the weights tell wrong labels from right ones (area under the ROC curve, 0.5 is
chance). It is not the test error: there, plain training on both sets together is about as good.

Run it: python examples/data_cleaning.py
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from label_noise import flip_labels
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from diffopt import random
from diffopt.implicit import custom_root
from diffopt.linalg import CG
from diffopt.optimizers import adam, sgd
from diffopt.transforms import step

RIDGE = 0.2
CORRUPTION = 0.5


class Digits(NamedTuple):
    """One split of the data: images (n, 65) with a constant pixel, labels (n,), and which labels are wrong."""

    train: Tensor
    noisy_labels: Tensor
    valid: Tensor
    valid_labels: Tensor
    test: Tensor
    test_labels: Tensor
    wrong: Tensor


class Result(NamedTuple):
    """What a run found, for each seed."""

    losses: Tensor
    auc: list[float]
    weights: Tensor
    wrong: Tensor
    errors: dict[str, Tensor]


def split(seed: int) -> Digits:
    """Split the digits at random and corrupt the training labels."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images = torch.cat([(images.float() - 8) / 4, torch.ones(len(images), 1)], dim=1)
    order, which, shift = random.split(random.key(seed), 3)
    places = random.permutation(order, len(images))
    images, labels = images[places], labels[places]
    noisy, wrong = flip_labels(labels[:1000], CORRUPTION, which, shift)
    return Digits(images[:1000], noisy, images[1000:1250], labels[1000:1250], images[1250:], labels[1250:], wrong)


def training_loss(W: Tensor, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The weighted ridge loss of the classifier W."""
    losses = cross_entropy(images @ W, labels, reduction="none")
    return (torch.sigmoid(logits) * losses).mean() + RIDGE / 2 * (W**2).sum()


def fit(init: Tensor, logits: Tensor, images: Tensor, labels: Tensor, *, steps: int = 10) -> Tensor:
    """Train the classifier by Nesterov's method. Any method would do: the derivative does not pass through it."""
    optimizer, W = sgd(0.1, momentum=0.8, nesterov=True), init
    state = optimizer.init(W)
    for _ in range(steps):
        W, state = step(optimizer, grad(training_loss)(W, logits, images, labels), state, W)
    return W


train = custom_root(grad(training_loss), solve=CG(rtol=1e-2), symmetric=True)(fit)


def validation_loss(logits: Tensor, W: Tensor, data: Digits) -> tuple[Tensor, Tensor]:
    """The loss on clean data of the classifier trained with these weights, and that classifier."""
    W = train(W, logits, data.train, data.noisy_labels)
    return cross_entropy(data.valid @ W, data.valid_labels), W


def run(seeds: Sequence[int] = (0, 1, 2), outer_steps: int = 100, *, quiet: bool = False) -> Result:
    """Clean the data of several seeds at once."""
    data = Digits(*(torch.stack(parts) for parts in zip(*map(split, seeds), strict=True)))
    logits = torch.zeros(len(seeds), 1000)
    W = vmap(functools.partial(fit, steps=100))(torch.zeros(len(seeds), 65, 10), logits, data.train, data.noisy_labels)
    optimizer = adam(0.1)
    state = optimizer.init(logits)
    losses = []
    for _ in tqdm(range(outer_steps), desc="data cleaning", disable=quiet):
        hypergrads, (loss, W) = vmap(grad_and_value(validation_loss, has_aux=True))(logits, W, data)
        logits, state = step(optimizer, hypergrads, state, logits)
        losses.append(loss)
    auc = [roc_auc_score(~wrong, row) for wrong, row in zip(data.wrong, logits, strict=True)]
    errors = {"learned weights": test_error(W, data)} | baselines(data)
    return Result(torch.stack(losses, 1), auc, torch.sigmoid(logits), data.wrong, errors)


def baselines(data: Digits) -> dict[str, Tensor]:
    """Test errors of plain training on each choice of data."""
    both = torch.cat([data.train, data.valid], 1), torch.cat([data.noisy_labels, data.valid_labels], 1)
    choices = {
        "noisy training set": (data.train, data.noisy_labels),
        "clean validation set": (data.valid, data.valid_labels),
        "both together": both,
    }

    def unweighted(images, labels):
        return fit(torch.zeros(65, 10), torch.full((len(labels),), 100.0), images, labels, steps=200)

    return {name: test_error(vmap(unweighted)(*chosen), data) for name, chosen in choices.items()}


def test_error(W: Tensor, data: Digits) -> Tensor:
    """The share of test digits that the classifiers get wrong, for each seed."""
    return ((data.test @ W).argmax(-1) != data.test_labels).float().mean(-1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = run()
    print("validation loss every 20 steps:", result.losses.mean(0)[::20].numpy().round(3))
    print("AUC by seed:", np.round(result.auc, 3))
    for name, error in result.errors.items():
        print(f"test error, {name}: {100 * error.mean():.1f}%")
