"""diffopt.zero_order.strategies.restarts: Rastrigin, each rule, the budget, bad input."""

import pytest
import torch

from diffopt import random
from diffopt.zero_order import StopRules, cma_es, run_with_restarts, sep_cma_es
from zero_order.strategies.cases import ellipsoid, sphere


def attempts(make, f, x, key=None, size=8, **options):
    key = random.key(0) if key is None else key
    return run_with_restarts(make, f, x, key, size, **({"max_evaluations": 20000, "restarts": 0} | options))


def rastrigins(population):
    return (population**2 - 10 * torch.cos(2 * torch.pi * population) + 10).sum(-1)


@pytest.mark.parametrize("n", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_the_global_basin_of_rastrigin(n):
    x = torch.full((n,), 3.0, dtype=torch.float64)
    found = run_with_restarts(
        lambda size: cma_es(2.0, size), rastrigins, x, random.key(0), 10,
        max_evaluations=300_000, target=1e-8, batching="batched",
    )  # fmt: skip
    assert found.loss <= 1e-8
    assert bool((found.params.abs() < 1e-3).all())
    sizes = [attempt.population_size for attempt in found.attempts]
    assert sizes == [10 * 2**i for i in range(len(sizes))]
    assert found.evaluations == sum(a.population_size * a.generations for a in found.attempts) <= 300_000
    assert found.attempts[-1].reason == "target"


def test_small_changes_end_an_attempt():
    found = attempts(lambda size: cma_es(0.5, size), sphere, torch.ones(3, dtype=torch.float64))
    assert [a.reason for a in found.attempts] == ["tolfun"]
    assert found.loss < 1e-10


def test_a_flat_function_ends_an_attempt():
    found = attempts(lambda size: cma_es(0.5, size), lambda x: 0 * x.sum() + 1, torch.ones(3, dtype=torch.float64))
    assert found.attempts[0].reason == "tolfun"
    assert found.attempts[0].generations == 10 + 12  # 30 * 3 / 8, rounded up


def test_noise_ends_an_attempt_by_stagnation():
    def noisy(population):
        return torch.sin(1e6 * population.sum(-1)) + 2

    found = attempts(lambda size: sep_cma_es(0.5, size), noisy, torch.ones(3, dtype=torch.float64), batching="batched")
    assert found.attempts[0].reason == "stagnation"


def test_a_covariance_of_bad_condition_ends_an_attempt():
    rules = StopRules(max_condition=100.0)
    found = attempts(lambda size: cma_es(0.5, size), ellipsoid, torch.ones(3, dtype=torch.float64), rules=rules)
    assert found.attempts[0].reason == "condition"


def test_failures_end_attempts():
    found = attempts(lambda size: cma_es(0.5, size), lambda x: x.sum() * torch.nan, torch.ones(3), restarts=2)
    assert [a.reason for a in found.attempts] == ["failed"] * 3
    assert found.loss == torch.inf
    assert torch.equal(found.params, torch.ones(3))


def test_the_budget_is_kept():
    found = attempts(lambda size: cma_es(0.5, size), ellipsoid, torch.ones(5).double(), restarts=9, max_evaluations=400)
    assert found.attempts[-1].reason == "budget"
    assert 392 <= found.evaluations <= 400


def test_further_attempts_may_start_elsewhere_within_bounds():
    starts = []

    def start(key):
        starts.append(4 * random.uniform(key, (3,), dtype=torch.float64) - 2)
        return starts[-1]

    found = attempts(
        lambda size: cma_es(0.5, size), lambda x: sphere(x - 3), torch.ones(3, dtype=torch.float64),
        restarts=2, start=start, bounds=(-1.0, 2.0), rules=StopRules(tolfun=1e-6),
    )  # fmt: skip
    assert len(starts) == 2
    assert not torch.equal(*starts)
    torch.testing.assert_close(found.params, torch.full((3,), 2.0, dtype=torch.float64), rtol=1e-4, atol=0)


def test_bad_input():
    def make(size):
        return cma_es(0.5, size)

    with pytest.raises(ValueError, match="growth"):
        attempts(make, sphere, torch.ones(2), growth=0.5)
    with pytest.raises(ValueError, match="`restarts` must be at least 0"):
        attempts(make, sphere, torch.ones(2), restarts=-1)
    with pytest.raises(TypeError, match="`max_evaluations` must be an int"):
        attempts(make, sphere, torch.ones(2), max_evaluations=1e4)
    with pytest.raises(ValueError, match="population_size"):
        attempts(make, sphere, torch.ones(2), size=1)
