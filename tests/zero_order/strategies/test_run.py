"""diffopt.zero_order.strategies.run: batching, history, callbacks, progress, hyperparameters, bad input."""

import numpy as np
import pytest
import torch

from diffopt import random, sgd
from diffopt.zero_order import evaluate_population, make_generation, open_es, run, snes
from zero_order.strategies.cases import sphere, start


def test_all_ways_of_batching_agree():
    def whole(population):
        return (population["w"] ** 2).sum((1, 2)) + population["b"] ** 2

    def with_numpy(x):
        return float(np.sum(x["w"].numpy() ** 2)) + x["b"].item() ** 2

    one = run(snes(0.3, 8), sphere, start(), random.key(0), 5)
    for f, batching in ((whole, "batched"), (sphere, "sequential"), (with_numpy, "sequential")):
        other = run(snes(0.3, 8), f, start(), random.key(0), 5, batching=batching)
        torch.testing.assert_close(other.params, one.params, rtol=1e-10, atol=0)
        torch.testing.assert_close(other.loss, one.loss, rtol=1e-10, atol=0)


def test_history_records_each_generation():
    seen = []
    found = run(
        snes(0.3, 8), sphere, start(), random.key(0), 5, history=True, callback=lambda s, losses: seen.append(losses)
    )  # fmt: skip
    losses = torch.stack(seen)
    torch.testing.assert_close(found.history.lowest, losses.amin(1))
    torch.testing.assert_close(found.history.mean, losses.mean(1))
    torch.testing.assert_close(found.history.best, losses.amin(1).cummin(0).values)
    assert run(snes(0.3, 8), sphere, start(), random.key(0), 5).history.best.shape == (0,)


def test_history_leaves_failures_out_of_the_mean():
    found = run(snes(0.3, 8), lambda x: torch.where(x[0] > 1, torch.nan, 2.0), torch.ones(2), random.key(0), 3,
                history=True)  # fmt: skip
    assert bool((found.history.mean == 2.0).all())


def test_a_callback_ends_the_run():
    found = run(snes(0.3, 8), sphere, start(), random.key(0), 50, callback=lambda state, _: state.generation == 3)
    assert found.state.generation == 3


def test_no_steps_give_the_start():
    found = run(snes(0.3, 8), sphere, start(), random.key(0), 0, history=True)
    torch.testing.assert_close(found.params, start())
    assert found.loss == torch.inf


def test_progress_is_quiet_unless_asked_for(capsys):
    run(snes(0.3, 8), sphere, start(), random.key(0), 2)
    assert capsys.readouterr() == ("", "")
    run(snes(0.3, 8), sphere, start(), random.key(0), 2, progress=True)
    assert "2/2" in capsys.readouterr().err


def test_hyperparameters_carry_gradient_through_a_run():
    def reached(rate):
        strategy = open_es(sgd(rate), 0.1, 8)
        return run(strategy, sphere, torch.tensor([0.7, -0.4], dtype=torch.float64), random.key(0), 3).state.mean

    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reached, (rate,))


def test_a_generation_folds_its_number_into_the_key():
    strategy, key = snes(0.3, 8), random.key(0)
    state = strategy.init(start())._replace(generation=torch.tensor(5))
    after, losses = make_generation(strategy, sphere)(key, state)
    population = strategy.ask(random.fold_in(key, 5), state)
    torch.testing.assert_close(losses, evaluate_population(sphere, population))
    assert after.generation == 6


def test_bad_input():
    def searched(f=sphere, steps=1, **options):
        return run(snes(0.3, 8), f, start(), random.key(0), steps, **options)

    with pytest.raises(TypeError, match="`steps` must be an int"):
        searched(steps=1.0)
    with pytest.raises(ValueError, match="`steps` must be at least 0"):
        searched(steps=-1)
    with pytest.raises(ValueError, match='"vmap", "batched" or "sequential"'):
        searched(batching="loop")
    with pytest.raises(ValueError, match="one number for each of 8 members"):
        searched(lambda x: x["w"])
    with pytest.raises(ValueError, match="one number for a member"):
        searched(lambda x: x["w"], batching="sequential")
    with pytest.raises(ValueError, match='`compile` needs batching "vmap"'):
        searched(compile=True, batching="sequential")
    with pytest.raises(ValueError, match="shape"):
        searched(state=snes(0.3, 8).init({"w": torch.ones(3).double(), "b": torch.ones(()).double()}))
