"""diffopt.zero_order.strategies.snes: the published step, learning rates, budgets."""

import math

import numpy as np
import pytest
import torch

from diffopt import random
from diffopt.zero_order import snes
from zero_order.strategies.cases import ellipsoid, search, sphere


def test_generations_are_the_published_ones():
    strategy, m = snes(0.5, 7), 7
    state = strategy.init(torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64))
    mu, sigma = state.mean.numpy(), np.full(3, 0.5)
    u = np.maximum(0, math.log(m / 2 + 1) - np.log(np.arange(1, m + 1)))
    u = u / u.sum() - 1 / m
    for t in range(10):
        members = strategy.ask(random.fold_in(random.key(0), t), state)
        losses = (members**4).sum(1)
        z = ((members.numpy() - mu) / sigma)[np.argsort(losses.numpy())]
        mu = mu + sigma * (u @ z)
        sigma = sigma * np.exp((3 + math.log(3)) / (5 * math.sqrt(3)) / 2 * (u @ (z**2 - 1)))
        state = strategy.tell(members, losses, state)
        np.testing.assert_allclose(state.mean.numpy(), mu, rtol=1e-10)
        np.testing.assert_allclose(state.sigma.numpy(), sigma, rtol=1e-10)


def test_learning_rates_carry_gradient():
    losses = torch.tensor([3.0, 1.0, 2.5, 2.0, 5.0, 1.5, 7.0, 4.0], dtype=torch.float64)

    def moved(rate, sigma_rate):
        strategy = snes(0.5, 8, learning_rate=rate, sigma_learning_rate=sigma_rate)
        state = strategy.init(torch.tensor([0.7, -0.4], dtype=torch.float64))
        state = strategy.tell(strategy.ask(random.key(0), state), losses, state)
        return state.mean, state.sigma

    rates = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.9, 0.3)]
    assert torch.autograd.gradcheck(moved, rates)


@pytest.mark.parametrize(("f", "evaluations"), [(sphere, 2500), (ellipsoid, 3500)])
def test_budgets_to_1e8_in_10_unknowns(f, evaluations):
    x = torch.ones(10, dtype=torch.float64)
    assert search(snes(0.5), f, x, random.key(0), 10, target=1e-8, evaluations=evaluations)[0] <= 1e-8


def test_bad_input():
    with pytest.raises(ValueError, match="learning_rate"):
        snes(0.5, learning_rate=0.0)
    with pytest.raises(ValueError, match="sigma_learning_rate"):
        snes(0.5, sigma_learning_rate=-1.0)
