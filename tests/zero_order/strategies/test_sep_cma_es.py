"""diffopt.zero_order.strategies.sep_cma_es: the diagonal of the full method, many unknowns, budgets."""

import importlib

import pytest
import torch

from diffopt import random
from diffopt.zero_order import cma_es, run, sep_cma_es
from diffopt.zero_order.strategies.cma_rates import rates
from zero_order.strategies.cases import ellipsoid, search, sphere


@pytest.mark.parametrize("active", [False, True])
def test_a_generation_is_the_diagonal_of_the_full_one(monkeypatch, active):
    """The first one, for which the full covariance is diagonal still, with the same rates."""
    module = importlib.import_module("diffopt.zero_order.strategies.cma_es")
    monkeypatch.setattr(module, "rates", lambda n, m, active: rates(n, m, active=active, separable=True))
    x = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
    one, other = sep_cma_es(0.5, 8, active=active), cma_es(0.5, 8, active=active)
    state, theirs = one.init(x), other.init(x)
    members = one.ask(random.key(0), state)
    losses = torch.stack([ellipsoid(member) for member in members])
    state, theirs = one.tell(members, losses, state), other.tell(members, losses, theirs)
    torch.testing.assert_close(state.mean, theirs.mean)
    torch.testing.assert_close(state.sigma, theirs.sigma)
    torch.testing.assert_close(state.scales**2, theirs.covariance.diagonal(), rtol=1e-10, atol=0)


def test_rates_are_larger_by_a_third_of_n_plus_2():
    one, other = rates(12, 10, active=False), rates(12, 10, active=False, separable=True)
    assert other.c_1 == pytest.approx(one.c_1 * 14 / 3)
    assert other.c_mu == pytest.approx(one.c_mu * 14 / 3)
    assert other.c_sigma == one.c_sigma


@pytest.mark.parametrize(("f", "evaluations"), [(sphere, 2000), (ellipsoid, 4000)])
def test_budgets_to_1e8_in_10_unknowns(f, evaluations):
    x = torch.ones(10, dtype=torch.float64)
    assert search(sep_cma_es(0.5), f, x, random.key(0), 10, target=1e-8, evaluations=evaluations)[0] <= 1e-8


def test_a_thousand_unknowns():
    x = torch.ones(1000, dtype=torch.float64)
    found = run(sep_cma_es(0.3, 32), lambda x: (x**2).sum(-1), x, random.key(0), 150, batching="batched")
    assert found.loss < 0.8 * 1000
    assert found.state.scales.shape == (1000,)
