"""diffopt.convex.transport: sums of rows and columns, at any magnitude, and derivatives on the support."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.func import jacrev, vmap

from convex.checks import F64, SLOPE_TOL, TOL, check_jacobians, check_lanes, check_optimal, random, uniform
from diffopt.convex import ProjectionError, projection_birkhoff, projection_simplex, projection_transport


def problem(n, m, seed, scale=1.0):
    rows, columns = 0.01 + uniform(n, seed=seed), 0.01 + uniform(m, seed=seed + 1)
    return random(n, m, seed=seed + 2, scale=scale), rows / rows.sum(), columns / columns.sum()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10_000), st.sampled_from([0.01, 1.0, 100.0]))
def test_feasible_and_optimal(n, m, seed, scale):
    X, a, b = problem(n, m, seed, scale)
    P = projection_transport(X, (a, b))
    assert torch.allclose(P.sum(1), a, atol=TOL)
    assert torch.allclose(P.sum(0), b, atol=TOL)
    assert (P >= 0).all()
    others = [projection_transport(random(n, m, seed=seed + k, scale=9.0), (a, b)) for k in (3, 4)]
    check_optimal(lambda X: projection_transport(X, (a, b)), X, [a[:, None] * b, *others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e9])
@pytest.mark.parametrize("shape", [(1, 4), (5, 4), (30, 40)])
def test_sums_at_any_magnitude(dtype, scale, shape):
    X, a, b = (t.to(dtype) for t in problem(*shape, seed=0, scale=scale))
    P = projection_transport(X, (a, b))
    assert P.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert (P.sum(1) - a).abs().amax() <= 8 * eps
    assert (P.sum(0) - b).abs().amax() <= 8 * eps
    assert (P >= 0).all()


@pytest.mark.parametrize("scale", [100.0, 1e9])
def test_far_out_the_nearest_doubly_stochastic_matrix_is_the_best_assignment(scale):
    X = random(6, 6, seed=3)
    P = projection_birkhoff(scale * X)
    chosen = linear_sum_assignment(X.numpy(), maximize=True)
    expected = np.zeros((6, 6))
    expected[chosen] = 1
    assert np.allclose(P.numpy(), expected, atol=1e-9)
    assert torch.allclose(jacrev(projection_birkhoff)(scale * X), torch.zeros(6, 6, 6, 6, dtype=F64), atol=TOL)


def test_one_row_is_a_simplex_with_its_columns_fixed():
    X = random(4, 1)
    ones = torch.ones(1, dtype=F64)
    a = projection_simplex(random(4, seed=1))
    assert torch.allclose(projection_transport(X, (a, ones)), a[:, None], atol=TOL)  # rows and columns of sum 0, too


def test_birkhoff_derivatives():
    check_jacobians(projection_birkhoff, random(4, 4))
    check_lanes(projection_birkhoff, random(5, 3, 3))
    P, J = projection_birkhoff(random(4, 4)), jacrev(projection_birkhoff)(random(4, 4)).reshape(16, 16)
    assert torch.allclose(J @ J, J, atol=TOL)  # a projection onto the face of the support
    assert torch.allclose(J, J.T, atol=TOL)
    assert (J[P.reshape(-1) == 0] == 0).all()


def test_transport_derivatives_with_marginals():
    def operator(X, a, b):
        return projection_transport(X, (torch.softmax(a, 0), torch.softmax(b, 0)))

    check_jacobians(operator, random(3, 4), random(3, seed=1, scale=0.3), random(4, seed=2, scale=0.3))
    check_lanes(operator, random(5, 3, 4), random(5, 3, seed=1), random(5, 4, seed=2))


def test_marginals_may_grow_together():
    """The derivative along a change of both totals is that of the plans."""
    X, a, b = problem(3, 4, seed=5)

    def grown(t):
        return projection_transport(X, (a * (1 + t), b * (1 + t)))

    t = torch.tensor(0.0, dtype=F64)
    expected = (grown(t + 1e-6) - grown(t - 1e-6)) / 2e-6
    assert torch.allclose(jacrev(grown)(t), expected, atol=SLOPE_TOL)


def test_forbidden_entries_stay_empty():
    X = random(4, 4)
    X[0, 1] = X[2, 2] = X[3, 0] = -torch.inf
    P, J = projection_birkhoff(X), jacrev(projection_birkhoff)(X)
    assert P[0, 1] == P[2, 2] == P[3, 0] == 0
    assert torch.allclose(P.sum(0), torch.ones(4, dtype=F64), atol=TOL)
    assert J.isfinite().all()
    assert torch.allclose(P, projection_birkhoff(X.clamp(min=-1e6)), atol=1e-8)


def test_failures_raise_and_are_returned_without_throw():
    X = random(3, 3)
    X[0] = -torch.inf
    with pytest.raises(ProjectionError, match=r"so many entries are -inf.*Pass throw=False"):
        projection_birkhoff(X)
    with pytest.raises(ProjectionError, match="holds NaN"):
        projection_birkhoff(random(3, 3) * torch.nan)
    with pytest.raises(ProjectionError, match="max_steps is too small"):
        projection_birkhoff(random(5, 5), max_steps=2)
    assert projection_birkhoff(random(5, 5), max_steps=2, throw=False).isfinite().all()


def test_what_is_refused():
    X, half = torch.ones(2, 2), torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match=r"`X` must be square; got \(2, 3\).*projection_transport"):
        projection_birkhoff(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"must have the same total.*Scale one to the other"):
        projection_transport(X, (half, 2 * half))
    with pytest.raises(ValueError, match="must not be negative"):
        vmap(lambda a: projection_transport(X, (a, half)))(torch.tensor([[0.5, 0.5], [1.5, -0.5]]))
    with pytest.raises(ValueError, match=r"`marginals\[1\]` must have shape \(2,\)"):
        projection_transport(X, (half, torch.ones(3)))
    with pytest.raises(TypeError, match="must be a pair"):
        projection_transport(X, half[0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_one_entry_that_is_not_finite_is_refused(bad):
    X = torch.tensor([[bad, 0.2], [0.1, 0.4]])
    with pytest.raises(ProjectionError, match="holds NaN or inf"):
        projection_birkhoff(X)
    with pytest.raises(ValueError, match="at least one entry"):
        projection_birkhoff(X[:0, :0])
