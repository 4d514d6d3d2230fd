"""examples/threshold_tuning.py: the metric is the known one, and the search beats random search."""

import threshold_tuning as example
import torch
from sklearn.metrics import f1_score

from diffopt import random


def test_rare_digits_are_rare():
    data = example.split(0)
    assert data.kept[data.labels < 5].all()
    assert 0.02 < data.kept[data.labels >= 5].float().mean() < 0.2
    assert (len(data.train), len(data.valid), len(data.test)) == (800, 500, 497)


def test_f1_is_that_of_scikit_learn():
    logits, labels = random.normal(random.key(1), (60, 10)), torch.arange(60) % 10
    values = random.normal(random.key(2), (2, 10))
    reading = {"slope": values[0], "threshold": values[1]}
    said = ((0.3 * values[0]).exp() * logits + values[1]).argmax(1)
    want = f1_score(labels, said, average="macro")
    torch.testing.assert_close(example.f1(reading, logits, labels).item(), want, rtol=1e-6, atol=0)


def test_class_frequencies_are_taken_out():
    data = example.split(0)
    shares = (-example.by_frequency(data)["threshold"]).exp()
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
    assert shares[:5].amin() > 3 * shares[5:].amax()


def test_search_beats_random_search(monkeypatch):
    monkeypatch.setattr(example, "GENERATIONS", 15)
    result = example.run(seeds=(0,), quiet=True)
    evolved, drawn = result.curves["CMA-ES"], result.curves["random search"]
    assert evolved.shape == drawn.shape == (1, 15)
    assert (evolved.diff(dim=1) >= 0).all()
    assert (evolved[:, -1] > drawn[:, -1] + 0.01).all()
    torch.testing.assert_close(result.valid["random search"], drawn[:, -1])
    assert result.test["CMA-ES"].mean() > result.test["as trained"].mean() + 0.02
