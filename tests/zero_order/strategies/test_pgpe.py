"""diffopt.zero_order.strategies.pgpe: both gradients, the default optimizer, budgets."""

import pytest
import torch

from diffopt import adam, random, sgd
from diffopt.zero_order import centered_rank, clipup, pgpe
from zero_order.strategies.cases import search, sphere

X = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)


@pytest.mark.parametrize("most", [0.2, 0.001])
def test_mean_and_width_follow_the_published_gradients(most):
    strategy = pgpe(0.3, 8, optimizer=sgd(0.5), sigma_learning_rate=0.4, sigma_max_change=most)
    state = strategy.init(X)
    members = strategy.ask(random.key(0), state)
    losses = (members**4).sum(1)
    w, deltas = centered_rank(losses), members[:4] - X
    torch.testing.assert_close(members[4:], X - deltas)
    g_mean = sum((w[i] - w[i + 4]) / 2 * deltas[i] for i in range(4)) / 4
    g_width = sum(((w[i] + w[i + 4]) / 2 - w.mean()) * (deltas[i] ** 2 - 0.09) / 0.3 for i in range(4)) / 4
    after = strategy.tell(members, losses, state)
    torch.testing.assert_close(after.mean, X - 0.5 * g_mean, rtol=1e-9, atol=1e-12)
    change = (-0.4 * g_width).clamp(-most * 0.3, most * 0.3)
    torch.testing.assert_close(after.sigma, 0.3 + change, rtol=1e-9, atol=1e-12)


def test_clipup_is_the_default_at_the_published_speed():
    speed = 0.3 * 3**0.5 / 15
    one, other = pgpe(0.3, 8), pgpe(0.3, 8, optimizer=clipup(speed / 2, speed))
    states = one.init(X), other.init(X)
    for t in range(4):
        members = one.ask(random.fold_in(random.key(0), t), states[0])
        losses = (members**2).sum(1)
        states = one.tell(members, losses, states[0]), other.tell(members, losses, states[1])
    torch.testing.assert_close(states[0].mean, states[1].mean)
    assert (states[0].mean - X).norm() <= 4 * speed


@pytest.mark.parametrize(("optimizer", "evaluations"), [(None, 8000), (adam(0.05), 8000)])
def test_budgets_on_the_sphere_of_10(optimizer, evaluations):
    x, strategy = torch.ones(10, dtype=torch.float64), pgpe(0.3, 40, optimizer=optimizer)
    assert search(strategy, sphere, x, random.key(0), 40, target=1e-2, evaluations=evaluations)[0] <= 1e-2


def test_bad_input():
    with pytest.raises(ValueError, match="at least 4"):
        pgpe(0.3, 2)
    with pytest.raises(ValueError, match="sigma_max_change"):
        pgpe(0.3, 8, sigma_max_change=1.0)
    with pytest.raises(ValueError, match="sigma_learning_rate"):
        pgpe(0.3, 8, sigma_learning_rate=-0.1)
    with pytest.raises(TypeError, match="GradientTransformation"):
        pgpe(0.3, 8, optimizer=0.1)
