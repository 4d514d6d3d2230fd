"""diffopt.zero_order.strategies.cem: the fit to the elites, momentum, extra noise, budgets."""

import pytest
import torch

from diffopt import random
from diffopt.zero_order import cem
from zero_order.strategies.cases import search, sphere


@pytest.mark.parametrize(("momentum", "extra"), [(0.0, 0.0), (0.3, 0.01)])
def test_the_fit(momentum, extra):
    x = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
    strategy = cem(0.5, 12, elites=4, momentum=momentum, extra_noise=extra)
    state = strategy.init(x)
    members = strategy.ask(random.key(0), state)
    losses = (members**2).sum(1)
    elite = members[losses.argsort()[:4]]
    after = strategy.tell(members, losses, state)
    torch.testing.assert_close(after.mean, momentum * x + (1 - momentum) * elite.mean(0))
    variance = momentum * 0.25 + (1 - momentum) * elite.var(0, correction=0) + extra
    torch.testing.assert_close(after.sigma, variance.sqrt())


def test_a_quarter_is_elite_by_default():
    x = torch.tensor([0.7, -0.4], dtype=torch.float64)
    one, other = cem(0.5, 12), cem(0.5, 12, elites=3)
    members = one.ask(random.key(0), one.init(x))
    losses = (members**2).sum(1)
    torch.testing.assert_close(one.tell(members, losses, one.init(x)), other.tell(members, losses, other.init(x)))


def test_budget_to_1e8_in_10_unknowns():
    """Momentum keeps it from shrinking before it has arrived."""
    x, strategy = torch.ones(10, dtype=torch.float64), cem(1.0, 100, momentum=0.3)
    assert search(strategy, sphere, x, random.key(0), 100, target=1e-8, evaluations=7000)[0] <= 1e-8


def test_bad_input():
    for elites in (1, 8, 0):
        with pytest.raises(ValueError, match="`elites` must be from 2 to 7"):
            cem(0.5, 8, elites=elites)
    with pytest.raises(TypeError, match="`elites` must be an int"):
        cem(0.5, 8, elites=2.0)
    with pytest.raises(ValueError, match="momentum"):
        cem(0.5, 8, momentum=1.0)
    with pytest.raises(ValueError, match="extra_noise"):
        cem(0.5, 8, extra_noise=-0.1)
