"""diffopt.solvers.admm: the same minimizers as proximal gradient descent, in fewer steps."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from diffopt.convex import projection_l2_ball, prox_lasso
from diffopt.implicit import Unrolled
from diffopt.linalg import CG, Dense
from diffopt.solvers import ADMM, LBFGS, Objective, ProximalGradient, minimize

F64 = torch.float64
TIGHT = {"rtol": 0.0, "atol": 1e-9}
SOLVERS = [ADMM(), ADMM(linear_solver=Dense()), ADMM(3.0, 1.0, 0, linear_solver=CG(rtol=1e-13))]


def problem(n=20, d=6):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, d, dtype=F64, generator=generator) * torch.logspace(0, 0.6, d, dtype=F64)
    return X, torch.randn(n, dtype=F64, generator=generator) * 3


X, Y = problem()


def lasso(lam, y=Y, **options):
    return minimize(
        lambda w, y: ((X @ w - y) ** 2).mean() / 2, torch.zeros(6, dtype=F64), (y,),
        prox=lambda w, s: prox_lasso(w, lam, s), **options,
    )  # fmt: skip


LAM = torch.tensor(0.4, dtype=F64)


@pytest.mark.parametrize("solver", SOLVERS)
def test_lasso_and_its_derivatives_are_those_of_proximal_gradient(solver):
    reference = lasso(LAM, solver=ProximalGradient(), **TIGHT)
    ours = lasso(LAM, solver=solver, **TIGHT)
    assert torch.allclose(ours.value, reference.value, atol=1e-8)
    assert torch.equal(ours.value == 0, reference.value == 0)
    for jacobian in (jacrev, jacfwd):
        there = jacobian(lambda lam: lasso(lam, **TIGHT).value)(LAM)
        assert torch.allclose(jacobian(lambda lam: lasso(lam, solver=solver, **TIGHT).value)(LAM), there, atol=1e-8)


def test_unrolled_agrees_with_implicit():
    solver = ADMM(linear_solver=Dense())
    implicit = jacrev(lambda lam: lasso(lam, solver=solver).value)(LAM)
    for adjoint, tol in ((Unrolled(), 1e-6), (Unrolled(checkpoint="sqrt"), 1e-6), (Unrolled(truncate=60), 1e-3)):
        unrolled = jacrev(lambda lam, a=adjoint: lasso(lam, solver=solver, adjoint=a, **TIGHT).value)(LAM)
        assert torch.allclose(unrolled, implicit, atol=tol)
    inner = jacrev(lambda lam: lasso(lam, solver=ADMM(), adjoint=Unrolled(), **TIGHT).value)(LAM)
    assert torch.allclose(inner, implicit, atol=1e-4)
    with pytest.raises(ValueError, match="truncate"):
        lasso(LAM, solver=ADMM(), adjoint=Unrolled(truncate=2))


def test_bounds_and_projections():
    loss = lambda w: ((X @ w - Y) ** 2).mean() / 2  # noqa: E731
    for kind in ({"bounds": (-0.05, 0.1)}, {"projection": lambda w: projection_l2_ball(w, 0.2)}):
        ours = minimize(loss, torch.ones(6, dtype=F64), solver=ADMM(), **kind, **TIGHT).value
        there = minimize(loss, torch.ones(6, dtype=F64), solver=ProximalGradient(), max_steps=5000, **kind, **TIGHT)
        assert torch.allclose(ours, there.value, atol=1e-7)


def test_a_loss_that_is_not_quadratic():
    loss = lambda w: torch.nn.functional.softplus(-X @ w * Y.sign()).mean()  # noqa: E731

    def solve(lam, **options):
        prox = lambda w, s: prox_lasso(w, lam, s)  # noqa: E731
        return minimize(loss, torch.zeros(6, dtype=F64), prox=prox, **options, **TIGHT).value

    lam = 0.02 * torch.ones((), dtype=F64)
    reference = solve(lam, solver=ProximalGradient(), max_steps=9999)
    assert (reference != 0).any()
    for solver in (ADMM(), ADMM(linear_solver=Dense())):
        assert torch.allclose(solve(lam, solver=solver), reference, atol=1e-6)


def test_vmap_equals_the_loop():
    ys = torch.stack([Y, 2 * Y + 1])
    solve = lambda y: lasso(LAM, y, solver=ADMM(linear_solver=Dense())).value  # noqa: E731
    assert torch.allclose(vmap(solve)(ys), torch.stack([solve(y) for y in ys]), atol=1e-10)
    slope = grad(lambda y: solve(y).sum())
    assert torch.allclose(vmap(slope)(ys), torch.stack([slope(y) for y in ys]), atol=1e-10)


def test_the_penalty_is_balanced():
    for start in (1e-3, 1e3):
        assert lasso(LAM, solver=ADMM(start, linear_solver=Dense())).stats.steps < 100


def test_stepping_by_hand_equals_minimize():
    solver = ADMM()
    objective = Objective(lambda w: ((X @ w - Y) ** 2).mean() / 2, prox=lambda w, s: prox_lasso(w, LAM, s))
    state = solver.init(objective, torch.zeros(6, dtype=F64))
    for _ in range(4):
        state = solver.step(objective, state)
    for mine, its in zip(state, lasso(LAM, solver=solver, max_steps=4, throw=False).state, strict=True):
        assert torch.equal(mine, its)


def test_wrong_options_raise():
    with pytest.raises(ValueError, match="rho"):
        ADMM(rho=0.0)
    with pytest.raises(ValueError, match="adapt_steps"):
        ADMM(adapt_steps=-1)
    with pytest.raises(ValueError, match="relaxation"):
        ADMM(relaxation=2.0)
    with pytest.raises(TypeError, match="inner solver"):
        ADMM(solver=LBFGS)
    with pytest.raises(TypeError, match="linear_solver"):
        ADMM(linear_solver=Dense)
