"""diffopt.convex.isotonic: against scikit-learn, and the Jacobian of its blocks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from torch.func import jacrev

from convex.checks import F64, TOL, check_jacobians, check_lanes, check_optimal, random, uniform
from diffopt.convex import isotonic_regression


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(0, 10_000), st.booleans(), st.booleans())
def test_against_scikit_learn(n, seed, increasing, trending):
    y = random(n, seed=seed) + (torch.linspace(0, 5, n, dtype=F64) if trending else 0)
    weights = 0.1 + uniform(n, seed=seed)
    places = np.arange(n)
    model = IsotonicRegression(increasing=increasing).fit(places, y.numpy(), sample_weight=weights.numpy())
    found = isotonic_regression(y, weights, increasing=increasing)
    assert np.allclose(found.numpy(), model.predict(places), atol=TOL)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(0, 10_000))
def test_optimal_with_the_averages_of_blocks_as_jacobian(n, seed):
    y = random(n, seed=seed)
    check_optimal(isotonic_regression, y, [random(n, seed=seed + k).sort().values for k in range(1, 4)])
    z = isotonic_regression(y)
    same = (z[:, None] == z).double()
    assert torch.allclose(jacrev(isotonic_regression)(y), same / same.sum(1), atol=TOL)


def test_derivatives_in_the_values_and_the_weights():
    check_jacobians(isotonic_regression, random(6), 0.5 + uniform(6))
    check_jacobians(lambda y, w: isotonic_regression(y, w, increasing=False), random(6), 0.5 + uniform(6))
    check_lanes(isotonic_regression, random(6, 7), 0.5 + uniform(6, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_values_and_long_sequences(dtype):
    y = random(1000).to(dtype)
    z = isotonic_regression(1e9 * y)
    assert z.dtype == dtype
    assert torch.allclose(z.double(), isotonic_regression(1e9 * y.double()), atol=1e9 * 8 * torch.finfo(dtype).eps)
    falling = -torch.arange(500, dtype=dtype)
    assert torch.equal(isotonic_regression(falling), falling.mean().expand(500))
    late = torch.cat([torch.arange(300, dtype=dtype), torch.tensor([-1e6], dtype=dtype)])  # pools one by one
    assert (isotonic_regression(late) == isotonic_regression(late)[0]).all()


def test_what_is_monotone_stays():
    y = random(8).sort().values
    assert torch.equal(isotonic_regression(y), y)
    assert torch.equal(isotonic_regression(y.flip(0), increasing=False), y.flip(0))
    assert torch.equal(isotonic_regression(y[:1]), y[:1])


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"`y` must be a vector; got \(2, 2\).*vmap"):
        isotonic_regression(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"`weights` must have shape \(3,\)"):
        isotonic_regression(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="`weights` must be positive"):
        isotonic_regression(torch.ones(3), torch.tensor([1.0, 0.0, 1.0]))
    for y in (torch.arange(3), [1.0, 2.0]):
        with pytest.raises(TypeError, match="`y` must be a floating-point tensor"):
            isotonic_regression(y)
