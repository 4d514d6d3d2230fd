"""diffopt.zero_order.strategies.fitness: ranks, ties, failures, against SciPy."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
import torch
from torch.func import vmap

from diffopt.zero_order import centered_rank, nes_utilities, rank_weights, raw_losses, standardize

SHAPINGS = [centered_rank, standardize, nes_utilities, raw_losses]
FEW = st.lists(st.sampled_from([-2.0, -1.0, 0.5, 1.0, 3.0, float("nan"), float("inf"), -float("inf")]), min_size=2)
MANY = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def finite(losses):
    """What a loss counts as in a ranking."""
    return torch.where(losses.isfinite(), losses, torch.inf)


@hypothesis.given(st.one_of(FEW, MANY))
def test_centered_ranks_are_those_of_scipy(values):
    losses = tensor(values)
    expected = (scipy.stats.rankdata(finite(losses).numpy(), method="average") - 1) / (len(values) - 1) - 0.5
    np.testing.assert_allclose(centered_rank(losses).numpy(), expected, atol=1e-12)


@hypothesis.given(st.one_of(FEW, MANY), st.randoms(use_true_random=False))
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_members_may_be_permuted(shaping, values, random):
    order = list(range(len(values)))
    random.shuffle(order)
    torch.testing.assert_close(shaping(tensor(values)[order]), shaping(tensor(values))[order], rtol=1e-9, atol=1e-9)


@hypothesis.given(FEW)
@pytest.mark.parametrize("shaping", SHAPINGS)
def test_shaped_losses_are_finite_and_keep_the_order(shaping, values):
    losses = tensor(values)
    shaped = shaping(losses)
    assert shaped.isfinite().all()
    lower = finite(losses)[:, None] < finite(losses)
    assert bool((shaped[:, None] <= shaped + 1e-12)[lower].all())
    if shaping is not raw_losses:
        assert abs(float(shaped.sum())) < 1e-9


@hypothesis.given(MANY)
def test_weights_of_ranks_keep_their_sum(values):
    weights = torch.linspace(3.0, -1.0, len(values), dtype=torch.float64) ** 3
    shared = rank_weights(tensor(values), torch.stack([weights, -2 * weights]))
    torch.testing.assert_close(shared.sum(1), torch.stack([weights, -2 * weights]).sum(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(shared[0], rank_weights(tensor(values), weights))


def test_distinct_losses_get_the_weights_of_their_ranks():
    weights = tensor([0.6, 0.3, 0.1, -0.2])
    assert torch.equal(rank_weights(tensor([3.0, -1.0, 7.0, 2.0]), weights), weights[[2, 0, 3, 1]])


def test_utilities_are_the_published_ones():
    m = 10
    u = [max(0.0, np.log(m / 2 + 1) - np.log(k)) for k in range(1, m + 1)]
    expected = -(np.array(u) / sum(u) - 1 / m)
    np.testing.assert_allclose(nes_utilities(torch.arange(m, dtype=torch.float64)).numpy(), expected, atol=1e-15)


def test_standardized_losses_have_mean_0_and_deviation_1():
    shaped = standardize(tensor([1.0, 2.0, 4.0, 9.0]))
    torch.testing.assert_close(shaped.mean(), tensor(0.0))
    torch.testing.assert_close(shaped.std(correction=0), tensor(1.0))
    assert torch.equal(standardize(tensor([3.0, 3.0])), tensor([0.0, 0.0]))


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_vmap_is_the_loop(shaping):
    losses = tensor([[3.0, 1.0, 1.0, float("nan")], [1.0, -4.0, float("inf"), 1.0], [2.0, 2.0, 2.0, 2.0]])
    torch.testing.assert_close(vmap(shaping)(losses), torch.stack([shaping(row) for row in losses]))


@pytest.mark.parametrize("shaping", SHAPINGS)
def test_fewer_than_two_losses_are_refused(shaping):
    for bad in (tensor([1.0]), tensor(1.0), tensor([[1.0, 2.0]])):
        with pytest.raises(ValueError, match="at least 2 members"):
            shaping(bad)
