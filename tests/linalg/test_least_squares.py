"""diffopt.linalg.least_squares: against NumPy, the pseudo-inverse and finite differences, at every shape and rank."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from diffopt.linalg import (
    CG,
    LSMR,
    LU,
    QR,
    SVD,
    LinearSolveError,
    function_operator,
    jacobian_operator,
    linear_solve,
    lstsq,
    matrix_operator,
)
from diffopt.linalg.least_squares import _automatic
from diffopt.testing import check_hypergradient

F64 = torch.float64
SOLVERS = {"QR": QR(), "SVD": SVD(), "LSMR": LSMR(rtol=1e-14)}
SHAPES = {"tall": (7, 4), "wide": (4, 7), "square": (5, 5), "row": (1, 3), "column": (3, 1), "single": (1, 1)}
TOL = 1e-9


def problem(m, n, seed=0, rank=None):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(m, n, dtype=F64, generator=generator)
    if rank is not None:
        A = torch.randn(m, rank, dtype=F64, generator=generator) @ torch.randn(rank, n, dtype=F64, generator=generator)
    return A, torch.randn(m, dtype=F64, generator=generator)


def close(a, b):
    return torch.allclose(a, b, rtol=TOL, atol=TOL)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 15), st.integers(1, 15), st.integers(0, 1000), st.sampled_from(sorted(SOLVERS)))
def test_solutions_are_those_of_numpy(m, n, seed, name):
    A, b = problem(m, n, seed)
    if torch.linalg.cond(A) > 1e4:
        return
    expected = torch.from_numpy(np.linalg.lstsq(A.numpy(), b.numpy(), rcond=None)[0])
    assert torch.allclose(lstsq(A, b, SOLVERS[name]), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_are_those_of_the_pseudo_inverse(name, shape):
    A, b = problem(*SHAPES[shape])

    def ours(A, b):
        return lstsq(A, b, SOLVERS[name])

    def theirs(A, b):
        A_plus = torch.linalg.inv(A.mT @ A) @ A.mT if len(A) >= A.shape[1] else A.mT @ torch.linalg.inv(A @ A.mT)
        return A_plus @ b

    for derivative in (jacrev, jacfwd):
        for found, expected in zip(derivative(ours, (0, 1))(A, b), derivative(theirs, (0, 1))(A, b), strict=True):
            assert close(found, expected)
    second = hessian(lambda A: ours(A, b).sin().sum())(A)
    assert torch.allclose(second, hessian(lambda A: theirs(A, b).sin().sum())(A), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["SVD", "LSMR"])
@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
def test_deficient_ranks_have_the_least_norm_and_the_derivative_of_golub_and_pereyra(name, shape):
    m, n = SHAPES[shape]
    A, b = problem(m, n, 1, rank=2)
    found = lstsq(A, b, SOLVERS[name])
    assert close(found, torch.linalg.pinv(A, rtol=1e-9) @ b)
    generator = torch.Generator().manual_seed(9)
    left, right = (torch.randn(k, k, dtype=F64, generator=generator) / 4 for k in (m, n))

    def along(solve):
        """A path of matrices of rank two, along which the pseudo-inverse is smooth."""
        return lambda t: solve(torch.linalg.matrix_exp(t * left) @ A @ torch.linalg.matrix_exp(t * right), b)

    ours = along(lambda A, b: lstsq(A, b, SOLVERS[name]))
    theirs = along(lambda A, b: torch.linalg.pinv(A, rtol=1e-9) @ b)
    t = torch.tensor(0.3, dtype=F64)
    differences = (theirs(t + 1e-5) - theirs(t - 1e-5)) / 2e-5
    assert torch.allclose(jacrev(ours)(t), differences, rtol=1e-6, atol=1e-7)
    assert torch.allclose(jacfwd(ours)(t), differences, rtol=1e-6, atol=1e-7)
    slopes = (jacrev(ours)(t + 1e-4) - jacrev(ours)(t - 1e-4)) / 2e-4
    for second in (jacfwd(jacrev(ours)), jacrev(jacfwd(ours)), jacfwd(jacfwd(ours)), jacrev(jacrev(ours))):
        assert torch.allclose(second(t), slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_are_the_finite_differences(name):
    for shape in ("tall", "wide"):
        check_hypergradient(lambda A, b: lstsq(A, b, SOLVERS[name]).sin().sum(), problem(*SHAPES[shape], 3))
    damping = torch.tensor(0.7, dtype=F64)
    check_hypergradient(lambda A, b, t: lstsq(A, b, SOLVERS[name], damping=t).sin().sum(), (*problem(4, 6, 4), damping))


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_damping_is_ridge_regression(name, shape):
    A, b = problem(*SHAPES[shape], 2)
    eye = torch.eye(A.shape[1], dtype=F64)

    def ridge(t):
        return torch.linalg.inv(A.mT @ A + t * eye) @ (A.mT @ b)

    x, stats = lstsq(A, b, SOLVERS[name], damping=0.5, has_aux=True)
    assert close(x, ridge(0.5))
    assert close(stats.residual, (b - A @ x).norm() / b.norm())
    assert x.shape == (A.shape[1],)
    ts = torch.tensor([0.3, 2.0], dtype=F64)
    ours = lambda t: lstsq(A, b, SOLVERS[name], damping=t)  # noqa: E731
    for derivative in (lambda f: f, jacrev, jacfwd, lambda f: jacfwd(jacrev(f))):
        assert close(vmap(derivative(ours))(ts), vmap(derivative(ridge))(ts))
    deficient, side = problem(5, 5, 6, rank=2)  # damped, any rank will do
    expected = torch.linalg.inv(deficient.mT @ deficient + 0.5 * torch.eye(5, dtype=F64)) @ (deficient.mT @ side)
    assert close(lstsq(deficient, side, SOLVERS[name], damping=0.5), expected)


@pytest.mark.parametrize("name", SOLVERS)
def test_vmap_equals_the_loop(name):
    As = torch.stack([problem(6, 3, seed)[0] for seed in range(3)])
    b = problem(6, 3)[1]
    run = lambda A: lstsq(A, b, SOLVERS[name], has_aux=True)  # noqa: E731
    x, stats = vmap(run)(As)
    loop = [run(A) for A in As]
    assert close(x, torch.stack([one for one, _ in loop]))
    assert stats.steps.tolist() == [s.steps.item() for _, s in loop]
    assert close(vmap(jacrev(lambda A: run(A)[0]))(As), torch.stack([jacrev(lambda A: run(A)[0])(A) for A in As]))


def test_several_right_sides_are_solved_one_by_one():
    A, _ = problem(6, 3)
    B = torch.stack([problem(6, 3, seed)[1] for seed in range(4)], 1)
    for name, solver in SOLVERS.items():
        x, stats = lstsq(A, B, solver, has_aux=True)
        assert close(x, torch.linalg.pinv(A) @ B), name
        assert stats.converged.shape == stats.residual.shape == stats.steps.shape == (4,)
        assert close(stats.residual, (A @ x - B).norm(dim=0) / B.norm(dim=0))
    assert close(lstsq(A, B[:, :1]), torch.linalg.pinv(A) @ B[:, :1])
    assert lstsq(A, B[:, :0]).shape == (3, 0)
    found = jacrev(lambda A: lstsq(A, B))(A)
    assert close(found, jacrev(lambda A: torch.linalg.inv(A.mT @ A) @ A.mT @ B)(A))


def test_trees_and_operators():
    A, b = problem(5, 3)
    op = matrix_operator(A, domain={"p": b[:2], "q": b[:1]}, codomain=(b[:1], b[1:]))
    found = lstsq(op, (b[:1], b[1:]))
    assert close(torch.cat([found["p"], found["q"]]), torch.linalg.pinv(A) @ b)
    by_products = function_operator(lambda A, v: A @ v, A, b[:3])
    for solver in SOLVERS.values():
        assert close(lstsq(by_products, b, solver), torch.linalg.pinv(A) @ b)
        assert close(lstsq(by_products.transpose(), b[:3], solver), torch.linalg.pinv(A.mT) @ b[:3])


def test_a_gauss_newton_step():
    t = torch.linspace(0, 1, 20, dtype=F64)
    y = 2 * torch.exp(-1.5 * t)

    def residual(p):
        return p[0] * torch.exp(-p[1] * t) - y

    p = torch.tensor([1.8, 1.3], dtype=F64)
    for _ in range(6):
        p = p - lstsq(jacobian_operator(residual, p), residual(p))
    assert close(p, torch.tensor([2.0, 1.5], dtype=F64))


def test_zero_right_sides_and_nothing_to_solve():
    A, b = problem(4, 3)
    for solver in SOLVERS.values():
        x, stats = lstsq(A, 0 * b, solver, has_aux=True)
        assert torch.equal(x, torch.zeros(3, dtype=F64))
        assert stats.converged
        assert stats.residual == 0
        assert close(jacrev(lambda b: lstsq(A, b, solver))(0 * b), torch.linalg.pinv(A))  # noqa: B023
    assert lstsq(A[:0], b[:0]).tolist() == [0.0] * 3
    assert lstsq(A[:, :0], b).shape == (0,)
    assert grad(lambda b: lstsq(A[:, :0], b).sum())(b).tolist() == [0.0] * 4


def test_which_solver_is_chosen():
    wide = function_operator(lambda _, v: v[:300].repeat(3), None, torch.ones(400, dtype=F64))
    assert isinstance(_automatic(wide), LSMR)
    assert isinstance(_automatic(matrix_operator(torch.ones(900, 400))), QR)
    assert isinstance(_automatic(function_operator(lambda _, v: v[:200], None, torch.ones(400))), QR)


def test_lsmr_starts_from_the_guess():
    A, b = problem(30, 20)
    x, cold = lstsq(A, b, LSMR(), has_aux=True)
    near, warm = lstsq(A, b, LSMR(), init=x * (1 + 1e-9), has_aux=True)
    assert warm.steps < cold.steps
    assert torch.allclose(near, x, rtol=1e-6)
    damped = lstsq(A.mT, b[:20], LSMR(rtol=1e-14), init=b, damping=0.3)
    assert close(damped, lstsq(A.mT, b[:20], damping=0.3))
    with pytest.raises(ValueError, match="init needs a tall or damped operator"):
        lstsq(A.mT, b[:20], LSMR(), init=b)


def test_qr_refuses_a_deficient_rank():
    for shape in ("tall", "wide"):
        A, b = problem(*SHAPES[shape], 1, rank=2)
        with pytest.raises(LinearSolveError, match=r"QR did not solve.*full rank.*use SVD\(\) or LSMR\(\)"):
            lstsq(A, b)
        assert lstsq(A, b, throw=False).isnan().all()


@pytest.mark.parametrize("name", SOLVERS)
def test_nan_raises_and_spares_the_other_lanes(name):
    A, b = problem(4, 3)
    for bad in ((A * torch.nan, b), (A, b * torch.nan)):
        with pytest.raises(LinearSolveError, match=f"{name} did not solve.*NaN"):
            lstsq(*bad, SOLVERS[name])
    found = vmap(lambda A: lstsq(A, b, SOLVERS[name], throw=False))(torch.stack([A, A * torch.nan]))
    assert close(found[0], torch.linalg.pinv(A) @ b)


A, B = problem(4, 3)
BAD = {
    "solver": (lambda: lstsq(A, B, CG()), TypeError, r"lstsq takes QR\(\), SVD\(\) or LSMR\(\); got CG"),
    "square solver": (lambda: lstsq(A, B, LU()), TypeError, "For square systems use linear_solve"),
    "class": (lambda: lstsq(A, B, QR), TypeError, "solver must be a linear solver"),
    "operator": (lambda: lstsq(3, B), TypeError, "takes a LinearOperator or a matrix; got int"),
    "size": (lambda: lstsq(A, B[:3]), ValueError, "b must have 4 elements; got 3"),
    "columns": (lambda: lstsq(A, torch.ones(3, 2, dtype=F64)), ValueError, "b must have 4 elements; got 6"),
    "dtype": (lambda: lstsq(A, B.float()), TypeError, "b must be torch.float64 on cpu"),
    "dtype of columns": (lambda: lstsq(A, torch.ones(4, 2)), TypeError, "b must be torch.float64 on cpu"),
    "negative": (lambda: lstsq(A, B, damping=-1.0), ValueError, "damping must not be negative; got -1.0"),
    "zero": (lambda: lstsq(A, B, damping=torch.tensor(0.0)), ValueError, "a tensor damping must be positive"),
    "vector": (lambda: lstsq(A, B, damping=B), TypeError, "damping must be a number or a 0-d tensor"),
    "init": (lambda: lstsq(A, B, LSMR(), init=B), ValueError, "init must have 3 elements; got 4"),
    "not square": (lambda: linear_solve(A, B), ValueError, r"needs a square operator; got shape \(4, 3\)\. Use lstsq"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_raise(case):
    run, error, message = BAD[case]
    with pytest.raises(error, match=message):
        run()
