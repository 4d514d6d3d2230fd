"""diffopt.linalg.dense: factorizations chosen by tag."""

import pytest
import torch
from torch.func import hessian, jacfwd, vmap

from diffopt.linalg import (
    LU,
    Cholesky,
    Dense,
    Diagonal,
    LinearSolveError,
    Triangular,
    Tridiagonal,
    linear_solve,
    matrix_operator,
)
from diffopt.linalg.dense import chosen

F64 = torch.float64
L = torch.tensor([[2.0, 0.0, 0.0], [0.5, 1.5, 0.0], [-0.3, 0.2, 1.0]], dtype=F64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
MATRICES = {
    (): L + 0.3,
    ("symmetric",): L + L.T,
    ("positive_definite",): L @ L.T,
    ("lower_triangular",): L,
    ("upper_triangular",): L.T,
    ("tridiagonal",): torch.triu(L + 0.3, -1).tril(1),
    ("diagonal",): torch.diag(L.diagonal()),
}
TOL = 1e-12


@pytest.mark.parametrize("tags", MATRICES)
def test_every_structure_solves_and_its_transpose_too(tags):
    A = MATRICES[tags]
    op = matrix_operator(A, tags=tags)
    assert torch.allclose(linear_solve(op, B, Dense()), torch.linalg.solve(A, B), rtol=TOL)
    assert torch.allclose(linear_solve(op.transpose(), B, Dense()), torch.linalg.solve(A.T, B), rtol=TOL)


@pytest.mark.parametrize("tags", MATRICES)
def test_batched_second_derivatives_are_right_where_torch_is_not(tags):
    """`vmap(jacfwd(jacfwd(torch.linalg.solve)))` returns garbage on torch 2.13."""

    def f(s):
        return linear_solve(matrix_operator(MATRICES[tags] * s**2, tags=tags), B)

    scales = torch.tensor([1.0, 1.3], dtype=F64)
    x = torch.linalg.solve(MATRICES[tags], B)
    expected = 6 / scales[:, None] ** 4 * x
    assert torch.allclose(vmap(jacfwd(jacfwd(f)))(scales), expected, rtol=1e-10)
    assert torch.allclose(vmap(hessian(lambda s: f(s).sum()))(scales), expected.sum(1), rtol=1e-10)


@pytest.mark.parametrize("tags", MATRICES)
def test_singular_matrices_raise_or_return_what_they_have(tags):
    A = torch.zeros(3, 3, dtype=F64)
    with pytest.raises(LinearSolveError, match=r"Dense did not solve .*the matrix is singular.*throw=False"):
        linear_solve(matrix_operator(A, tags=tags), B)
    assert not linear_solve(matrix_operator(A, tags=tags), B, throw=False).isfinite().all()


def test_a_matrix_that_is_not_positive_definite_although_tagged_raises():
    with pytest.raises(LinearSolveError, match="not symmetric positive definite although it is tagged so"):
        linear_solve(matrix_operator(-torch.eye(2, dtype=F64), tags=["positive_definite"]), B[:2])


def test_one_singular_lane_raises_and_spares_the_others_without_throw():
    As = torch.stack([L, torch.zeros_like(L)])
    with pytest.raises(LinearSolveError, match="in every lane"):
        vmap(lambda A: linear_solve(A, B))(As)
    found = vmap(lambda A: linear_solve(A, B, throw=False))(As)
    assert torch.allclose(found[0], torch.linalg.solve(L, B))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], LU()),
        (["symmetric"], LU()),
        (["positive_definite"], Cholesky()),
        (["positive_definite", "tridiagonal"], Tridiagonal()),
        (["tridiagonal", "lower_triangular"], Triangular()),
        (["upper_triangular"], Triangular()),
        (["positive_definite", "diagonal"], Diagonal()),
    ],
)
def test_the_tags_choose(tags, expected):
    assert chosen(frozenset(tags)) == expected
