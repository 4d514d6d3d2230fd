"""diffopt.solvers.proximal_gradient: scikit-learn's problems, their derivatives, bounds, projections."""

import numpy as np
import pytest
import scipy.optimize
import sklearn.linear_model
import torch
from sklearn.datasets import make_classification, make_regression
from sklearn.svm import LinearSVC
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from diffopt.convex import (
    projection_box_section,
    projection_l2_ball,
    projection_non_negative,
    projection_simplex,
    prox_elastic_net,
    prox_group_lasso,
    prox_lasso,
)
from diffopt.implicit import Unrolled
from diffopt.solvers import Objective, ProximalGradient, SolverError, minimize
from solvers.standard_problems import f64

F64 = torch.float64
STEP = 1e-5  # of central differences


def regression(n=10, d=3, **options):
    return [torch.as_tensor(a, dtype=F64) for a in make_regression(n, d, random_state=0, **options)[:2]]


def half_mean(X, y):
    return lambda w, *_: ((X @ w - y) ** 2).mean() / 2


def differences(fn, x):
    return (fn(x + STEP) - fn(x - STEP)) / (2 * STEP)


def lasso(lam, start=None, **options):
    X, y = regression()
    start = torch.zeros(3, dtype=F64) if start is None else start
    return minimize(half_mean(X, y), start, prox=lambda w, s: prox_lasso(w, lam, s), **options)


def test_lasso_against_scikit_learn_and_finite_differences():
    X, y = regression()
    lam = f64(10.0)[0]
    theirs = sklearn.linear_model.Lasso(alpha=10.0, fit_intercept=False, tol=1e-12).fit(X, y).coef_
    assert np.allclose(lasso(lam).value, theirs, atol=1e-6)
    there = differences(lambda lam: lasso(lam, rtol=1e-14, atol=1e-10).value, lam)
    for jacobian in (jacrev, jacfwd):
        assert torch.allclose(jacobian(lambda lam: lasso(lam).value)(lam), there, atol=1e-6)


def test_the_derivative_of_lasso_knows_the_support():
    X, y = regression(20, 8, n_informative=3, noise=5.0)
    lam = f64(12.0)[0]

    def solve(lam):
        return minimize(half_mean(X, y), torch.zeros(8, dtype=F64), prox=lambda w, s: prox_lasso(w, lam, s)).value

    w = solve(lam)
    on = w != 0
    assert 0 < on.sum() < 8
    expected = torch.zeros_like(w)
    expected[on] = -torch.linalg.solve(X[:, on].T @ X[:, on] / 20, w[on].sign())
    assert torch.allclose(jacrev(solve)(lam), expected, atol=1e-8)


def test_elastic_net_against_scikit_learn_and_unrolled():
    X, y = regression()
    lam, gamma = f64(2.0, 0.8)

    def solve(lam, gamma, **options):
        prox = lambda w, s: prox_elastic_net(w, lam, gamma, s)  # noqa: E731
        return minimize(half_mean(X, y), torch.zeros(3, dtype=F64), prox=prox, **options).value

    theirs = sklearn.linear_model.ElasticNet(
        alpha=2.0 * 1.8, l1_ratio=1 / 1.8, fit_intercept=False, tol=1e-12
    ).fit(X, y).coef_  # fmt: skip
    assert np.allclose(solve(lam, gamma), theirs, atol=1e-5)
    unrolled = jacrev(lambda *a: solve(*a, adjoint=Unrolled()), argnums=(0, 1))(lam, gamma)
    for ours, its in zip(jacrev(solve, argnums=(0, 1))(lam, gamma), unrolled, strict=True):
        assert torch.allclose(ours, its, atol=1e-5)


def test_group_lasso_against_multi_task_lasso():
    rng = np.random.RandomState(0)
    X, W = rng.randn(50, 10), np.zeros((10, 3))
    W[:4] = rng.randn(4, 3)
    Y = X @ W + 0.1 * rng.randn(50, 3)
    theirs = sklearn.linear_model.MultiTaskLasso(alpha=0.3, fit_intercept=False, tol=1e-10).fit(X, Y).coef_.T
    X, Y = torch.as_tensor(X), torch.as_tensor(Y)

    def solve(lam):
        prox = lambda W, s: vmap(lambda row: prox_group_lasso(row, lam, s))(W)  # noqa: E731
        return minimize(lambda W: ((X @ W - Y) ** 2).sum() / 100, torch.zeros(10, 3, dtype=F64), prox=prox).value

    lam = f64(0.3)[0]
    assert np.allclose(solve(lam), theirs, atol=1e-5)
    assert torch.allclose(jacrev(solve)(lam), differences(solve, lam), atol=1e-3)


def test_non_negative_least_squares():
    X, y = regression(10, 5)
    y = y - 2 * X[:, 0] * y.abs().mean()
    loss = lambda w, y: ((X @ w - y) ** 2).sum() / 2  # noqa: E731
    theirs, _ = scipy.optimize.nnls(X.numpy(), y.numpy())
    assert (theirs == 0).any()

    def solve(y, **kind):
        return minimize(loss, torch.ones(5, dtype=F64), (y,), **kind).value

    by_projection = solve(y, projection=projection_non_negative)
    by_bounds = solve(y, bounds=(0.0, None), solver=ProximalGradient())
    assert np.allclose(by_projection, theirs, atol=1e-6)
    assert torch.allclose(by_bounds, by_projection, atol=1e-8)
    on = torch.as_tensor(theirs) > 0
    expected = torch.zeros(5, 10, dtype=F64)
    expected[on] = torch.linalg.pinv(X[:, on])
    for kind in ({"projection": projection_non_negative}, {"bounds": (0.0, None), "solver": ProximalGradient()}):
        assert torch.allclose(jacrev(lambda y, kind=kind: solve(y, **kind))(y), expected, atol=1e-8)


def test_projected_gradient_on_the_l2_ball_and_its_radius():
    X, y = regression()

    def solve(r, **options):
        ball = lambda w: projection_l2_ball(w, r)  # noqa: E731
        return minimize(half_mean(X, y), torch.zeros(3, dtype=F64), projection=ball, **options).value

    r = f64(0.1)[0]
    w = solve(r)
    assert torch.allclose(w.norm(), r)
    there = differences(lambda r: solve(r, rtol=1e-13, atol=1e-11), r)
    assert torch.allclose(jacrev(solve)(r), there, rtol=1e-5)
    second = differences(jacrev(lambda r: solve(r, rtol=1e-13, atol=1e-11)), r)
    assert torch.allclose(hessian(lambda r: solve(r, rtol=1e-13))(r), second, rtol=1e-3)


def test_the_dual_of_a_support_vector_machine():
    X, labels = make_classification(20, 4, random_state=1)
    theirs = LinearSVC(loss="hinge", dual=True, fit_intercept=False, C=0.5, tol=1e-10, max_iter=100000, random_state=0)
    theirs = theirs.fit(X, labels).coef_[0]
    X, sign = torch.as_tensor(X), torch.as_tensor(2.0 * labels - 1)

    def primal(C):
        loss = lambda a: ((X.T @ (a * sign)) ** 2).sum() / 2 - a.sum()  # noqa: E731
        a = minimize(loss, torch.zeros(20, dtype=F64), projection=lambda a: a.clamp(min=0).minimum(C)).value
        return X.T @ (a * sign)

    assert np.allclose(primal(f64(0.5)[0]), theirs, atol=1e-5)


def test_the_multiclass_dual_on_the_simplex():
    X, labels = make_classification(20, 5, n_informative=3, n_classes=3, random_state=0)
    X, Y = torch.as_tensor(X), torch.nn.functional.one_hot(torch.as_tensor(labels), 3).double()

    def loss(B, lam):
        V = X.T @ (Y - B)
        return (V * V).sum() / (2 * lam) + (B * Y).sum()

    def solve(lam):
        rows = lambda B: vmap(projection_simplex)(B)  # noqa: E731
        return X.T @ (Y - minimize(loss, torch.ones(20, 3, dtype=F64) / 3, (lam,), projection=rows).value) / lam

    lam = f64(10.0)[0]
    W = solve(lam)
    assert W.isfinite().all()
    assert torch.allclose(jacfwd(solve)(lam), differences(solve, lam), atol=1e-5)


def test_a_box_section_is_a_simplex():
    c = f64(0.3, 0.1, -0.4)
    loss = lambda x: ((x - c) ** 2).sum()  # noqa: E731
    section = lambda x: projection_box_section(x, torch.zeros(3, dtype=F64), 1.0, torch.ones(3, dtype=F64), 1.0)  # noqa: E731
    start = torch.ones(3, dtype=F64) / 3
    ours = minimize(loss, start, projection=section).value
    assert torch.allclose(ours, minimize(loss, start, projection=projection_simplex).value)


def test_vmap_equals_the_loop():
    lams = f64(0.5, 10.0, 200.0)
    both = vmap(lambda lam: lasso(lam).value)(lams)
    assert torch.allclose(both, torch.stack([lasso(lam).value for lam in lams]), atol=1e-8)
    steps = vmap(lambda lam: lasso(lam).stats.steps)(lams)
    assert steps.tolist() == [int(lasso(lam).stats.steps) for lam in lams]
    slopes = vmap(grad(lambda lam: lasso(lam).value.sum()))(lams)
    assert torch.allclose(slopes, torch.stack([grad(lambda lam: lasso(lam).value.sum())(lam) for lam in lams]))


@pytest.mark.parametrize("solver", [ProximalGradient(), ProximalGradient(accelerate=False), ProximalGradient(0.5)])
def test_stepping_by_hand_equals_minimize(solver):
    X, y = regression()
    objective = Objective(half_mean(X, y), prox=lambda w, s: prox_lasso(w, 10.0, s))
    state = solver.init(objective, torch.zeros(3, dtype=F64))
    for _ in range(7):
        state = solver.step(objective, state)
    ours = lasso(10.0, solver=solver, max_steps=7, throw=False)
    assert torch.equal(state.x, ours.state.x)
    assert torch.equal(state.residual, ours.state.residual)


def test_step_sizes_by_backtracking_stay_under_the_curvature():
    loss = lambda x: 500 * (x**2).sum()  # noqa: E731
    found = minimize(loss, torch.ones(3, dtype=F64), projection=lambda x: x.clamp(min=0.5), solver=ProximalGradient())
    assert found.state.step_size <= 1 / 500
    assert torch.equal(found.value, torch.full((3,), 0.5, dtype=F64))


def test_acceleration_helps_where_the_problem_is_ill_conditioned():
    scale = torch.logspace(0, 2.5, 6, dtype=F64)
    loss = lambda x: (scale * (x - 1) ** 2).sum()  # noqa: E731
    steps = [
        minimize(loss, torch.zeros(6, dtype=F64), bounds=(0, 2), solver=ProximalGradient(accelerate=a), max_steps=5000)
        .stats.steps for a in (True, False)
    ]  # fmt: skip
    assert steps[0] < steps[1] / 2


def test_a_step_size_carries_gradient_when_unrolled():
    run = lambda size: lasso(  # noqa: E731
        10.0, solver=ProximalGradient(size), adjoint=Unrolled(), max_steps=5, throw=False
    ).state.x.sum()
    size = f64(0.1)[0]
    value = lambda size: lasso(  # noqa: E731
        10.0, solver=ProximalGradient(size), adjoint=Unrolled(), max_steps=5, throw=False
    ).value.sum()
    assert torch.allclose(grad(value)(size), differences(run, size), rtol=1e-4)


def test_wrong_options_and_failures_raise():
    with pytest.raises(ValueError, match="step_size"):
        ProximalGradient(0.0)
    with pytest.raises(ValueError, match="max_backtracks"):
        ProximalGradient(max_backtracks=0)
    with pytest.raises(SolverError, match="max_steps"):
        lasso(10.0, max_steps=2)
    wrong = lambda x: torch.where(x.detach().sum() == x.sum(), (x * 0 - x).sum(), x.sum()) + (x.detach() * 2).sum()  # noqa: E731
    found = minimize(
        wrong, torch.ones(2, dtype=F64), projection=lambda x: x.clamp(min=-9), solver=ProximalGradient(), throw=False
    )
    assert not bool(found.converged), "a derivative that does not descend"


def test_a_flat_piece_outside_of_the_domain_is_no_solution():
    fn = lambda x: torch.where(x > 2, torch.nan, (x - 3) ** 2).sum()  # noqa: E731
    found = minimize(fn, torch.ones(2), solver=ProximalGradient(), throw=False)
    assert int(found.result) != 0
    assert (found.value <= 2).all()
