"""diffopt.convex.boxes: bounds of every form; sections against SciPy, the simplex and the polyhedron."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.func import jacrev, vmap

from convex.checks import F64, TOL, check_jacobians, check_lanes, check_optimal, random, uniform
from diffopt.convex import (
    projection_box,
    projection_box_section,
    projection_non_negative,
    projection_polyhedron,
    projection_simplex,
)


def test_non_negative():
    x = {"a": random(3, 2), "b": torch.tensor(-1.0)}
    found = projection_non_negative(x)
    assert torch.equal(found["a"], x["a"].clamp(min=0))
    assert found["b"] == 0
    check_jacobians(projection_non_negative, random(4))
    assert jacrev(projection_non_negative)(torch.zeros(2)).isfinite().all()


def test_bounds_of_every_form():
    x = {"a": random(3, 2, scale=2.0), "b": random(2, seed=1)}
    by_number = projection_box(x, -0.5, 0.5)
    by_tensor = projection_box(x, torch.tensor([-0.5, -0.5], dtype=F64), torch.tensor(0.5, dtype=F64))
    by_tree = projection_box(x, {"a": torch.full((3, 2), -0.5, dtype=F64), "b": -0.5}, {"a": 0.5, "b": 0.5})
    for found in (by_number, by_tensor, by_tree):
        assert all(torch.equal(found[k], x[k].clamp(-0.5, 0.5)) for k in x)
    assert torch.equal(projection_box(x["b"], -torch.inf, torch.inf), x["b"])


def test_box_derivatives():
    low, high = -0.5 * torch.ones(4, dtype=F64), torch.tensor(0.4, dtype=F64)
    check_jacobians(projection_box, random(4), low, high)
    check_lanes(projection_box, random(5, 4), -uniform(5, 4), uniform(5, seed=1))
    check_optimal(lambda x: projection_box(x, low, high), random(4, scale=3.0), [low, high.expand(4)])


def section(seed, n):
    """A feasible problem with weights of both signs, some of them 0."""
    w = random(n, seed=seed) * (uniform(n, seed=seed + 1) < 0.8)
    low, high = -uniform(n, seed=seed + 2), uniform(n, seed=seed + 3)
    return low, high, w, (w * (low + (high - low) * uniform(n, seed=seed + 4))).sum()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(0, 10_000), st.sampled_from([0.01, 1.0, 100.0]))
def test_sections_and_their_jacobians_are_those_of_the_polyhedron(n, seed, scale):
    x, (low, high, w, c) = random(n, seed=seed, scale=scale), section(seed, n)
    if not w.any():
        return
    eye = torch.eye(n, dtype=F64)

    def polyhedron(x, low, high, w, c):
        return projection_polyhedron(x, w[None], c[None], torch.cat([eye, -eye]), torch.cat([high, -low]))

    every = (0, 1, 2, 3, 4)
    args = x, low, high, w, c
    assert torch.allclose(projection_box_section(*args), polyhedron(*args), atol=TOL)
    found, expected = (jacrev(f, every)(*args) for f in (projection_box_section, polyhedron))
    assert all(torch.allclose(f, e, rtol=1e-6, atol=1e-8) for f, e in zip(found, expected, strict=True))


def test_section_against_scipy():
    x, (low, high, w, c) = random(5, seed=3), section(7, 5)
    bounds = list(zip(low.tolist(), high.tolist(), strict=True))
    constraint = {"type": "eq", "fun": lambda y: y @ w.numpy() - c.item()}
    found = minimize(
        lambda y: ((y - x.numpy()) ** 2).sum() / 2,
        np.zeros(5),
        bounds=bounds,
        constraints=constraint,
        method="SLSQP",
        options={"ftol": 1e-14},
    )
    assert np.allclose(projection_box_section(x, low, high, w, c).numpy(), found.x, atol=1e-6)  # SLSQP's own accuracy


@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_the_unit_section_is_the_simplex_with_its_jacobian(scale):
    ones = torch.ones(6, dtype=F64)
    for seed in range(5):
        x = random(6, seed=seed, scale=scale)
        found = jacrev(lambda x: projection_box_section(x, 0.0, 1.0, ones, 1.0))(x)
        assert torch.allclose(projection_box_section(x, 0.0, 1.0, ones, 1.0), projection_simplex(x), atol=TOL)
        assert torch.allclose(found, jacrev(projection_simplex)(x), atol=TOL)


def test_section_derivatives_in_all_arguments():
    low, high, w, c = torch.tensor(-1.0, dtype=F64), torch.full((5,), 1.2, dtype=F64), random(5, seed=2), 0.3
    args = torch.tensor([0.5, 0.3, 0.4, 3.0, -3.0], dtype=F64), low, high, w, torch.tensor(c, dtype=F64)
    check_jacobians(projection_box_section, *args)
    lanes = [section(seed, 4) for seed in range(6)]
    check_lanes(projection_box_section, random(6, 4), *(torch.stack(part) for part in zip(*lanes, strict=True)))


def test_unbounded_sections_are_hyperplanes():
    x, w = random(4), random(4, seed=1)
    found = projection_box_section(x, -torch.inf, torch.inf, w, 0.5)
    assert torch.allclose(found, x - (w @ x - 0.5) / (w @ w) * w, atol=TOL)
    p = projection_box_section(x, 0.0, torch.inf, torch.ones(4, dtype=F64), 1.0)
    assert torch.allclose(p, projection_simplex(x), atol=TOL)


def test_a_section_at_a_corner_is_that_corner():
    ones = torch.ones(3, dtype=F64)
    assert torch.allclose(projection_box_section(random(3), 0.0, 1.0, ones, 3.0), ones, atol=TOL)
    assert jacrev(lambda c: projection_box_section(random(3), 0.0, 1.0, ones, c))(3 * ones[0]).isfinite().all()


def test_what_is_refused():
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"`lower` must be at most `upper`; got 1.0 and 0.0.*swapped"):
        projection_box(x, 1.0, 0.0)
    with pytest.raises(ValueError, match="`lower` must be at most `upper`"):
        projection_box(x, torch.tensor([0.0, 2.0, 0.0]), 1.0)
    with pytest.raises(ValueError, match="`lower` must be at most `upper`"):
        vmap(lambda low: projection_box(x, low, 1.0))(torch.tensor([0.0, 2.0]))
    with pytest.raises(ValueError, match=r"`upper` must broadcast to the shape \(3,\)"):
        projection_box(x, 0.0, torch.ones(2))
    with pytest.raises(ValueError, match="must have the structure"):
        projection_box(x, 0.0, {"a": x})
    with pytest.raises(ValueError, match="no point of the box has"):
        projection_box_section(x, 0.0, 1.0, x, 3.5)
    with pytest.raises(ValueError, match=r"`w` must have shape \(3,\)"):
        projection_box_section(x, 0.0, 1.0, torch.ones(2), 1.0)
