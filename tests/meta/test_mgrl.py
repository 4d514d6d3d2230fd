"""diffopt.meta.mgrl: meta-gradients against differences, and the best discount of a noisy chain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from diffopt import adam, random, sgd, tree
from diffopt.meta import MGRL, lambda_return, mgrl
from diffopt.testing import check_composition, check_hypergradient
from meta.problems import f64

F64 = torch.float64


REWARDS, VALUES = f64([0.7, -1.1, 0.4, 2.0]), f64([1.3, 0.2, -0.6, 0.9])


def by_definition(rewards, values, discount, decay):
    """The sum of n-step returns that the recursion stands for."""
    horizon = len(rewards)

    def n_step(t, n):
        tail = discount**n * values[t + n - 1]
        return sum(discount**k * rewards[t + k] for k in range(n)) + tail

    def mixture(t):
        left = horizon - t
        shorter = sum(decay ** (n - 1) * n_step(t, n) for n in range(1, left))
        return (1 - decay) * shorter + decay ** (left - 1) * n_step(t, left)

    return torch.stack([mixture(t) for t in range(horizon)])


@given(discount=st.floats(0.1, 1.0), decay=st.floats(0.1, 1.0), horizon=st.integers(1, 4))
@settings(max_examples=20)
def test_lambda_return_is_the_mixture_of_n_step_returns(discount, decay, horizon):
    found = lambda_return(REWARDS[:horizon], VALUES[:horizon], discount, decay)
    torch.testing.assert_close(found, by_definition(REWARDS[:horizon], VALUES[:horizon], discount, decay))


def test_the_ends_of_lambda_return():
    torch.testing.assert_close(lambda_return(REWARDS, VALUES, 0.9, 0.0), REWARDS + 0.9 * VALUES)
    torch.testing.assert_close(lambda_return(REWARDS, VALUES, 0.0), REWARDS)
    total = lambda_return(REWARDS, VALUES, 1)
    torch.testing.assert_close(total, REWARDS.flip(0).cumsum(0).flip(0) + VALUES[-1])


def test_factors_of_each_time_and_batches():
    discounts, decays = f64([0.9, 0.0, 0.5, 0.8]), f64([0.3, 0.6, 0.9, 0.2])
    found = lambda_return(REWARDS, VALUES, discounts, decays)
    torch.testing.assert_close(found[1], REWARDS[1])  # an episode ends there
    torch.testing.assert_close(found[0], REWARDS[0] + 0.9 * (0.7 * VALUES[0] + 0.3 * REWARDS[1]))
    batch = torch.stack([REWARDS, 2 * REWARDS])
    both = lambda_return(batch, torch.stack([VALUES, VALUES]), discounts, decays[None])
    torch.testing.assert_close(both[0], found)
    torch.testing.assert_close(vmap(lambda r: lambda_return(r, VALUES, discounts, decays))(batch)[0], found)


def test_lambda_return_composes():
    check_composition(
        lambda_return,
        (REWARDS, VALUES, f64(0.9), f64(0.4)),
        by_definition,
        cells=["forward", "grad", "vjp", "jvp", "hessian", "vmap(grad)", "dual_level", "grad(vmap(grad))"],
    )


def td_loss(params, frozen, meta, batch):
    """TD(lambda) of three states: the target takes its values from the frozen parameters."""
    gamma, decay = torch.sigmoid(meta["discount"]), torch.sigmoid(meta["trace_decay"])
    followers = torch.tanh(frozen["v"]).roll(-1) + frozen["b"]
    target = lambda_return(batch, followers, gamma, decay)
    return ((target - torch.tanh(params["v"]) - params["b"]) ** 2).sum() / 2


def outer_loss(params, held_out):
    return ((torch.tanh(params["v"]) + params["b"] - held_out) ** 2).sum()


PARAMS = {"v": f64([0.3, -0.4, 0.8]), "b": f64(0.2)}
META = {"discount": f64(1.5), "trace_decay": f64(-0.4)}
BATCHES = f64([[0.5, 1.0, -0.3], [0.9, -0.2, 0.4], [0.1, 0.6, 1.2]])
HELD_OUT = f64([1.0, 0.7, -0.5])


def by_hand(meta, optimizer, batches):
    """Updates by the formula of the semi-gradient, each with a constant target in its own derivative."""
    params, state = PARAMS, optimizer.init(PARAMS)
    for batch in batches:
        frozen = params
        followers = torch.tanh(frozen["v"]).roll(-1) + frozen["b"]
        target = lambda_return(batch, followers, meta["discount"].sigmoid(), meta["trace_decay"].sigmoid())
        error = torch.tanh(params["v"]) + params["b"] - target
        grads = {"v": error * (1 - torch.tanh(params["v"]) ** 2), "b": error.sum()}
        updates, state = optimizer.update(grads, state, params)
        params = tree.add(params, updates)
    return outer_loss(params, HELD_OUT)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("optimizer", [sgd(0.3), sgd(0.1, 0.9), adam(0.1, eps_root=1e-8)], ids=["sgd", "heavy", "adam"])
def test_meta_gradients_against_the_formula_and_differences(window, optimizer):
    learner = mgrl(td_loss, outer_loss, optimizer, sgd(0.5))
    state = learner.init(PARAMS, META)
    batches = BATCHES[:window]
    after, info = learner.step(state, batches, HELD_OUT)
    want = grad(lambda meta: by_hand(meta, optimizer, batches))(META)
    torch.testing.assert_close(info.loss, by_hand(META, optimizer, batches))
    torch.testing.assert_close(info.hypergradient, want)
    torch.testing.assert_close(after.meta, tree.axpy(-0.5, want, META))
    check_hypergradient(lambda meta: learner.step(learner.init(PARAMS, meta), batches, HELD_OUT)[1].loss, (META,))
    assert not any(leaf.requires_grad for leaf in tree.leaves(after))


def test_steps_map_over_seeds_and_carry_higher_derivatives():
    learner = mgrl(td_loss, outer_loss, sgd(0.3), adam(0.1))
    scales = f64([0.5, 1.0, 1.7])

    def run(scale):
        state = learner.init(tree.scale(PARAMS, scale), META)
        for _ in range(2):
            state, info = learner.step(state, scale * BATCHES, HELD_OUT)
        return state.meta["discount"] + info.loss

    torch.testing.assert_close(vmap(run)(scales), torch.stack([run(s) for s in scales]))
    check_hypergradient(run, (scales[1],))
    torch.testing.assert_close(vmap(grad(run))(scales), torch.stack([grad(run)(s) for s in scales]))


def expected_slope(discount, window, rate=0.3, mean=1.0, spread=1.5, lanes=20_000):
    """The mean meta-gradient at a fixed discount, and its standard error, for an agent in its stationary state.

    The chain is A -> B -> end; leaving A pays 1, leaving B pays a noisy reward. What is A worth?
    """

    def inner(value, frozen, discount, rewards):
        return (lambda_return(rewards, torch.zeros_like(rewards), discount)[0] - value) ** 2 / 2

    def draw(key, count):
        return torch.stack([torch.ones(count, dtype=F64), mean + spread * random.normal(key, (count,), dtype=F64)], -1)

    learner = mgrl(inner, lambda value, target: (value - target) ** 2 / 2, sgd(rate), sgd(0.0))

    def of_seed(key):
        keys = random.split(key, 3)
        value = 1 + discount * mean
        value = value + discount * spread * (rate / (2 - rate)) ** 0.5 * random.normal(keys[0], dtype=F64)
        state = learner.init(value, torch.tensor(discount, dtype=F64))
        return learner.step(state, draw(keys[1], window), draw(keys[2], 1)[0].sum())[1].hypergradient

    slopes = vmap(of_seed)(random.split(random.key(1), lanes))
    return slopes.mean(), slopes.std() / lanes**0.5


@pytest.mark.parametrize("window", [1, 4])
def test_the_discount_of_a_noisy_chain_rests_at_its_closed_form(window):
    rate, mean, spread = 0.3, 1.0, 1.5
    noise = rate / (2 - rate) * (1 + (1 - rate) ** window)
    best = mean**2 / (mean**2 + spread**2 * noise)
    slope, error = expected_slope(best, window)
    assert abs(slope) < 4 * error
    assert expected_slope(best - 0.2, window)[0] < -4 * error
    assert expected_slope(best + 0.2, window)[0] > 4 * error


def test_errors_come_early():
    def inner(params, frozen, meta, batch):
        return (params - meta) ** 2

    def outer(params, held_out):
        return params**2

    learner, one = mgrl(inner, outer, sgd(0.1), sgd(0.1)), torch.tensor(1.0)
    assert isinstance(learner, MGRL)
    with pytest.raises(TypeError, match="inner_loss"):
        mgrl(one, outer, sgd(0.1), sgd(0.1))
    with pytest.raises(TypeError, match="meta_optimizer"):
        mgrl(inner, outer, sgd(0.1), 0.1)
    with pytest.raises(TypeError, match="meta"):
        learner.init(one, torch.tensor(1))
    with pytest.raises(ValueError, match="nothing to learn"):
        learner.init(one, {})
    for batches in (one, None, 1.0, (torch.ones(2), torch.ones(3)), (torch.ones(2), one)):
        with pytest.raises(ValueError, match=r"`batches` must be .* share their first dimension"):
            learner.step(learner.init(one, one), batches, one)
    with pytest.raises(TypeError, match="scalar"):
        mgrl(inner, lambda params, held_out: held_out, sgd(0.1), sgd(0.1)).step(
            learner.init(one, one), torch.ones(1), torch.ones(2)
        )
    with pytest.raises(ValueError, match="that follow"):
        lambda_return(torch.ones(3), torch.ones(4), 0.9)
    with pytest.raises(ValueError, match="at most 1"):
        lambda_return(torch.ones(3), torch.ones(3), 1.1)
    with pytest.raises(ValueError, match="broadcast"):
        lambda_return(torch.ones(3), torch.ones(3), torch.ones(2))
    with pytest.raises(TypeError, match="floating"):
        lambda_return(torch.ones(3).long(), torch.ones(3).long(), 0.9)
