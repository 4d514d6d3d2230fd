"""diffopt.convex.proxes: each against what it minimizes, with derivatives in all hyperparameters, and at kinks."""

import importlib
import pkgutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.func import hessian, jacfwd, jacrev, vmap

from convex.checks import F64, TOL, check_jacobians, check_lanes, random, uniform
from diffopt import convex
from diffopt.convex import (
    projection_simplex,
    prox_elastic_net,
    prox_from_projection,
    prox_group_lasso,
    prox_lasso,
    prox_non_negative_lasso,
    prox_non_negative_ridge,
    prox_none,
    prox_nuclear,
    prox_ridge,
)

LAM, GAMMA, S = 0.4, 0.7, 0.8


def infinite_below(y):
    return torch.where((y < 0).any(), torch.inf, 0.0)


# the proxes, their penalties g, and their hyperparameters
PROXES = {
    "none": (prox_none, lambda y: 0 * y.sum(), ()),
    "lasso": (prox_lasso, lambda y, lam: lam * y.abs().sum(), (LAM,)),
    "ridge": (prox_ridge, lambda y, lam: lam / 2 * (y * y).sum(), (LAM,)),
    "elastic net": (
        prox_elastic_net,
        lambda y, lam, gamma: lam * (y.abs().sum() + gamma / 2 * (y * y).sum()),
        (LAM, GAMMA),
    ),
    "group lasso": (prox_group_lasso, lambda y, lam: lam * y.norm(), (LAM,)),
    "non-negative lasso": (prox_non_negative_lasso, lambda y, lam: lam * y.abs().sum() + infinite_below(y), (LAM,)),
    "non-negative ridge": (prox_non_negative_ridge, lambda y, lam: lam / 2 * (y * y).sum() + infinite_below(y), (LAM,)),
    "nuclear": (prox_nuclear, lambda y, lam: lam * torch.linalg.matrix_norm(y, "nuc"), (LAM,)),
}


def point(name, seed=0):
    return random(4, 3, seed=seed) if name == "nuclear" else random(5, seed=seed)


def objective(x, y, penalty, hyper):
    return ((y - x) ** 2).sum() / 2 + S * penalty(y, *hyper)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(PROXES)), st.integers(0, 10_000))
def test_no_point_near_by_is_better(name, seed):
    prox, penalty, hyper = PROXES[name]
    x = point(name, seed)
    p = prox(x, *hyper, scaling=S)
    least = objective(x, p, penalty, hyper)
    for k in range(20):
        y = p + 10.0 ** -(k % 5) * random(*p.shape, seed=seed + k + 1)
        for other in (y, y.clamp(min=0)):
            assert objective(x, other, penalty, hyper) >= least - TOL


@pytest.mark.parametrize("name", ["ridge", "elastic net", "group lasso"])
def test_against_scipy(name):
    prox, penalty, hyper = PROXES[name]
    x = point(name)
    found = minimize(
        lambda y: objective(x, torch.from_numpy(y), penalty, hyper).item(),
        np.ones(5),
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-15, "maxiter": 20_000, "maxfev": 20_000, "adaptive": True},
    )
    assert np.allclose(prox(x, *hyper, scaling=S).numpy(), found.x, atol=1e-5)  # Nelder and Mead's own accuracy


@pytest.mark.parametrize("name", PROXES)
def test_derivatives_in_the_point_the_hyperparameters_and_the_scaling(name):
    prox, _, hyper = PROXES[name]
    tensors = [torch.tensor(h, dtype=F64) for h in (*hyper, S)]
    check_jacobians(prox, point(name), *tensors)
    points = torch.stack([point(name, seed) for seed in range(5)])
    check_lanes(prox, points, *(h * (0.5 + uniform(5, seed=i)) for i, h in enumerate(tensors)))


@pytest.mark.parametrize("name", PROXES)
def test_kinks_are_finite(name):
    prox, _, hyper = PROXES[name]
    x = point(name)
    kinks = [0 * x, torch.full_like(x, LAM * S), x * (LAM * S / x.norm())]

    def shrunk(x):
        return prox(x, *hyper, scaling=S)

    for derivative in (jacrev(shrunk), jacfwd(shrunk), hessian(lambda x: (shrunk(x) ** 2).sum())):
        assert all(derivative(x).isfinite().all() for x in kinks)


@pytest.mark.parametrize("name", sorted(set(PROXES) - {"nuclear", "group lasso"}))
def test_trees_and_hyperparameters_of_every_form(name):
    prox, _, hyper = PROXES[name]
    x = {"a": random(2, 3), "b": random(3, seed=1)}
    expected = {k: prox(v, *hyper, scaling=S) for k, v in x.items()}
    forms = [hyper, tuple(torch.full((3,), h, dtype=F64) for h in hyper), tuple({"a": h, "b": h} for h in hyper)]
    for form in forms:
        found = prox(x, *form, scaling=torch.tensor(S, dtype=F64))
        assert all(torch.allclose(found[k], expected[k], rtol=TOL) for k in x)


def test_group_lasso_of_rows():
    rows = torch.cat([random(3, 4), torch.zeros(1, 4, dtype=F64), 0.01 * random(1, 4)])
    found = vmap(lambda row: prox_group_lasso(row, LAM))(rows)
    norms = rows.norm(dim=1, keepdim=True)
    assert torch.allclose(found[:3], (rows * (1 - LAM / norms))[:3], rtol=TOL)
    assert (found[3:] == 0).all()
    assert (jacrev(lambda r: vmap(lambda row: prox_group_lasso(row, LAM))(r))(rows)[3:] == 0).all()


@pytest.mark.parametrize("values", [[2.0, 2.0, 0.1], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.5, 0.8, 0.1]])
def test_nuclear_with_repeated_singular_values(values):
    U, V = (torch.linalg.qr(random(n, 3, seed=n))[0] for n in (5, 3))
    sigma = torch.tensor(values, dtype=F64)
    X = U @ torch.diag(sigma) @ V.T
    expected = U @ torch.diag((sigma - LAM * S).clamp(min=0)) @ V.T
    assert torch.allclose(prox_nuclear(X, LAM, S), expected, atol=TOL)
    lam = torch.tensor(LAM, dtype=F64)
    check_jacobians(lambda X, lam: prox_nuclear(X, lam, S), X, lam)
    weights, H = random(5, 3, seed=2), random(5, 3, seed=3)

    def slope(X):
        return jacrev(lambda X: (weights * prox_nuclear(X, LAM, S).sin()).sum())(X)

    differences = (slope(X + 1e-6 * H) - slope(X - 1e-6 * H)) / 2e-6
    for derivative in (jacrev, jacfwd):
        assert torch.allclose((derivative(slope)(X) * H).sum((-2, -1)), differences, atol=1e-7)


def test_nuclear_gives_low_rank_exactly():
    X = random(6, 4)
    values = torch.linalg.svdvals(X)
    found = prox_nuclear(X, (values[1] + values[2]) / 2)
    assert torch.linalg.matrix_rank(found, rtol=1e-12) == 2


def test_from_projection_ignores_the_scaling():
    prox = prox_from_projection(lambda x: projection_simplex(x, 2.0))
    x = random(4)
    assert torch.equal(prox(x, 0.1), projection_simplex(x, 2.0))
    assert torch.equal(prox(x, scaling=3.0), prox(x))
    with pytest.raises(TypeError, match="`projection` must be a function of the point"):
        prox_from_projection(x)


def test_a_vanishing_strength_changes_nothing():
    for name, (prox, _, hyper) in PROXES.items():
        x = point(name).abs()
        assert torch.allclose(prox(x, *(0.0 for _ in hyper), scaling=S), x, atol=TOL)


@pytest.mark.parametrize("name", sorted(set(PROXES) - {"none"}))
def test_what_is_refused(name):
    prox, _, hyper = PROXES[name]
    x = point(name)
    with pytest.raises(ValueError, match="must be at least 0"):
        prox(x, *(-1.0 for _ in hyper))
    with pytest.raises(ValueError, match="`scaling` must be at least 0"):
        prox(x, scaling=-1.0)
    with pytest.raises(TypeError, match="floating-point"):
        prox(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must broadcast|must be a number or a 0-d tensor"):
        prox(x, torch.ones(7, dtype=F64))


def test_every_public_function_is_exported():
    files = [importlib.import_module(f"diffopt.convex.{found.name}") for found in pkgutil.iter_modules(convex.__path__)]
    public = {name for file in files for name in file.__all__ if name.startswith(("projection_", "prox_", "kl_"))}
    assert len(convex.__all__) == len(set(convex.__all__))
    assert set(convex.__all__) == public | {"ProjectionError", "isotonic_regression"}
