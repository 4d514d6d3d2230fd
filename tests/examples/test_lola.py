"""examples/lola.py: the values of known policies, sampled games, and what both kinds of learners come to."""

import lola as example
import pytest
import torch
from torch.func import vmap

from diffopt import random

ALWAYS, NEVER = torch.full((5,), 40.0), torch.full((5,), -40.0)
TIT_FOR_TAT = torch.tensor([40.0, 40.0, -40.0, 40.0, -40.0])


@pytest.mark.parametrize(
    ("first", "second", "returns"),
    [
        (ALWAYS, ALWAYS, (-1.0, -1.0)),
        (NEVER, NEVER, (-2.0, -2.0)),
        (ALWAYS, NEVER, (-3.0, 0.0)),
        (TIT_FOR_TAT, TIT_FOR_TAT, (-1.0, -1.0)),
        (TIT_FOR_TAT, NEVER, (0.04 * -3 + 0.96 * -2, 0.96 * -2)),
    ],
)
def test_returns_of_known_policies(first, second, returns):
    found = -(1 - example.DISCOUNT) * example.losses((first, second))
    torch.testing.assert_close(found, torch.tensor(returns), rtol=1e-4, atol=1e-4)
    swapped = -(1 - example.DISCOUNT) * example.losses((second, first))
    torch.testing.assert_close(swapped, found.flip(0), rtol=1e-4, atol=1e-4)


def test_sampled_games_have_the_expected_losses():
    players = torch.tensor([0.3, 1.0, -0.5, 0.4, -1.0]), torch.tensor([-0.2, 0.8, 0.6, -0.7, 0.1])
    losses = torch.stack(example.sampled_losses(players, key=random.key(0), games=2000, rounds=200))
    torch.testing.assert_close(losses, example.losses(players), rtol=0.02, atol=0)


def test_naive_learners_defect_and_lola_learns_tit_for_tat():
    results = example.run(seeds=range(20), steps=200, quiet=True)
    naive, shaped = (results[name].returns[:, -1].mean(1) for name in ("naive", "LOLA"))
    assert naive.mean() < -1.9
    assert shaped.mean() > -1.2
    assert (shaped > -1.2).sum() >= 15
    policy = results["LOLA"].cooperation.flatten(0, 1).median(0).values
    torch.testing.assert_close(policy, torch.sigmoid(TIT_FOR_TAT), rtol=0, atol=0.1)
    torch.testing.assert_close(results["naive"].returns[:, 0], results["LOLA"].returns[:, 0])
    assert "20" in example.table(results)


def test_learning_from_sampled_games_runs():
    result = example.run_sampled(seeds=range(2), steps=2, quiet=True)
    assert result.returns.shape == (2, 3, 2)
    assert result.returns.isfinite().all()
    again = vmap(lambda p: -(1 - example.DISCOUNT) * example.losses(tuple(torch.logit(p))))(result.cooperation)
    torch.testing.assert_close(again, result.returns[:, -1], rtol=1e-3, atol=1e-3)
