"""diffopt.zero_order.strategies.ars: the published step, V1 and V1-t, scale, budgets."""

import pytest
import torch

from diffopt import random, sgd
from diffopt.zero_order import ars
from zero_order.strategies.cases import search, sphere

X = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)


@pytest.mark.parametrize("top", [None, 1, 2, 4])
def test_the_step_is_the_published_one(top):
    strategy, b = ars(sgd(0.3), 0.05, 8, top=top), top or 4
    state = strategy.init(X)
    members = strategy.ask(random.key(0), state)
    losses = (members**2).sum(1)
    noises = (members[:4] - X) / 0.05
    chosen = torch.minimum(losses[:4], losses[4:]).argsort()[:b]
    used = torch.cat([losses[:4][chosen], losses[4:][chosen]])
    g = sum((losses[i] - losses[i + 4]) * noises[i] for i in chosen) / (b * used.std(correction=0))
    torch.testing.assert_close(strategy.tell(members, losses, state).mean, X - 0.3 * g, rtol=1e-8, atol=1e-10)


def test_the_scale_and_the_level_of_losses_do_not_matter():
    strategy = ars(sgd(0.3), 0.05, 8, top=3)
    state = strategy.init(X)
    members = strategy.ask(random.key(0), state)
    losses = (members**2).sum(1)
    one, other = strategy.tell(members, losses, state), strategy.tell(members, 1000 * losses - 7, state)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-8, atol=0)


@pytest.mark.parametrize("top", [None, 5])
def test_budgets_on_the_sphere_of_10(top):
    x, strategy = torch.ones(10, dtype=torch.float64), ars(sgd(0.03), 0.01, 20, top=top)
    assert search(strategy, sphere, x, random.key(0), 20, target=1e-2, evaluations=2500)[0] <= 1e-2


def test_bad_input():
    with pytest.raises(ValueError, match="at least 4"):
        ars(sgd(0.1), 0.1, 2)
    for top in (0, 5):
        with pytest.raises(ValueError, match="`top` must be from 1 to 4"):
            ars(sgd(0.1), 0.1, 8, top=top)
    with pytest.raises(TypeError, match="`top` must be an int"):
        ars(sgd(0.1), 0.1, 8, top=2.0)
