"""diffopt.convex.simplex: sparsemax and softmax, at any magnitude, with -inf, and the Jacobian of the support."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import hessian, jacfwd, jacrev

from convex.checks import F64, TOL, check_jacobians, check_lanes, check_optimal, random, uniform
from diffopt.convex import kl_projection_simplex, projection_simplex

DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparsemax_numbers(dtype):
    found = projection_simplex(torch.tensor([0.6, 0.1, -0.4, 0.55], dtype=dtype))
    expected = torch.tensor([0.51666667, 0.01666667, 0.0, 0.46666667], dtype=dtype)
    assert torch.allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("n", [1, 2, 50, 1000])
def test_sums_and_bounds_at_any_magnitude(dtype, scale, n):
    x = random(n, seed=n, scale=scale).to(dtype)
    p = projection_simplex(x)
    assert (p.sum() - 1).abs() <= 8 * torch.finfo(dtype).eps * max(1, int((p > 0).sum()))
    assert (p >= 0).all()
    assert (p <= 1 + torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_entries_keep_their_differences(dtype):
    gap = 0.25 if dtype is F64 else 0.0  # float32 holds no fraction at 1e9
    p = projection_simplex(torch.tensor([1e9, 1e9 + gap, -1e9], dtype=dtype))
    assert torch.allclose(p, torch.tensor([0.5 - gap / 2, 0.5 + gap / 2, 0.0], dtype=dtype))


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, 3.3])
@pytest.mark.parametrize("n", [2, 3, 10, 100])
def test_a_vertex_whose_threshold_rounds_to_the_bound(n, value):
    for scale in (value, 2 * value, 10.0, 1e9):
        x = -scale * (1 + uniform(n, seed=n))
        x[0] = 0.0
        expected = torch.zeros(n, dtype=F64)
        expected[0] = value
        assert torch.equal(projection_simplex(x, value), expected)


@pytest.mark.parametrize("project", [projection_simplex, kl_projection_simplex])
def test_minus_infinity_excludes(project):
    x = torch.tensor([0.6, -torch.inf, 0.1, -torch.inf], dtype=F64)
    kept = torch.tensor([0, 2])
    p, J = project(x), jacrev(project)(x)
    assert torch.allclose(p[kept], project(x[kept]), rtol=TOL)
    assert (p[[1, 3]] == 0).all()
    assert torch.allclose(J[kept][:, kept], jacrev(project)(x[kept]), rtol=TOL)
    assert J.isfinite().all()
    assert (J[:, [1, 3]] == 0).all()
    assert torch.equal(jacfwd(project)(x), J)
    assert hessian(lambda x: (project(x) ** 2).sum())(x).isfinite().all()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(0, 10_000), st.floats(0.1, 5.0))
def test_optimal_with_the_jacobian_of_the_support(n, seed, value):
    x = random(n, seed=seed)
    points = [value * torch.softmax(random(n, seed=seed + k), 0) for k in range(1, 5)]
    check_optimal(lambda x: projection_simplex(x, value), x, [*points, *value * torch.eye(n, dtype=F64)])
    s = (projection_simplex(x, value) > 0).double()
    J = jacrev(projection_simplex)(x, value)
    assert torch.allclose(J, torch.diag(s) - torch.outer(s, s) / s.sum(), atol=TOL)


@pytest.mark.parametrize("project", [projection_simplex, kl_projection_simplex])
def test_derivatives_in_the_point_and_the_value(project):
    check_jacobians(project, torch.tensor([0.6, 0.2, -0.4, 0.55], dtype=F64), torch.tensor(1.0, dtype=F64))
    check_lanes(project, random(6, 4), 0.5 + uniform(6))


def test_a_tree_is_one_vector():
    x = {"a": random(2, 2), "b": random(3, seed=1)}
    p = projection_simplex(x)
    flat = torch.cat([x["a"].reshape(-1), x["b"]])
    assert torch.equal(torch.cat([p["a"].reshape(-1), p["b"]]), projection_simplex(flat))


def test_kl_is_softmax():
    x = random(5, scale=100.0)
    assert torch.equal(kl_projection_simplex(x, 2.0), 2 * torch.softmax(x, 0))


@pytest.mark.parametrize("project", [projection_simplex, kl_projection_simplex])
def test_what_is_refused(project):
    with pytest.raises(ValueError, match="`value` must be at least 0"):
        project(torch.ones(3), -1.0)
    with pytest.raises(ValueError, match=r"`value` must be a number or a 0-d tensor.*vmap"):
        project(torch.ones(3), torch.ones(3))
    with pytest.raises(TypeError, match="floating-point tensor"):
        project(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="at least one entry"):
        project(torch.ones(0))


def test_nothing_is_zero_divided_at_value_zero():
    J = jacrev(projection_simplex)(random(3), torch.tensor(0.0, dtype=F64))
    assert (projection_simplex(random(3), 0.0) == 0).all()
    assert J.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad):
    x = torch.tensor([0.6, bad, -0.4])
    assert projection_simplex(x).isnan().all()
    assert projection_simplex(torch.tensor([0.6, -0.4]), torch.tensor(torch.nan)).isnan().all()
    lanes = torch.func.vmap(projection_simplex)(torch.stack([x, torch.tensor([0.6, 0.2, -0.4])]))
    assert torch.allclose(lanes[1], torch.tensor([0.7, 0.3, 0.0]))
    assert projection_simplex(x.bfloat16()).dtype == torch.bfloat16
