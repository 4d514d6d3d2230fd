"""diffopt.linalg.lsmr: against SciPy; `test_krylov` and `test_least_squares` hold it to what its kind promises."""

import pytest
import scipy.sparse.linalg
import torch

from diffopt.linalg import LSMR, LinearSolveError, function_operator, linear_solve, lstsq

F64 = torch.float64


def problem(m, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, dtype=F64, generator=generator), torch.randn(m, dtype=F64, generator=generator)


def test_too_few_steps_raise():
    A, b = problem(30, 20)
    with pytest.raises(LinearSolveError, match=r"LSMR did not solve.*max_steps is too small"):
        lstsq(A, b, LSMR(max_steps=2))
    _, stats = lstsq(A, b, LSMR(max_steps=2), throw=False, has_aux=True)
    assert not stats.converged
    assert stats.steps == 2


def test_lsmr_takes_no_more_steps_than_scipy():
    A, b = problem(60, 40, 5)
    A = A @ torch.diag(torch.logspace(0, -2, 40, dtype=F64))
    x, stats = lstsq(A, b, LSMR(rtol=1e-10), has_aux=True)
    theirs = scipy.sparse.linalg.lsmr(A.numpy(), b.numpy(), atol=1e-10, btol=1e-10, maxiter=2000)
    assert torch.allclose(x, torch.from_numpy(theirs[0]), rtol=1e-5, atol=1e-6)
    assert stats.steps <= 1.2 * theirs[2]


def test_the_loop_knows_its_residual():
    """The residual that stops the loop is the true one: a loose tolerance is met, and met early."""
    A, b = problem(40, 40, 1)
    A = A / 40**0.5 + 2 * torch.eye(40, dtype=F64)
    for rtol in (1e-2, 1e-5, 1e-8):
        _, stats = linear_solve(A, b, LSMR(rtol=rtol), has_aux=True)
        assert rtol / 100 < stats.residual <= 1.01 * rtol


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_right_sides_and_operators_of_any_magnitude(scale):
    A, b = problem(8, 5, 2)
    x = torch.linalg.pinv(A) @ b
    assert torch.allclose(lstsq(A, b * scale, LSMR(rtol=1e-13)) / scale, x, rtol=1e-9)
    small = 1e-60 if scale < 1 else 1e60
    assert torch.allclose(lstsq(A * small, b, LSMR(rtol=1e-13)) * small, x, rtol=1e-9)


def test_a_large_sparse_problem_by_products():
    """Second differences and a few values: the smooth curve through them."""
    n = 3000
    values = torch.linspace(0, 3, n, dtype=F64).sin()

    def product(_, v):
        return torch.cat([v[2:] - 2 * v[1:-1] + v[:-2], v])

    op = function_operator(product, None, values)
    b = torch.cat([torch.zeros(n - 2, dtype=F64), values])
    x, stats = lstsq(op, b, has_aux=True)  # LSMR is chosen
    assert stats.converged
    assert 0 < stats.steps < 100
    assert (x - values).abs().max() < 0.1
    assert op.rmatvec(b - op.matvec(x)).norm() <= 1e-9 * b.norm()


def test_an_underflow_is_no_solution():
    A = 1e-30 * torch.tensor([[1.0, 0.5], [1.0, 1.0], [1.0, 2.0]])
    with pytest.raises(LinearSolveError, match="LSMR"):
        lstsq(A, torch.tensor([1.0, 3.0, 5.0]), LSMR())
