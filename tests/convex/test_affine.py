"""diffopt.convex.affine: hyperplanes, halfspaces and affine sets against their equations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacrev

from convex.checks import F64, TOL, check_jacobians, check_lanes, check_optimal, random
from diffopt.convex import projection_affine_set, projection_halfspace, projection_hyperplane
from diffopt.linalg import LinearSolveError

B = torch.tensor(0.3, dtype=F64)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 10), st.integers(0, 10_000))
def test_planes_and_halfspaces_are_optimal(n, seed):
    x, a = random(n, seed=seed), random(n, seed=seed + 1)
    on_plane = [projection_hyperplane(random(n, seed=seed + k), a, B) for k in range(2, 5)]
    check_optimal(lambda x: projection_hyperplane(x, a, B), x, on_plane)
    assert (a @ projection_hyperplane(x, a, B) - B).abs() <= TOL
    check_optimal(lambda x: projection_halfspace(x, a, B), x, [y - 0.5 * a for y in on_plane])
    p = projection_halfspace(x, a, B)
    assert a @ p <= B + TOL
    assert torch.equal(p, x) or a @ x > B


@pytest.mark.parametrize("project", [projection_hyperplane, projection_halfspace])
def test_derivatives_of_planes(project):
    a = random(4, seed=1)
    for x in (2 * a, -2 * a + 0.1):
        check_jacobians(project, x, a, B)
    check_lanes(project, random(6, 4), random(6, 4, seed=2), random(6, seed=3))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(4, 9), st.integers(0, 10_000), st.sampled_from([1.0, 1e9]))
def test_affine_sets_are_optimal(m, n, seed, scale):
    A, b, x = random(m, n, seed=seed), random(m, seed=seed + 1), random(n, seed=seed + 2, scale=scale)
    p = projection_affine_set(x, A, b)
    assert torch.allclose(A @ p, b, atol=1e-8 * max(1.0, p.abs().amax().item()))
    null = torch.eye(n, dtype=F64) - torch.linalg.pinv(A) @ A
    assert torch.allclose(null @ (x - p), torch.zeros(n, dtype=F64), atol=1e-8 * scale)


def test_derivatives_of_affine_sets():
    A, b = random(2, 4, seed=1), random(2, seed=2)
    check_jacobians(projection_affine_set, random(4), A, b)
    check_lanes(projection_affine_set, random(5, 4), random(5, 2, 4, seed=1), random(5, 2, seed=2))
    expected = torch.eye(4, dtype=F64) - torch.linalg.pinv(A) @ A
    assert torch.allclose(jacrev(projection_affine_set)(random(4), A, b), expected, atol=TOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_points_stay_on_the_plane(dtype):
    x, a = random(5, scale=1e9).to(dtype), random(5, seed=1).to(dtype)
    p = projection_hyperplane(x, a, 0.3)
    assert p.dtype == dtype
    assert (a @ p - 0.3).abs() <= 8 * torch.finfo(dtype).eps * p.abs().amax()
    assert torch.allclose(projection_hyperplane(x, 1e-25 * a, 0.0), projection_hyperplane(x, a, 0.0), rtol=1e-4)


def test_trees():
    x, a = {"u": random(2, 2), "v": random(2)}, {"u": random(2, 2, seed=1), "v": random(2, seed=2)}
    p = projection_hyperplane(x, a, B)
    assert torch.allclose((p["u"] * a["u"]).sum() + p["v"] @ a["v"], B, atol=TOL)
    p = projection_affine_set(x, random(2, 6, seed=3), random(2, seed=4))
    assert p["u"].shape == (2, 2)


def test_what_is_refused():
    x = torch.ones(3)
    for project in (projection_hyperplane, projection_halfspace):
        with pytest.raises(ValueError, match="`a` must not be 0"):
            project(x, torch.zeros(3), 1.0)
        with pytest.raises(ValueError, match=r"`a` must have shape \(3,\)"):
            project(x, torch.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"`A` must be a matrix of shape \(rows, 3\)"):
        projection_affine_set(x, torch.ones(2, 2), torch.ones(2))
    with pytest.raises(ValueError, match=r"`b` must have shape \(2,\); got \(3,\)"):
        projection_affine_set(x, torch.ones(2, 3), torch.ones(3))
    with pytest.raises(TypeError, match="`A` must be a floating-point tensor; got int"):
        projection_affine_set(x, 3, torch.ones(3))
    with pytest.raises(LinearSolveError, match="singular"):
        projection_affine_set(x, torch.ones(2, 3), torch.ones(2))


def test_rows_that_depend_on_one_another_but_for_rounding_are_refused():
    A = random(3, 5, seed=5).float()
    A[2] = A[0] + 0.3 * A[1]
    with pytest.raises((ValueError, LinearSolveError), match=r"independent|singular"):
        projection_affine_set(torch.ones(5), A, torch.ones(3))
    with pytest.raises((ValueError, LinearSolveError), match=r"independent|singular"):
        projection_affine_set(torch.ones(3), random(4, 3, seed=6).float(), torch.ones(4))
