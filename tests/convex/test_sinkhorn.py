"""diffopt.convex.sinkhorn: the limit of Sinkhorn's iterations, and its implicit derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacrev

from convex.checks import F64, TOL, check_jacobians, check_lanes, random, uniform
from diffopt.convex import ProjectionError, kl_projection_birkhoff, kl_projection_simplex, kl_projection_transport


def sinkhorn(X, a, b, rounds=2000):
    alpha = torch.zeros_like(a)
    for _ in range(rounds):
        beta = b.log() - (X + alpha[:, None]).logsumexp(0)
        alpha = a.log() - (X + beta).logsumexp(1)
    return (X + alpha[:, None] + beta).exp()


def marginals(n, m, seed=0):
    a, b = 0.05 + uniform(n, seed=seed), 0.05 + uniform(m, seed=seed + 1)
    return a / a.sum(), b / b.sum()


@pytest.mark.parametrize(("shape", "scale"), [((3, 3), 1.0), ((4, 2), 3.0), ((2, 5), 3.0)])
def test_the_limit_of_the_iterations(shape, scale):
    X, (a, b) = random(*shape, scale=scale), marginals(*shape)
    assert torch.allclose(kl_projection_transport(X, (a, b)), sinkhorn(X, a, b), atol=TOL)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 20.0]))
def test_feasible_and_of_the_form_of_the_solution(n, m, seed, scale):
    X, (a, b) = random(n, m, seed=seed, scale=scale), marginals(n, m, seed)
    P = kl_projection_transport(X, (a, b))
    assert torch.allclose(P.sum(1), a, atol=TOL)
    assert torch.allclose(P.sum(0), b, atol=TOL)
    Z = P.log() - X  # rank one in logarithms: the condition of optimality
    assert torch.allclose(Z, Z[:, :1] + Z[:1] - Z[0, 0], atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_problem_of_low_temperature(dtype):
    X, (a, b) = random(20, 30, scale=50.0).to(dtype), marginals(20, 30)
    P = kl_projection_transport(X, (a.to(dtype), b.to(dtype)))
    assert P.dtype == dtype
    assert torch.allclose(P.sum(1), a.to(dtype), atol=4 * torch.finfo(dtype).eps ** 0.75)
    assert torch.allclose(P.sum(0), b.to(dtype), atol=4 * torch.finfo(dtype).eps ** 0.75)


def test_one_column_and_one_row():
    X, ones = random(1, 4), torch.ones(1, dtype=F64)
    b = kl_projection_simplex(random(4, seed=1))
    assert torch.allclose(kl_projection_transport(X, (ones, b)), b[None], atol=TOL)
    assert torch.allclose(kl_projection_transport(X.T, (b, ones)), b[:, None], atol=TOL)


def test_derivatives():
    def operator(X, a, b):
        return kl_projection_transport(X, (torch.softmax(a, 0), torch.softmax(b, 0)))

    check_jacobians(operator, random(4, 3), random(4, seed=1), random(3, seed=2))
    check_lanes(operator, random(5, 3, 4), random(5, 3, seed=1), random(5, 4, seed=2))
    check_jacobians(kl_projection_birkhoff, random(3, 3))


def test_forbidden_entries_stay_empty():
    X = random(4, 4)
    X[0, 1] = X[2, 2] = -torch.inf
    P, J = kl_projection_birkhoff(X), jacrev(kl_projection_birkhoff)(X)
    assert P[0, 1] == P[2, 2] == 0
    assert torch.allclose(P.sum(1), torch.ones(4, dtype=F64), atol=TOL)
    assert J.isfinite().all()
    assert torch.allclose(P, kl_projection_birkhoff(X.clamp(min=-60)), atol=TOL)


def test_failures_raise_and_are_returned_without_throw():
    with pytest.raises(ProjectionError, match=r"magnitudes too far apart \(raise the temperature\)"):
        kl_projection_transport(random(20, 30, scale=1e5), marginals(20, 30))
    with pytest.raises(ProjectionError, match=r"max_steps is too small\. Pass throw=False"):
        kl_projection_birkhoff(random(6, 6), max_steps=1)
    assert kl_projection_birkhoff(random(6, 6), max_steps=1, throw=False).isfinite().all()
    with pytest.raises(ProjectionError, match="holds NaN"):
        kl_projection_birkhoff(random(3, 3) * torch.nan)


def test_what_is_refused():
    with pytest.raises(ValueError, match="`marginals` must be positive for KL projections"):
        kl_projection_transport(torch.ones(2, 2), (torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5])))
    with pytest.raises(ValueError, match="`X` must be square"):
        kl_projection_birkhoff(torch.ones(2, 3))


def test_entries_too_large_for_their_multipliers_are_refused():
    X = 1e30 * torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, -0.3], [0.2, 0.9, 0.4]])
    with pytest.raises(ProjectionError, match="magnitudes too far apart"):
        kl_projection_birkhoff(X)
