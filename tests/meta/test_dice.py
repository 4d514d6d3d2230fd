"""diffopt.meta.dice: derivatives of every order against enumeration of all trajectories."""

import itertools

import pytest
import torch
from torch.func import grad, hessian, jacfwd, vmap

from diffopt import random
from diffopt.meta import dice

F64 = torch.float64
THETA = torch.tensor([0.4, -0.7, 0.2], dtype=F64)
DISCOUNT = 0.8
PATHS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=F64)


def log_probs(theta, actions):
    """Of three tosses, each with a logit of its own and the toss before: a chain, not independent."""
    before = torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], 1)
    logits = theta + 0.9 * before - 0.3
    return actions * torch.nn.functional.logsigmoid(logits) + (1 - actions) * torch.nn.functional.logsigmoid(-logits)


def costs(actions):
    return actions * torch.tensor([1.0, -2.0, 3.0], dtype=F64) + actions[:, :1] * actions + 0.5


def expected_cost(theta):
    weights = DISCOUNT ** torch.arange(3, dtype=F64)
    return (log_probs(theta, PATHS).sum(1).exp() * (costs(PATHS) * weights).sum(1)).sum()


def weighted(fn):
    """The expectation over all trajectories of what a function of one, as a batch of one, gives."""
    probs = log_probs(THETA, PATHS).sum(1).exp()
    return sum(p * fn(path[None]) for p, path in zip(probs, PATHS, strict=True))


def surrogate(theta, actions, baseline=None):
    return dice(log_probs(theta, actions), costs(actions), DISCOUNT, baseline=baseline)


DERIVATIVES = [lambda f: f, grad, hessian, lambda f: jacfwd(hessian(f))]


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("with_baseline", [False, True])
def test_derivatives_of_every_order_are_unbiased(derivative, with_baseline):
    def baseline(actions):
        """Some function of the tosses before."""
        before = torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], 1)
        return 1.3 + 0.7 * before if with_baseline else None

    found = weighted(lambda path: derivative(lambda theta: surrogate(theta, path, baseline(path)))(THETA))
    torch.testing.assert_close(found, derivative(expected_cost)(THETA))


@pytest.mark.parametrize("derivative", DERIVATIVES[:3])
def test_leaving_one_out_is_unbiased_over_all_pairs_of_trajectories(derivative):
    probs = log_probs(THETA, PATHS).sum(1).exp()
    found = sum(
        probs[i] * probs[j] * derivative(lambda t, i=i, j=j: surrogate(t, PATHS[[i, j]], "leave_one_out"))(THETA)
        for i in range(8)
        for j in range(8)
    )
    torch.testing.assert_close(found, derivative(expected_cost)(THETA))


def test_leaving_one_out_lowers_the_variance():
    def draw(key):
        actions, draws = [], random.uniform(key, (3, 50), dtype=F64)
        for t in range(3):
            before = actions[-1] if actions else torch.zeros(50, dtype=F64)
            actions.append((draws[t] < torch.sigmoid(THETA[t] + 0.9 * before - 0.3)).to(F64))
        return torch.stack(actions, 1)

    batches = vmap(draw)(random.split(random.key(0), 400))
    spread = {}
    for baseline in (None, "leave_one_out"):
        slopes = vmap(grad(lambda t, a, b=baseline: surrogate(t, a, b)), in_dims=(None, 0))(THETA, batches)
        error = slopes.std(0) / 400**0.5
        assert ((slopes.mean(0) - grad(expected_cost)(THETA)).abs() < 4 * error).all()
        spread[baseline] = slopes.var(0).sum()
    assert spread["leave_one_out"] < 0.7 * spread[None]


def test_the_discount_and_costs_may_carry_gradient():
    actions, discount = PATHS[2:5], torch.tensor(0.8, dtype=F64)
    slope = grad(lambda d: dice(log_probs(THETA, actions), costs(actions), d, baseline="leave_one_out"))(discount)
    c = costs(actions).mean(0)
    torch.testing.assert_close(slope, c[1] + 2 * discount * c[2])
    scale = grad(lambda s: dice(log_probs(THETA, actions), s * costs(actions), 0.8))(discount)
    torch.testing.assert_close(scale, surrogate(THETA, actions))


@pytest.mark.parametrize("discount", [0.0, 1.0, 1])
def test_the_ends_of_the_discount(discount):
    for baseline in (None, "leave_one_out"):
        value = dice(log_probs(THETA, PATHS), costs(PATHS), discount, baseline=baseline)
        want = costs(PATHS)[:, 0] if discount == 0 else costs(PATHS).sum(1)
        torch.testing.assert_close(value, want.mean())


@pytest.mark.parametrize("at", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("baseline", [None, "leave_one_out"])
def test_a_discount_carries_derivatives_of_every_order_also_at_its_ends(at, baseline):
    def by_horizon(discount):
        """A polynomial in the discount, without powers."""
        weights = torch.stack([torch.ones_like(discount), discount, discount * discount])
        return (costs(PATHS) * weights).sum(1).mean()

    at = torch.tensor(at, dtype=F64)
    for derivative in (grad, lambda f: grad(grad(f)), lambda f: grad(grad(grad(f)))):
        found = derivative(lambda g: dice(log_probs(THETA, PATHS), costs(PATHS), g, baseline=baseline))(at)
        torch.testing.assert_close(found, derivative(by_horizon)(at))


def test_dtypes_may_differ_and_low_precision_counts_every_time():
    mixed = dice(log_probs(THETA, PATHS).float(), costs(PATHS), DISCOUNT, baseline="leave_one_out")
    torch.testing.assert_close(mixed, dice(log_probs(THETA, PATHS), costs(PATHS), DISCOUNT))
    late = torch.zeros(1, 300, dtype=torch.bfloat16)  # bfloat16 has no 299
    late[0, -1] = 1.0
    torch.testing.assert_close(dice(torch.ones_like(late), late, 0.99).item(), 0.99**299, rtol=0.01, atol=0)


def test_errors_come_early():
    ones = torch.ones(4, 3)
    with pytest.raises(ValueError, match="trajectories, times"):
        dice(ones[0], ones[0])
    with pytest.raises(ValueError, match="trajectories, times"):
        dice(ones, ones[:, :2])
    with pytest.raises(TypeError, match="floating"):
        dice(ones, ones.long())
    with pytest.raises(ValueError, match="discount"):
        dice(ones, ones, 1.5)
    with pytest.raises(ValueError, match="leave_one_out"):
        dice(ones, ones, baseline="mean")
    for baseline in (None, "leave_one_out"):
        with pytest.raises(ValueError, match="one trajectory or more"):
            dice(ones[:0], ones[:0], baseline=baseline)
    with pytest.raises(ValueError, match="two trajectories"):
        dice(ones[:1], ones[:1], baseline="leave_one_out")
    with pytest.raises(ValueError, match="baseline"):
        dice(ones, ones, baseline=ones[:, :1])
