"""diffopt.convex.balls: inside J = I, outside that of the sphere; kinks, magnitudes, radii."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import hessian, jacfwd, jacrev

from convex.checks import F64, TOL, check_jacobians, check_lanes, check_optimal, random, uniform
from diffopt.convex import (
    projection_l1_ball,
    projection_l1_sphere,
    projection_l2_ball,
    projection_l2_sphere,
    projection_linf_ball,
)

BALLS = {1: projection_l1_ball, 2: projection_l2_ball, torch.inf: projection_linf_ball}
SPHERES = {1: projection_l1_sphere, 2: projection_l2_sphere}
ALL = [*BALLS.values(), *SPHERES.values()]
R = 0.7


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 10_000), st.sampled_from(list(BALLS)))
def test_balls_are_optimal(n, seed, order):
    points = [random(n, seed=seed + k) for k in range(1, 5)]
    points = [R * y / torch.linalg.vector_norm(y, order) for y in points]
    x = random(n, seed=seed)
    check_optimal(lambda x: BALLS[order](x, R), x, points)
    assert torch.linalg.vector_norm(BALLS[order](x, R), order) <= R * (1 + TOL)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 12), st.integers(0, 10_000), st.sampled_from(list(SPHERES)), st.sampled_from([0.01, 1.0]))
def test_spheres_hold_the_nearest_of_many_points(n, seed, order, scale):
    x = random(n, seed=seed, scale=scale)
    p = SPHERES[order](x, R)
    assert torch.allclose(torch.linalg.vector_norm(p, order), torch.tensor(R, dtype=F64), rtol=TOL)
    others = random(200, n, seed=seed + 1)
    others = R * others / torch.linalg.vector_norm(others, order, dim=1, keepdim=True)
    assert (x - p).norm() <= (x - others).norm(dim=1).amin() + TOL


@pytest.mark.parametrize("order", BALLS)
def test_inside_the_jacobian_is_the_identity(order):
    x = 0.1 * random(4)
    assert torch.equal(BALLS[order](x), x)
    assert torch.equal(jacrev(BALLS[order])(x), torch.eye(4, dtype=F64))
    assert torch.equal(jacfwd(BALLS[order])(x), torch.eye(4, dtype=F64))


@pytest.mark.parametrize("order", SPHERES)
def test_outside_it_is_that_of_the_sphere(order):
    x = random(4, scale=3.0)
    assert torch.equal(BALLS[order](x, R), SPHERES[order](x, R))
    assert torch.equal(jacrev(BALLS[order])(x, R), jacrev(SPHERES[order])(x, R))


def test_the_jacobian_of_the_l2_sphere():
    x = random(5)
    u = x / x.norm()
    expected = R / x.norm() * (torch.eye(5, dtype=F64) - torch.outer(u, u))
    assert torch.allclose(jacrev(projection_l2_sphere)(x, R), expected, rtol=TOL)


@pytest.mark.parametrize("project", ALL)
def test_derivatives_in_the_point_and_the_radius(project):
    check_jacobians(project, random(4, seed=2), torch.tensor(R, dtype=F64))
    check_lanes(project, random(6, 4), 0.2 + uniform(6))


@pytest.mark.parametrize("project", ALL)
@pytest.mark.parametrize("x", [torch.zeros(3), torch.tensor([R, 0.0, 0.0]), torch.tensor([0.0, 5.0, 5.0])])
def test_kinks_are_finite(project, x):
    x = x.double()
    for derivative in (jacrev(project), jacfwd(project), hessian(lambda x: (project(x) ** 2).sum())):
        assert derivative(x).isfinite().all()


@pytest.mark.parametrize("project", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-25, 1e9, 1e25])
def test_magnitudes(project, dtype, scale):
    x = random(6, scale=scale).to(dtype)
    p, J = project(x), jacrev(project)(x)
    assert p.isfinite().all()
    assert J.isfinite().all()
    assert p.abs().amax() <= 1 + 8 * torch.finfo(dtype).eps


def test_at_zero_the_spheres_have_a_point():
    x = torch.zeros(4, dtype=F64)
    for order, project in SPHERES.items():
        assert torch.allclose(torch.linalg.vector_norm(project(x, R), order), torch.tensor(R, dtype=F64))


def test_a_tree_is_one_vector():
    x = {"a": random(2, 2), "b": random(3, seed=1)}
    flat = torch.cat([x["a"].reshape(-1), x["b"]])
    for project in ALL:
        p = project(x, R)
        assert torch.equal(torch.cat([p["a"].reshape(-1), p["b"]]), project(flat, R))


@pytest.mark.parametrize("project", ALL)
def test_what_is_refused(project):
    with pytest.raises(ValueError, match="must be at least 0"):
        project(torch.ones(3), -1.0)
    with pytest.raises(TypeError, match="floating-point"):
        project(torch.tensor([1, 2]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "project", [projection_l1_ball, projection_l1_sphere, projection_l2_ball, projection_l2_sphere]
)
def test_what_is_not_finite_shows(project, bad):
    assert project(torch.tensor([0.6, bad, -0.4])).isnan().all()
