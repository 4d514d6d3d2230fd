"""diffopt.linalg.refinement: residuals down to rounding, around any other solver."""

import dataclasses

import pytest
import torch
from torch.func import jacfwd, jacrev, vmap

from diffopt.linalg import (
    CG,
    GMRES,
    LU,
    Cholesky,
    IterativeRefinement,
    LinearSolveError,
    Neumann,
    linear_solve,
    matrix_operator,
)

F64 = torch.float64
TAGS = ["positive_definite"]


def definite(n, seed):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, dtype=F64, generator=generator)
    return M @ M.T / n + torch.eye(n, dtype=F64), torch.randn(n, dtype=F64, generator=generator)


@dataclasses.dataclass(frozen=True)
class Rough:
    """A solver in single precision."""

    def solve(self, bound, b, x, tags):
        return torch.linalg.solve(bound.dense().float(), b.float()).double(), torch.tensor(True)

    def transposed(self):
        return self


@pytest.mark.parametrize(
    "inner", [LU(), Cholesky(), CG(rtol=1e-2), GMRES(rtol=1e-2), Rough()], ids=lambda s: type(s).__name__
)
def test_residuals_and_derivatives_down_to_rounding(inner):
    A, b = definite(15, 0)
    solver = IterativeRefinement(inner)

    def solve(A, b):
        return linear_solve(matrix_operator(A, tags=TAGS), b, solver)

    x, stats = linear_solve(matrix_operator(A, tags=TAGS), b, solver, has_aux=True)
    assert stats.converged
    assert stats.residual <= 1e-14
    assert (A @ x - b).norm() <= 1e-14 * b.norm()
    inverse = torch.linalg.inv(A)
    for derivative in (jacrev, jacfwd):
        by_A, by_b = derivative(solve, (0, 1))(A, b)
        assert torch.allclose(by_A, -torch.einsum("ij,k->ijk", inverse, x), rtol=1e-10, atol=1e-12)
        assert torch.allclose(by_b, inverse, rtol=1e-10, atol=1e-12)


def test_a_direct_solver_factorizes_once():
    A, b = definite(6, 1)
    op, made = matrix_operator(A), []

    def bind(A):
        def dense():
            made.append(1)
            return A + 1e-3  # so that the factors are those of another matrix, and several steps are needed

        return op.bind(A)._replace(dense=dense)

    x, stats = linear_solve(dataclasses.replace(op, bind=bind), b, IterativeRefinement(LU()), has_aux=True)
    assert len(made) == 1
    assert stats.steps > 2
    assert torch.allclose(A @ x, b, rtol=1e-13)


def test_a_damping_of_the_refined_solver_carries_gradient():
    A, b = definite(5, 2)
    t = torch.tensor(0.3, dtype=F64)
    found = jacrev(lambda t: linear_solve(matrix_operator(A, tags=TAGS), b, IterativeRefinement(CG(damping=t))))(t)
    M = torch.linalg.inv(A + t * torch.eye(5, dtype=F64))
    assert torch.allclose(found, -M @ M @ b, rtol=1e-10)


def test_lanes_stop_on_their_own():
    A, b = definite(8, 3)
    As = torch.stack([A, torch.eye(8, dtype=F64)])
    run = lambda A: linear_solve(matrix_operator(A, tags=TAGS), b, IterativeRefinement(CG(rtol=1e-3)), has_aux=True)  # noqa: E731
    x, stats = vmap(run)(As)
    loop = [run(A) for A in As]
    assert torch.allclose(x, torch.stack([x for x, _ in loop]), rtol=1e-12)
    assert stats.steps.tolist() == [s.steps.item() for _, s in loop]
    assert stats.steps[1] == 1 < stats.steps[0]


def test_a_right_initial_guess_takes_no_steps():
    A, b = definite(8, 4)
    x = linear_solve(A, b, IterativeRefinement(LU()))
    _, stats = linear_solve(A, b, IterativeRefinement(LU()), init=x, has_aux=True)
    assert stats.steps == 0


def test_failures_and_bad_options():
    b = torch.ones(3, dtype=F64)
    with pytest.raises(LinearSolveError, match=r"IterativeRefinement did not solve.*the refined solver fails"):
        linear_solve(torch.zeros(3, 3, dtype=F64), b, IterativeRefinement(LU()))
    A, b = definite(8, 5)
    with pytest.raises(LinearSolveError):
        linear_solve(A, b, IterativeRefinement(GMRES(restart=1, max_restarts=1), max_steps=1))
    with pytest.raises(ValueError, match="CG needs a symmetric"):
        linear_solve(A, b, IterativeRefinement(CG()))
    with pytest.raises(TypeError, match=r"takes a linear solver such as LU\(\); got 3"):
        IterativeRefinement(3)
    with pytest.raises(TypeError, match="takes a linear solver"):
        IterativeRefinement(LU)
    with pytest.raises(TypeError, match="use Neumann with a larger n"):
        IterativeRefinement(Neumann(3))
    with pytest.raises(ValueError, match="max_steps must be a positive int"):
        IterativeRefinement(LU(), max_steps=0)
