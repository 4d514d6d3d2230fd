"""diffopt.linalg.gmres: what is special to it; `test_krylov` holds it to what all iterative solvers promise."""

import pytest
import torch

from diffopt.linalg import GMRES, LinearSolveError, linear_solve

F64 = torch.float64
TOL = 1e-10


def test_gmres_needs_the_whole_basis_for_a_cyclic_shift():
    P = torch.roll(torch.eye(10, dtype=F64), 1, 0)
    b = torch.eye(10, dtype=F64)[0]
    assert torch.allclose(P @ linear_solve(P, b, GMRES()), b, atol=TOL)
    with pytest.raises(LinearSolveError, match="GMRES did not solve"):
        linear_solve(P, b, GMRES(restart=5))


def test_steps_count_vectors_over_all_restarts():
    A = torch.diag(torch.linspace(1, 3, 20, dtype=F64))
    b = torch.ones(20, dtype=F64)
    _, whole = linear_solve(A, b, GMRES(restart=20), has_aux=True)
    _, parts = linear_solve(A, b, GMRES(restart=5), has_aux=True)
    assert whole.steps <= 20
    assert parts.steps > whole.steps
    assert parts.converged
    assert parts.residual <= 4e-11


def test_half_precision_is_refused():
    with pytest.raises(TypeError, match="GMRES needs float32 or float64"):
        linear_solve(torch.eye(2).half(), torch.ones(2).half(), GMRES())
