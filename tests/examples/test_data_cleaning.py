"""examples/data_cleaning.py: the hypergradient is right, and the weights find the wrong labels."""

import data_cleaning
import torch
from torch.func import grad


def test_half_of_the_labels_are_wrong(monkeypatch):
    data = data_cleaning.split(0)
    monkeypatch.setattr(data_cleaning, "CORRUPTION", 0.0)
    truth = data_cleaning.split(0).noisy_labels
    assert torch.equal(data.noisy_labels != truth, data.wrong)
    assert 0.45 < data.wrong.float().mean() < 0.55
    assert (len(data.train), len(data.valid), len(data.test)) == (1000, 250, 547)


def test_hypergradient_against_finite_differences():
    data = data_cleaning.split(0)
    data = data._replace(train=data.train[:40].double(), noisy_labels=data.noisy_labels[:40], valid=data.valid.double())
    direction = torch.linspace(-1, 1, 40, dtype=torch.float64)
    W = data_cleaning.fit(
        torch.zeros(65, 10, dtype=torch.float64), 0 * direction, data.train, data.noisy_labels, steps=300
    )

    def loss(logits):
        # The solver is only as good as its steps: many, so that finite differences see the same solution.
        for _ in range(20):
            value, start = data_cleaning.validation_loss(logits, solution[0], data)
            solution[0] = start
        return value

    solution = [W]
    slope = grad(lambda t: data_cleaning.validation_loss(t * direction, W, data)[0])(torch.zeros(()).double())
    h = 1e-3
    want = (loss(h * direction) - loss(-h * direction)) / (2 * h)
    torch.testing.assert_close(slope, want, rtol=2e-2, atol=0)  # the adjoint stops at a residual of 1e-2


def test_weights_find_the_wrong_labels():
    result = data_cleaning.run(seeds=(0,), outer_steps=30, quiet=True)
    assert result.losses[0, -1] < 0.7 * result.losses[0, 0]
    assert result.auc[0] > 0.88
    assert result.weights[result.wrong].mean() < 0.4 < 0.6 < result.weights[~result.wrong].mean()
    assert set(result.errors) >= {"learned weights", "clean validation set", "noisy training set"}
