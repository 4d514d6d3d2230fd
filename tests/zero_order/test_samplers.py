import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from diffopt import random
from diffopt.zero_order import (
    coordinate,
    gaussian,
    guided,
    low_rank,
    noise,
    orthogonal,
    rademacher,
    smoothed,
    sphere,
)
from zero_order.smoothings import B, X, check_mean, f64, quadratic, trace_of_variance

KEY = random.key(5)
U = f64([[1.0, 0.4], [-0.5, 1.0], [0.3, 0.2]])
SAMPLERS = {
    "gaussian": gaussian(),
    "rademacher": rademacher(),
    "sphere": sphere(),
    "orthogonal": orthogonal(),
    "coordinate": coordinate(),
    "guided": guided(U, alpha=0.6),
    "low_rank": low_rank(2),
}
BIASED = ("guided",)
G = f64(0.9, -0.6, 0.4)
SQUARE = G @ G


def linear(x):
    return G @ x


def estimate(f, sampler, num_samples, x=X, **options):
    F = smoothed(f, 0.3, num_samples, sampler=sampler, **options)
    return lambda key: grad(F, argnums=1)(key, x)


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(SAMPLERS)),
    start=st.integers(0, 11),
    members=st.integers(1, 9),
)
def test_a_shard_is_the_slice_of_the_whole(name, start, members):
    draw = SAMPLERS[name].draw
    whole = draw(KEY, [(3,)], 20, 0, torch.float64)
    torch.testing.assert_close(draw(KEY, [(3,)], members, start, torch.float64), whole[start : start + members])


@pytest.mark.parametrize("name", SAMPLERS)
def test_directions_are_of_the_dtype_and_map_over_keys(name):
    draw = SAMPLERS[name].draw
    for dtype in (torch.float32, torch.bfloat16):
        assert draw(KEY, [(3,)], 4, 1, dtype).dtype == dtype
    keys = random.split(KEY, 3)
    mapped = vmap(lambda key: draw(key, [(3,)], 5, 2, torch.float64))(keys)
    torch.testing.assert_close(mapped, torch.stack([draw(key, [(3,)], 5, 2, torch.float64) for key in keys]))


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(BIASED)))
def test_the_mean_of_c_u_u_is_the_identity(name):
    sampler = SAMPLERS[name]

    def moment(key):
        u = sampler.draw(key, [(3,)], 4, 0, torch.float64)
        return sampler.scale(3) * u.mT @ u / 4

    check_mean(moment, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(BIASED)))
def test_the_estimate_of_a_quadratic_is_unbiased(name):
    check_mean(estimate(quadratic, SAMPLERS[name], 4), grad(quadratic)(X))


def test_the_gaussian_sampler_is_the_noise():
    expected = noise(KEY, 10, 4, start=3, dtype=torch.float64)
    assert torch.equal(gaussian().draw(KEY, [(2, 3), (4,)], 4, 3, torch.float64), expected)


@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_sums_are_those_of_the_directions(name):
    sampler, weights = SAMPLERS[name], f64(0.5, -1.0, 2.0)
    expected = weights @ sampler.draw(KEY, [(5,)], 3, 4, torch.float64)
    torch.testing.assert_close(sampler.sum(KEY, [(5,)], weights, 4), expected)


def test_orthogonal_directions_have_normal_lengths():
    u = orthogonal().draw(KEY, [(50,)], 100, 0, torch.float64)
    gram = u @ u.T
    blocks = torch.block_diag(*[torch.ones(50, 50)] * 2) - torch.eye(100)
    assert (gram * blocks).abs().max() < 1e-10
    z = noise(KEY, 50, 100, dtype=torch.float64)
    torch.testing.assert_close(gram.diagonal(), (z * z).sum(1))


def test_coordinates_are_each_met_once():
    u = coordinate().draw(KEY, [(4,)], 12, 0, torch.float64)
    assert torch.equal(u.reshape(3, 4, 4).sum(1), torch.ones(3, 4, dtype=torch.float64))
    exact = estimate(quadratic, coordinate(), 6)(KEY)
    torch.testing.assert_close(exact, grad(quadratic)(X))


@pytest.mark.parametrize(
    ("name", "directions", "factor"),
    [
        ("gaussian", 1, 4),  # n + 1, also for any quadratic
        ("rademacher", 1, 2),  # n - 1: Spall 1992
        ("sphere", 1, 2),  # n - 1
        ("coordinate", 1, 2),  # n - 1
        ("orthogonal", 3, 2 / 3),  # (n + 2) / m - 1 for m <= n: Choromanski et al. 2018
        ("orthogonal", 2, 3 / 2),
        ("gaussian", 3, 4 / 3),
    ],
)
def test_variance_on_a_linear_function(name, directions, factor):
    found = trace_of_variance(estimate(linear, SAMPLERS[name], 2 * directions))
    torch.testing.assert_close(found, factor * SQUARE, rtol=0.05, atol=0)


def test_guided_mean_and_variance():
    """Mean beta Sigma g, variance beta^2 (g' Sigma g tr(Sigma) + g' Sigma^2 g): Maheswaranathan et al. 2019."""
    alpha, beta = 0.6, 2.0
    q = torch.linalg.qr(U).Q
    sigma = alpha / 3 * torch.eye(3, dtype=torch.float64) + (1 - alpha) / 2 * q @ q.T
    one = estimate(linear, guided(U, alpha=alpha, beta=beta), 2)
    check_mean(one, beta * sigma @ G)
    expected = beta**2 * (G @ sigma @ G + G @ sigma @ sigma @ G)
    torch.testing.assert_close(trace_of_variance(one), expected, rtol=0.05, atol=0)


def test_guided_is_unbiased_without_a_subspace():
    check_mean(estimate(linear, guided(U, alpha=1.0), 4), G)


def test_low_rank_mean_and_variance():
    """For rank 1 and a p x q matrix the trace of the variance is (p + 2) (q + 2) - 1 times the squared norm."""
    W = f64([[0.4, -0.3], [0.2, 0.7], [0.5, 0.1]])
    M = f64([[0.9, -0.6], [0.4, 0.3], [-0.2, 0.8]])
    one = estimate(lambda W: (M * W).sum(), low_rank(1), 2, x=W)
    check_mean(one, M)
    expected = (5 * 4 - 1) * (M * M).sum()
    torch.testing.assert_close(trace_of_variance(lambda key: one(key).reshape(-1)), expected, rtol=0.05, atol=0)


def test_low_rank_leaves_of_a_tree():
    shapes = [(2, 3, 2), (4,), (5, 3)]
    u = low_rank(2).draw(KEY, shapes, 6, 0, torch.float64)
    first, vector, last = u.split([12, 4, 15], dim=1)
    assert (torch.linalg.matrix_rank(first.reshape(6, 2, 6)) == 2).all()
    assert (torch.linalg.matrix_rank(last.reshape(6, 5, 3)) == 2).all()
    assert vector.shape == (6, 4)


def test_bad_samplers_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        guided(torch.ones(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="1 <= k <= n"):
        guided(B)
    with pytest.raises(ValueError, match="alpha"):
        guided(U, alpha=0.0)
    with pytest.raises(ValueError, match="rank"):
        low_rank(0)
    with pytest.raises(ValueError, match="as many rows as x has numbers, 2; got 3"):
        guided(U).draw(KEY, [(2,)], 2, 0, torch.float64)
