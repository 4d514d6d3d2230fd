"""diffopt.linalg.factorizations: LU, Cholesky, QR and SVD against torch.linalg and SciPy."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import jacfwd, jacrev, vmap

from diffopt.linalg import LU, QR, SVD, Cholesky, LinearSolveError, function_operator, linear_solve, lstsq
from diffopt.linalg import matrix_operator as operator_of

F64 = torch.float64
SOLVERS = {"LU": LU(), "Cholesky": Cholesky(), "QR": QR(), "SVD": SVD()}
TAGS = ["positive_definite"]
TOL = 1e-10


def definite(n, seed):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, dtype=F64, generator=generator)
    return M @ M.T / n + torch.eye(n, dtype=F64), torch.randn(n, dtype=F64, generator=generator)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 20), st.integers(0, 1000), st.sampled_from(sorted(SOLVERS)))
def test_solutions_and_derivatives_are_those_of_scipy_and_the_inverse(n, seed, name):
    A, b = definite(n, seed)

    def solve(A, b):
        return linear_solve(operator_of(A, tags=TAGS), b, SOLVERS[name])

    x = torch.from_numpy(scipy.linalg.solve(A.numpy(), b.numpy()))
    assert torch.allclose(solve(A, b), x, rtol=TOL, atol=TOL)
    inverse = torch.linalg.inv(A)
    for derivative in (jacrev, jacfwd):
        by_A, by_b = derivative(solve, (0, 1))(A, b)
        assert torch.allclose(by_A, -torch.einsum("ij,k->ijk", inverse, x), rtol=TOL, atol=TOL)
        assert torch.allclose(by_b, inverse, rtol=TOL, atol=TOL)


@pytest.mark.parametrize("name", ["LU", "QR", "SVD"])
def test_unsymmetric_matrices_and_their_transposes(name):
    A = torch.tensor([[0.0, 2.0, 0.0], [-1.0, 0.0, 0.5], [0.3, 0.0, 1.0]], dtype=F64)
    b = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    assert torch.allclose(A @ linear_solve(A, b, SOLVERS[name]), b, rtol=TOL)
    assert torch.allclose(A.T @ linear_solve(operator_of(A).transpose(), b, SOLVERS[name]), b, rtol=TOL)
    by_products = function_operator(lambda A, v: A @ v, A, b)
    assert torch.allclose(A @ linear_solve(by_products, b, SOLVERS[name]), b, rtol=TOL)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("bad", ["zero", "rank one", "NaN", "inf"])
def test_singular_and_broken_matrices_raise_and_give_nan_without_throw(name, bad):
    A = {
        "zero": torch.zeros(3, 3, dtype=F64),
        "rank one": torch.ones(3, 3, dtype=F64),
        "NaN": torch.eye(3, dtype=F64) * torch.nan,
        "inf": torch.full((3, 3), torch.inf, dtype=F64),
    }[bad]
    b = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    causes = "singular|full rank|positive definite"
    with pytest.raises(LinearSolveError, match=f"{name} did not solve .*({causes}).*NaN.*throw=False"):
        linear_solve(operator_of(A, tags=TAGS), b, SOLVERS[name])
    assert not linear_solve(operator_of(A, tags=TAGS), b, SOLVERS[name], throw=False).isfinite().any()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_bad_lane_spares_the_others(name):
    A, b = definite(4, 0)
    lanes = torch.stack([A, A * torch.nan, torch.zeros_like(A), 2 * A])
    solve = vmap(lambda A: linear_solve(operator_of(A, tags=TAGS), b, SOLVERS[name], throw=False, has_aux=True))
    x, stats = solve(lanes)
    assert stats.converged.tolist() == [True, False, False, True]
    assert stats.steps.tolist() == [0] * 4
    assert torch.allclose(x[::3], torch.stack([torch.linalg.solve(A, b), torch.linalg.solve(A, b) / 2]), rtol=TOL)


def test_cholesky_needs_a_tag_that_is_true():
    with pytest.raises(ValueError, match=r"Cholesky needs a symmetric positive definite operator: tag it.*or use LU"):
        linear_solve(torch.eye(2), torch.ones(2), Cholesky())
    skewed = torch.tensor([[4.0, 1.0], [2.0, 3.0]], dtype=F64)
    for matrix in (skewed, -torch.eye(2, dtype=F64)):
        with pytest.raises(LinearSolveError, match="although it is tagged so"):
            linear_solve(operator_of(matrix, tags=TAGS), torch.ones(2, dtype=F64), Cholesky())


def test_ill_conditioned_matrices():
    hilbert = torch.from_numpy(scipy.linalg.hilbert(8))
    b = hilbert.sum(1)
    for solver in (LU(), QR(), SVD()):
        x = linear_solve(hilbert, b, solver)
        assert (hilbert @ x - b).norm() <= 1e-14 * b.norm() * 10  # backward stable, at a condition number of 1.5e10
        assert (x - 1).norm() <= 1e-4
    with pytest.raises(LinearSolveError, match="to rcond"):
        linear_solve(hilbert, b, SVD(rcond=1e-6))
    scaled = torch.diag(torch.tensor([1.0, 1e-18], dtype=F64))  # badly scaled, but of full rank
    assert torch.allclose(linear_solve(scaled, torch.ones(2, dtype=F64), QR())[1], torch.tensor(1e18, dtype=F64))


def test_svd_cuts_at_rcond_in_least_squares():
    A = torch.diag(torch.tensor([1.0, 1e-3, 1e-8], dtype=F64))
    b = torch.ones(3, dtype=F64)
    for rcond in (None, 1e-6, 1e-2):
        found = lstsq(A, b, SVD(rcond))
        expected = np.linalg.pinv(A.numpy(), rcond=1e-15 if rcond is None else rcond) @ b.numpy()
        assert torch.allclose(found, torch.from_numpy(expected), rtol=TOL)
    with pytest.raises(ValueError, match="rcond must be a non-negative number; got -1"):
        SVD(-1)


def test_solvers_are_values():
    assert LU() == LU()
    assert hash(SVD(1e-3)) == hash(SVD(1e-3))
    assert SVD(1e-3) != SVD()


@pytest.mark.parametrize("solver", [LU(), QR(), SVD(), Cholesky()])
def test_half_precision_is_refused(solver):
    A = operator_of(torch.eye(2, dtype=torch.bfloat16), tags=["positive_definite"])
    with pytest.raises(TypeError, match=f"{type(solver).__name__} needs float32 or float64"):
        linear_solve(A, torch.ones(2, dtype=torch.bfloat16), solver)
