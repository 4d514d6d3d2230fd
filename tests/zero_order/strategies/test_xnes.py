"""diffopt.zero_order.strategies.xnes: the published step, invariance, budgets."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from diffopt import random
from diffopt.zero_order import xnes
from zero_order.strategies.cases import ellipsoid, rosenbrock, search, sphere


def test_generations_are_the_published_ones():
    strategy, m, n = xnes(0.5, 9), 9, 3
    state = strategy.init(torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64))
    mu, sigma, B = state.mean.numpy(), 0.5, np.eye(n)
    u = np.maximum(0, math.log(m / 2 + 1) - np.log(np.arange(1, m + 1)))
    u, rate = u / u.sum() - 1 / m, (9 + 3 * math.log(n)) / (5 * n * math.sqrt(n))
    for t in range(10):
        members = strategy.ask(random.fold_in(random.key(0), t), state)
        losses = torch.stack([ellipsoid(member) for member in members])
        z = np.linalg.solve(sigma * B, (members.numpy() - mu).T).T[np.argsort(losses.numpy())]
        G = sum(u_i * (np.outer(z_i, z_i) - np.eye(n)) for u_i, z_i in zip(u, z, strict=True))
        along = np.trace(G) / n
        mu, sigma = mu + sigma * B @ (u @ z), sigma * math.exp(rate / 2 * along)
        B = B @ scipy.linalg.expm(rate / 2 * (G - along * np.eye(n)))
        state = strategy.tell(members, losses, state)
        for a, b in zip((state.mean, state.sigma, state.shape), (mu, sigma, B), strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-8, atol=1e-10)
    assert np.linalg.det(B) == pytest.approx(1.0)


def test_the_search_turns_with_the_space():
    n, strategy = 5, xnes(0.5, 10)
    R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    state = strategy.init(torch.linspace(0.5, 2.0, n, dtype=torch.float64))
    turned = strategy.init(R @ state.mean)._replace(shape=R @ state.shape)
    for t in range(20):
        members = strategy.ask(random.fold_in(random.key(0), t), state)
        losses = torch.stack([ellipsoid(member) for member in members])
        state, turned = strategy.tell(members, losses, state), strategy.tell(members @ R.mT, losses, turned)
        torch.testing.assert_close(turned.mean, R @ state.mean, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(turned.shape, R @ state.shape, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("f", "size", "evaluations"),
    [
        pytest.param(sphere, 10, 7000, marks=pytest.mark.slow),
        pytest.param(ellipsoid, 10, 11000, marks=pytest.mark.slow),
        pytest.param(rosenbrock, 10, 14000, marks=pytest.mark.slow),
    ],
)
def test_budgets_to_1e8_in_10_unknowns(f, size, evaluations):
    x = torch.full((10,), 0.1 if f is rosenbrock else 1.0, dtype=torch.float64)
    assert search(xnes(0.5, size), f, x, random.key(0), size, target=1e-8, evaluations=evaluations)[0] <= 1e-8


def test_bad_input():
    for name in ("sigma_learning_rate", "shape_learning_rate"):
        with pytest.raises(ValueError, match=name):
            xnes(0.5, **{name: -1.0})
