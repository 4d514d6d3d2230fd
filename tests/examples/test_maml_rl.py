"""examples/maml_rl.py: sampled losses estimate exact returns, and MAML's start adapts best in one step."""

import maml_rl as example
import torch
from torch.func import grad, vmap

from diffopt import random

WORLD, GOAL = example.draw_world(random.key(0)), torch.tensor(2)
LOGITS = 0.5 * random.normal(random.key(1), (example.STATES, example.ACTIONS))


def test_worlds_are_probabilities():
    torch.testing.assert_close(WORLD.sum(2), torch.ones(example.STATES, example.ACTIONS))
    assert (WORLD > 0).all()


def test_sampled_losses_and_their_gradients_are_unbiased():
    keys = random.split(random.key(2), 300)
    losses = vmap(example.sampled_loss, in_dims=(None, None, None, 0))(LOGITS, WORLD, GOAL, keys)
    exact = example.expected_return(LOGITS, WORLD, GOAL)
    assert abs(losses.mean() + exact) < 4 * losses.std() / 300**0.5
    slopes = vmap(grad(example.sampled_loss), in_dims=(None, None, None, 0))(LOGITS, WORLD, GOAL, keys)
    error = slopes.std(0) / 300**0.5
    apart = (slopes.mean(0) + grad(example.expected_return)(LOGITS, WORLD, GOAL)).abs()
    assert (apart <= 5 * error + 1e-6).all()
    assert example.best_return(WORLD, GOAL) > exact


def test_maml_adapts_best_in_one_step():
    result = example.run(seeds=(0,), steps=40, shown_steps=1, quiet=True)
    maml, average, uniform = (result.returns[name][0] for name in ("MAML", "best on average", "uniform"))
    assert maml[1] > maml[0] + 1
    assert maml[1] > average[1] + 0.3
    assert maml[1] > uniform[1] + 0.3
    assert maml[1] < result.best[0]
    assert average[0] > maml[0]
