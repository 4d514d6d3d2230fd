"""diffopt.zero_order.strategies.open_es: the estimator, optimizers on trees, schedules of sigma, budgets."""

import pytest
import torch

from diffopt import adam, random, sgd, tree
from diffopt.optimizers import lamb
from diffopt.zero_order import centered_rank, open_es, raw_losses, standardize
from zero_order.strategies.cases import search, sphere, start


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("fitness", [centered_rank, standardize, raw_losses])
def test_the_gradient_is_the_weighted_sum_of_noises(antithetic, fitness):
    x = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
    strategy = open_es(sgd(0.1), 0.2, 6, antithetic=antithetic, fitness=fitness)
    state = strategy.init(x)
    members = strategy.ask(random.key(0), state)
    losses = (members**2).sum(1)
    noises, weights = (members - x) / 0.2, fitness(losses)
    g = sum((w - weights.mean()) * z for w, z in zip(weights, noises, strict=True)) / (6 * 0.2)
    torch.testing.assert_close(strategy.tell(members, losses, state).mean, x - 0.1 * g, rtol=1e-10, atol=1e-12)
    if antithetic:
        torch.testing.assert_close(noises[:3], -noises[3:])


def test_raw_losses_give_the_gradient_of_the_smoothed_function():
    x = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
    strategy = open_es(sgd(1.0), 0.5, 40000, fitness=raw_losses)
    state = strategy.init(x)
    members = strategy.ask(random.key(0), state)
    g = x - strategy.tell(members, (members**2).sum(1), state).mean
    # On a quadratic a pair has variance (n + 1) |g|^2 in all, and there are 20000.
    assert (g - 2 * x).norm() < 4 * (2 * x).norm() * (4 / 20000) ** 0.5


def test_an_optimizer_sees_the_tree():
    """LAMB scales each leaf by its own norm, which a flat vector would not show."""
    strategy = open_es(lamb(0.1), 0.2, 8)
    state = strategy.init(start())
    population = strategy.ask(random.key(0), state)
    after = strategy.tell(population, torch.arange(8.0, dtype=torch.float64), state)
    moved = tree.map(lambda a, b: ((a - b).norm() / b.norm()).item(), after.mean, start())
    assert moved == pytest.approx({"w": 0.1, "b": 0.1})


def test_sigma_may_follow_a_schedule():
    x = torch.ones(1000, dtype=torch.float64)
    strategy = open_es(sgd(0.1), lambda count: 0.5 * 0.1**count, 4)
    state = strategy.init(x)
    for sigma in (0.5, 0.05):
        members = strategy.ask(random.key(0), state)
        assert (members - state.mean).std().item() == pytest.approx(sigma, rel=0.1)
        state = strategy.tell(members, (members**2).sum(1), state)


@pytest.mark.parametrize(
    ("strategy", "target", "evaluations"),
    [(open_es(adam(0.05), 0.05, 20), 1e-2, 2000), (open_es(sgd(0.1), 0.01, 20, fitness=raw_losses), 1e-3, 2000)],
)
def test_budgets_on_the_sphere_of_10(strategy, target, evaluations):
    x = torch.ones(10, dtype=torch.float64)
    assert search(strategy, sphere, x, random.key(0), 20, target=target, evaluations=evaluations)[0] <= target


def test_bad_input():
    with pytest.raises(TypeError, match="must be a GradientTransformation"):
        open_es(0.1, 0.2, 8)
