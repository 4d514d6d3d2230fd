"""Data cleaning as a graph of two levels: find the wrong labels of a training set by its effect on clean data.

The problem and the data are those of `data_cleaning.py`; here both levels are trained side by side by `train`: the
classifier takes a few steps, warm from where it was, then the logits of the examples take one along a hypergradient.

    min_l  L_valid(W(l)),   W(l) = argmin_W  mean_i sigmoid(l_i) CE(W x_i, y_i) + ridge/2 |W|^2

The test of success is how well the weights tell wrong labels from right ones (area under the ROC curve, 0.5 is
chance), not the test error: there, plain training on both sets together is about as good.

Run it: python examples/multilevel/data_cleaning_graph.py
"""

import sys
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).parents[1]))

import data_cleaning

from diffopt import random
from diffopt.linalg import CG
from diffopt.multilevel import Edge, Graph, Implicit, Level, Trained, graph, train
from diffopt.optimizers import adam, sgd


def program(data: data_cleaning.Digits) -> Graph:
    """The logits of the examples above, the classifier below."""

    def valid(logits, W, batch):
        return cross_entropy(data.valid @ W, data.valid_labels)

    def fit(W, logits, batch):
        return data_cleaning.training_loss(W, logits, data.train, data.noisy_labels)

    levels = {
        "logits": Level(valid, adam(0.1), reads=("classifier",), warmup=10),
        "classifier": Level(fit, sgd(0.1, momentum=0.8, nesterov=True), reads=("logits",), steps=10),
    }
    return graph(levels, [Edge("logits", "classifier", Implicit(CG(rtol=1e-2)))])


def run(seed: int = 0, updates: int = 110, *, quiet: bool = False) -> tuple[float, Trained]:
    """The area under the curve, and the state at the end."""
    data = data_cleaning.split(seed)
    cleaning = program(data)
    state = cleaning.init(random.key(seed), {"logits": torch.zeros(1000), "classifier": torch.zeros(65, 10)})
    trained = train(cleaning, state, updates=updates, quiet=quiet)
    return float(roc_auc_score(~data.wrong, trained.state.params["logits"])), trained


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("AUC by seed:", [round(run(seed)[0], 3) for seed in range(3)])
