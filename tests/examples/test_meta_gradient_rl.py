"""examples/meta_gradient_rl.py: the known discounts are those of least error, and learning goes to them."""

import meta_gradient_rl as example
import torch


def test_the_known_discount_has_the_least_error():
    known = example.best_discount(float("inf"))
    around = torch.tensor([known - 0.15, known, known + 0.15])
    low, best, high = example.errors(around, updates=40, agents=10_000)
    assert best < low
    assert best < high
    v = example.RATE / (2 - example.RATE)  # of a running average of white noise
    least = (1 - known) ** 2 * example.MEAN**2 + v * (known**2 * example.SPREAD**2 + 0.01)
    torch.testing.assert_close(best, torch.tensor(least), rtol=0.03, atol=0)


def test_learning_comes_to_rest_at_the_known_values():
    found = example.learn("discount", range(24), 120, 8, 0.3, quiet=True)[:, -30:].mean(1)
    assert abs(found.mean() - example.best_discount(8)) < 4 * found.std() / 24**0.5
    assert found.std() < 0.12
    found = example.learn("trace_decay", range(24), 200, 1, 1.0, quiet=True)[:, -50:].mean(1)
    assert abs(found.mean() - example.best_trace_decay()) < 4 * found.std() / 24**0.5
    assert found.std() < 0.2
