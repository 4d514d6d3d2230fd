"""diffopt.zero_order.strategies.clipup: its algorithm, trees, derivatives, bad input."""

import pytest
import torch

from diffopt import step, tree
from diffopt.zero_order import clipup


def by_hand(gradients, rate, fastest, momentum):
    v = torch.zeros_like(gradients[0])
    for g in gradients:
        v = momentum * v - rate * g / g.norm()
        if v.norm() > fastest:
            v = v * fastest / v.norm()
        yield v


def test_steps_are_the_published_ones():
    gradients = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    optimizer = clipup(0.1, 0.17, 0.8)
    state = optimizer.init(gradients[0])
    for g, expected in zip(gradients, by_hand(gradients, 0.1, 0.17, 0.8), strict=True):
        update, state = optimizer.update(g, state)
        torch.testing.assert_close(update, expected, rtol=1e-12, atol=1e-12)
        assert update.norm() <= 0.17 + 1e-12


def test_the_default_speed_is_twice_the_rate():
    g = torch.tensor([3.0, 4.0])
    optimizer = clipup(0.5, momentum=0.9)
    state = optimizer.init(g)
    for length in (0.5, 0.95, 1.0, 1.0):
        update, state = optimizer.update(g, state)
        torch.testing.assert_close(update.norm(), torch.tensor(length))


def test_norms_are_over_all_leaves():
    params = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor(4.0)}
    vector, unravel = tree.ravel(params)
    optimizer = clipup(0.1)
    moved, _ = step(optimizer, params, optimizer.init(params), params)
    flat, _ = step(optimizer, vector, optimizer.init(vector), vector)
    torch.testing.assert_close(moved, unravel(flat))


def test_a_gradient_of_0_adds_nothing():
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    optimizer = clipup(0.1)
    update, state = optimizer.update(0 * x, optimizer.init(x))
    assert torch.equal(update, 0 * x)
    _, state = optimizer.update(x, state)
    torch.testing.assert_close(optimizer.update(0 * x, state)[0], 0.9 * state.velocity)


def test_hyperparameters_carry_gradient():
    g = torch.tensor([[3.0, 4.0], [1.0, -2.0], [0.3, 0.4]], dtype=torch.float64)

    def moved(rate, fastest, momentum):
        optimizer = clipup(rate, fastest, momentum)
        state, total = optimizer.init(g[0]), 0.0
        for row in g:
            update, state = optimizer.update(row, state)
            total = total + update
        return total

    values = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.1, 0.12, 0.7)]
    assert torch.autograd.gradcheck(moved, values)


def test_bad_input():
    with pytest.raises(ValueError, match="learning_rate"):
        clipup(0.0)
    with pytest.raises(ValueError, match="max_speed"):
        clipup(0.1, -1.0)
    with pytest.raises(ValueError, match="momentum"):
        clipup(0.1, momentum=1.0)
