"""diffopt.convex.polyhedra: the active-set method against optimality, SciPy and other projections."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.func import jacrev

from convex.checks import F64, TOL, check_jacobians, check_lanes, random, uniform
from diffopt.convex import (
    ProjectionError,
    projection_affine_set,
    projection_birkhoff,
    projection_box,
    projection_halfspace,
    projection_polyhedron,
    projection_simplex,
)


def polyhedron(n, p, m, seed, redundant=False):
    """A polyhedron that holds a known point, where some of the inequalities are tight."""
    point, A, G = random(n, seed=seed), random(p, n, seed=seed + 1), random(m, n, seed=seed + 2)
    h = G @ point + uniform(m, seed=seed + 3) * (uniform(m, seed=seed + 4) < 0.7)
    if redundant:
        A, G, h = torch.cat([A, 2 * A[:1]]), torch.cat([G, G[:2]]), torch.cat([h, h[:2]])
    return point, A, A @ point, G, h


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 8), st.integers(0, 3), st.integers(0, 20), st.integers(0, 10_000), st.booleans(), st.floats(0.1, 100)
)
def test_feasible_and_optimal_also_where_rows_are_redundant(n, p, m, seed, redundant, scale):
    point, A, b, G, h = polyhedron(n, min(p, n - 1), m, seed, redundant)
    x = random(n, seed=seed + 5, scale=scale)
    y = projection_polyhedron(x, A, b, G, h)
    size = 1 + scale
    assert torch.allclose(A @ y, b, atol=TOL * size)
    assert (G @ y <= h + TOL * size).all()
    # points of the polyhedron: the known one, and projections of others
    others = [point, *(projection_polyhedron(random(n, seed=seed + k), A, b, G, h) for k in range(6, 9))]
    assert all((x - y) @ (z - y) <= 1e-8 * size**2 for z in others)
    assert torch.allclose(projection_polyhedron(y, A, b, G, h), y, atol=1e-8 * size)


def test_against_scipy():
    _, A, b, G, h = (t.numpy() for t in polyhedron(5, 1, 8, seed=0))
    x = random(5, seed=9, scale=2.0)
    found = minimize(
        lambda y: ((y - x.numpy()) ** 2).sum() / 2,
        np.zeros(5),
        jac=lambda y: y - x.numpy(),
        constraints=[{"type": "eq", "fun": lambda y: A @ y - b}, {"type": "ineq", "fun": lambda y: h - G @ y}],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 200},
    )
    y = projection_polyhedron(x, *(torch.from_numpy(t) for t in (A, b, G, h)))
    assert np.allclose(y.numpy(), found.x, atol=1e-6)  # SLSQP's own accuracy


def test_special_cases_are_those_of_the_closed_forms():
    x, eye = random(5, scale=2.0), torch.eye(5, dtype=F64)
    zeros, ones = torch.zeros(5, dtype=F64), torch.ones(5, dtype=F64)
    a = random(5, seed=1)
    pairs = [
        (lambda x: projection_polyhedron(x, ones[None], ones[:1], -eye, zeros), projection_simplex),
        (
            lambda x: projection_polyhedron(x, None, None, torch.cat([eye, -eye]), torch.cat([ones, zeros])),
            lambda x: projection_box(x, 0.0, 1.0),
        ),
        (
            lambda x: projection_polyhedron(x, None, None, a[None], ones[:1]),
            lambda x: projection_halfspace(x, a, 1.0),
        ),
        (
            lambda x: projection_polyhedron(x, a[None], ones[:1], None, None),
            lambda x: projection_affine_set(x, a[None], ones[:1]),
        ),
        (lambda x: projection_polyhedron(x, None, None, None, None), lambda x: x),
        (lambda x: projection_polyhedron(x, None, None, a[None], torch.tensor([torch.inf])), lambda x: x),
    ]
    for found, expected in pairs:
        assert torch.allclose(found(x), expected(x), atol=TOL)
        assert torch.allclose(jacrev(found)(x), jacrev(expected)(x), atol=TOL)


def test_the_birkhoff_polytope_whose_equations_are_redundant():
    X = random(3, 3)
    eye, ones = torch.eye(3, dtype=F64), torch.ones(1, 3, dtype=F64)
    sums = torch.cat([torch.kron(eye, ones), torch.kron(ones, eye)])
    found = projection_polyhedron(
        X, sums, torch.ones(6, dtype=F64), -torch.eye(9, dtype=F64), torch.zeros(9, dtype=F64)
    )
    assert torch.allclose(found, projection_birkhoff(X), atol=TOL)


def test_derivatives_in_all_arguments():
    args = random(4, scale=3.0), *polyhedron(4, 1, 5, seed=3)[1:]
    check_jacobians(projection_polyhedron, *args)
    lanes = [(random(4, seed=s, scale=3.0), *polyhedron(4, 1, 5, seed=s)[1:]) for s in range(5)]
    check_lanes(projection_polyhedron, *(torch.stack(part) for part in zip(*lanes, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_points(dtype):
    eye, ones = torch.eye(4, dtype=dtype), torch.ones(4, dtype=dtype)
    x = random(4, scale=1e9).to(dtype)
    p = projection_polyhedron(x, ones[None], ones[:1], -eye, 0 * ones)
    assert p.dtype == dtype
    assert torch.allclose(p, projection_simplex(x), atol=1e-6)


def test_degenerate_vertices_have_finite_derivatives():
    """Four planes meet in a point of the plane, where two determine it."""
    G = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]], dtype=F64)
    h, x = torch.zeros(4, dtype=F64), torch.tensor([1.0, 1.0], dtype=F64)
    assert torch.allclose(projection_polyhedron(x, None, None, G, h), torch.zeros(2, dtype=F64), atol=TOL)
    found = jacrev(lambda x, G, h: projection_polyhedron(x, None, None, G, h), (0, 1, 2))(x, G, h)
    assert all(J.isfinite().all() for J in found)


def test_failures_raise_and_are_returned_without_throw():
    G, x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2)
    h = torch.tensor([-1.0, -1.0])
    with pytest.raises(ProjectionError, match=r"constraints contradict each other.*Pass throw=False"):
        projection_polyhedron(x, None, None, G, h)
    assert projection_polyhedron(x, None, None, G, h, throw=False).shape == (2,)
    with pytest.raises(ProjectionError, match="contradict"):
        projection_polyhedron(x, torch.ones(2, 2), torch.tensor([0.0, 1.0]), None, None)
    with pytest.raises(ProjectionError, match="holds NaN"):
        projection_polyhedron(x * torch.nan, None, None, G, -h)
    with pytest.raises(ProjectionError, match="contradict"):
        torch.func.vmap(lambda h: projection_polyhedron(x, None, None, G, h))(torch.stack([h, -h]))
    eye = -torch.eye(5)
    with pytest.raises(ProjectionError, match="max_steps was reached"):
        projection_polyhedron(-torch.ones(5), None, None, eye, torch.zeros(5), max_steps=2)


def test_what_is_refused():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="`A` and `b` must come together"):
        projection_polyhedron(x, torch.ones(1, 3), None, None, None)
    with pytest.raises(ValueError, match="`G` must be a matrix"):
        projection_polyhedron(x, None, None, torch.ones(1, 2), torch.ones(1))
    with pytest.raises(ValueError, match=r"`h` must have shape \(1,\)"):
        projection_polyhedron(x, None, None, torch.ones(1, 3), torch.ones(2))


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan])
def test_a_bound_that_no_point_meets_is_refused(bad):
    x, row = torch.tensor([0.7, -0.3]), torch.ones(1, 2)
    with pytest.raises(ProjectionError, match="found no point"):
        projection_polyhedron(x, None, None, row, torch.tensor([bad]))
    with pytest.raises(ProjectionError, match="found no point"):
        projection_polyhedron(x, row, torch.tensor([torch.inf]), None, None)
