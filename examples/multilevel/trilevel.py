"""Three levels: how much to trust weights that were learned on few clean data.

    top      min_s  CE(W*; clean set B),
    middle   l*(s) = argmin_l  CE(W*(l); clean set A) + exp(s) mean(l^2),
    lowest   W*(l) = argmin_W  mean_i sigmoid(l_i) CE(W x_i, y_i) + ridge/2 |W|^2

The lowest level trains on digits of which half have a wrong label, the middle one weighs these digits by what A says
of the classifier, and since A has but 40 images, the weights may overfit it. The top level sets the strength of their
prior by other data. It reads the classifier alone, and acts on it through the middle level's response, whose own
condition counts that the classifier moves with the weights; `response="partial"` leaves that out, and gives the top
level another gradient.

The plain rival trains on all three sets together, and wins by far on test error. What three levels give beyond it is
the weights, which tell wrong labels from right ones. The script prints the figures.

Run it: python examples/multilevel/trilevel.py
"""

import sys
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1]))

import data_cleaning

from diffopt import random
from diffopt.linalg import CG
from diffopt.multilevel import Edge, Graph, Implicit, Level, graph
from diffopt.optimizers import adam, sgd

NOISY, FEW = 200, 40


class Result(NamedTuple):
    """What a run found."""

    strengths: list[float]
    auc: float
    errors: dict[str, float]


def program(data: data_cleaning.Digits, response: Literal["total", "partial"] = "total") -> Graph:
    """The strength over the weights over the classifier."""
    A, B = slice(0, FEW), slice(FEW, 250)
    noisy = data.train[:NOISY], data.noisy_labels[:NOISY]

    def clean(s, W, batch):
        return cross_entropy(data.valid[B] @ W, data.valid_labels[B])

    def weigh(logits, W, s, batch):
        return cross_entropy(data.valid[A] @ W, data.valid_labels[A]) + s.exp() * (logits**2).mean()

    def fit(W, logits, batch):
        return data_cleaning.training_loss(W, logits, *noisy)

    levels = {
        "strength": Level(clean, adam(0.1), reads=("classifier",), warmup=5, project=lambda s: s.clamp(-3.0, 3.0)),
        "weights": Level(weigh, adam(0.1), reads=("classifier", "strength"), steps=2),
        "classifier": Level(fit, sgd(0.1, momentum=0.8, nesterov=True), reads=("weights",), steps=10),
    }
    method = Implicit(CG(rtol=1e-2))
    return graph(levels, [
        Edge("strength", "weights", method, response=response),
        Edge("weights", "classifier", method, response=response),
    ])  # fmt: skip


def run(seed: int = 0, updates: int = 30, *, quiet: bool = False) -> Result:
    """The strength on its way, how well the weights tell wrong labels, and test errors."""
    data = data_cleaning.split(seed)
    three, strengths = program(data), []
    start = {"strength": torch.tensor(-2.0), "weights": torch.zeros(NOISY), "classifier": torch.zeros(65, 10)}
    state = three.init(random.key(seed), start)
    for _ in tqdm(range(updates), desc="three levels", disable=quiet):
        state, _ = three.update(state)
        strengths.append(float(state.params["strength"]))
    found = state.params
    sets = (data.train[:NOISY], data.valid), (data.noisy_labels[:NOISY], data.valid_labels)
    everything = [torch.cat(part) for part in sets]
    W = data_cleaning.fit(torch.zeros(65, 10), torch.full((NOISY + 250,), 100.0), *everything, steps=200)
    errors = {"three levels": found["classifier"], "all sets together": W}
    return Result(
        strengths,
        float(roc_auc_score(~data.wrong[:NOISY], found["weights"])),
        {name: error(W, data) for name, W in errors.items()},
    )


def error(W: Tensor, data: data_cleaning.Digits) -> float:
    """The share of test digits that are taken for others."""
    return float(((data.test @ W).argmax(1) != data.test_labels).float().mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = run()
    print("strength every 5 updates:", [round(s, 2) for s in result.strengths[::5]])
    print(f"AUC of the weights: {result.auc:.3f}")
    for name, share in result.errors.items():
        print(f"test error, {name}: {100 * share:.1f}%")
