"""examples/reweight_digits.py: the sets are apart and imbalanced, and weights find rare digits and right labels."""

import reweight_digits as example
import torch


def test_sets_are_apart_and_imbalanced():
    data = example.split(0, 0.4)
    clean = example.split(0, 0.0).labels
    assert torch.equal(clean.bincount(), example.COUNTS)
    assert torch.equal(data.labels != clean, data.wrong)
    assert 0.3 < data.wrong.float().mean() < 0.5
    assert torch.equal(data.meta_labels.bincount(), torch.full((10,), example.META))
    assert torch.equal(data.test_labels.bincount(), torch.full((10,), example.TEST))
    assert torch.cdist(data.test, torch.cat([data.train, data.meta])).min() > 0
    assert torch.cdist(data.meta, data.train).min() > 0


def test_learned_weights_against_the_rivals(monkeypatch):
    monkeypatch.setattr(example, "STEPS", 100)
    result = example.run(seeds=(0, 1), corruption=0.4, quiet=True)
    error = {name: value.mean() for name, value in result.errors.items()}
    assert error["learned weights"] < error["training set"] - 0.1
    assert error["learned weights, both"] < error["both"] - 0.1
    assert error["learned weights, both"] < error["meta set"]
    assert (result.shares["wrong labels"] < 0.38).all()
    assert (result.shares["rare digits"] > 0.15).all()  # they are 20 of 520
