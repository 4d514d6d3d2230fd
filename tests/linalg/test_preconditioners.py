"""diffopt.linalg.preconditioners: diagonal blocks, how they are found, and what they carry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacrev, vmap

from diffopt.linalg import (
    CG,
    GMRES,
    BiCGStab,
    block_jacobi,
    function_operator,
    jacobi,
    linear_solve,
    matrix_operator,
)

F64 = torch.float64
TOL = 1e-10


def definite(n, seed):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, dtype=F64, generator=generator)
    return M @ M.T / n + torch.eye(n, dtype=F64), torch.randn(n, dtype=F64, generator=generator)


def inverse_of_blocks(A, size):
    """By a loop, slowly."""
    M = torch.zeros_like(A)
    for i in range(0, len(A), size):
        own = slice(i, min(i + size, len(A)))
        M[own, own] = torch.linalg.inv(A[own, own])
    return M


def by_products(A):
    return function_operator(lambda A, v: A @ v, A, A[0])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 75), st.integers(1, 80), st.integers(0, 100), st.booleans())
def test_blocks_are_read_from_matrices_and_probed_by_products(n, size, seed, tagged):
    A, b = definite(n, seed)
    A = A if tagged else A + 0.1 * torch.triu(A, 1)
    tags = ["positive_definite"] if tagged else []
    expected = inverse_of_blocks(A, size)
    for op in (matrix_operator(A, tags=tags), by_products(A)):
        M = block_jacobi(op, size)
        assert torch.allclose(M.matvec(b), expected @ b, rtol=TOL, atol=TOL)
        assert torch.allclose(M.rmatvec(b), expected.T @ b, rtol=TOL, atol=TOL)
        assert torch.allclose(M.materialize(), expected, rtol=TOL, atol=TOL)
    assert torch.allclose(jacobi(by_products(A)).matvec(b), b / A.diagonal(), rtol=TOL)


def test_the_products_that_probing_costs():
    d = torch.linspace(1, 3, 70, dtype=F64)
    sizes = []

    def product(d, v):
        sizes.append(v.shape)
        return d * v

    general, diagonal = (function_operator(product, d, d, tags=t) for t in ([], ["diagonal"]))
    sizes.clear()
    assert torch.allclose(jacobi(general).matvec(d), torch.ones_like(d))
    assert len(sizes) == 3  # 32 columns at once
    sizes.clear()
    assert torch.allclose(jacobi(diagonal).matvec(d), torch.ones_like(d))
    assert len(sizes) == 1


@pytest.mark.parametrize("solver", [CG, GMRES, BiCGStab])
def test_they_save_steps_and_carry_no_gradient(solver):
    n = 60
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(n // 3, 3, 3, dtype=F64, generator=generator)
    stiff = torch.block_diag(*(blocks @ blocks.mT + 0.1 * torch.eye(3, dtype=F64)))
    scale = torch.logspace(0, 2, n // 3, dtype=F64).repeat_interleave(3)
    base, b = scale.diag() @ stiff @ scale.diag(), torch.ones(n, dtype=F64)

    def solve(t, size, **options):
        op = matrix_operator(base * t + torch.eye(n, dtype=F64), tags=["positive_definite"])
        M = block_jacobi(op, size) if size else None
        return linear_solve(op, b, solver(rtol=1e-11, preconditioner=M), **options)

    t = torch.tensor(1.3, dtype=F64)
    steps = [solve(t, size, throw=False, has_aux=True)[1].steps.item() for size in (0, 1, 3)]
    assert steps[2] <= 2 < steps[1]
    assert steps[1] < steps[0]
    inverse = torch.linalg.inv(base * t + torch.eye(n, dtype=F64))
    assert torch.allclose(jacrev(lambda t: solve(t, 3))(t), -inverse @ base @ inverse @ b, rtol=1e-7)
    assert grad(lambda t: jacobi(matrix_operator(base * t)).matvec(b).sum())(t) == 0


def test_vmap_equals_the_loop():
    As = torch.stack([definite(5, seed)[0] for seed in range(3)])
    b = definite(5, 0)[1]
    for make in (matrix_operator, by_products):
        found = vmap(lambda A: block_jacobi(make(A), 2).matvec(b))(As)  # noqa: B023
        assert torch.allclose(found, torch.stack([inverse_of_blocks(A, 2) @ b for A in As]), rtol=TOL)
    solve = lambda A: linear_solve(A, b, GMRES(rtol=1e-13, preconditioner=jacobi(matrix_operator(A))))  # noqa: E731
    assert torch.allclose(vmap(solve)(As), torch.linalg.solve(As, b), rtol=TOL)


def test_singular_blocks_are_the_identity():
    A = torch.diag(torch.tensor([0.0, 2.0, torch.nan, 4.0], dtype=F64))
    for tags in ([], ["positive_definite"]):
        M = jacobi(matrix_operator(A, tags=tags))
        assert torch.allclose(M.matvec(torch.ones(4, dtype=F64)), torch.tensor([1.0, 0.5, 1.0, 0.25], dtype=F64))


def test_trees_tags_and_transposes():
    A, b = definite(4, 1)
    tree = {"x": b[:1], "y": b[1:]}
    M = jacobi(matrix_operator(A, domain=tree, codomain=(b[:2], b[2:]), tags=["positive_definite"]))
    assert M.tags == {"positive_definite"}
    assert torch.allclose(M.matvec((b[:2], b[2:]))["y"], (b / A.diagonal())[1:])
    assert torch.allclose(M.transpose().matvec(tree)[0], (b / A.diagonal())[:2])
    assert jacobi(by_products(A)).tags == frozenset()
    op = matrix_operator(A, domain=tree, codomain=tree)
    solver = GMRES(rtol=1e-13, preconditioner=jacobi(op))
    slope = grad(lambda b: linear_solve(op, {"x": b[:1], "y": b[1:]}, solver)["y"].sum())(b)
    assert torch.allclose(slope, torch.linalg.inv(A).T[:, 1:].sum(1), rtol=TOL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: jacobi(matrix_operator(torch.ones(2, 3))),
            r"needs a square operator; got shape \(2, 3\)",
        ),
        (lambda: block_jacobi(matrix_operator(torch.eye(2)), 0), "block_size must be a positive int; got 0"),
        (lambda: block_jacobi(matrix_operator(torch.eye(2)), 1.5), "block_size must be a positive int; got 1.5"),
    ],
)
def test_bad_inputs_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nothing_to_precondition():
    assert jacobi(matrix_operator(torch.ones(0, 0))).matvec(torch.ones(0)).shape == (0,)


def test_what_is_no_operator_is_refused():
    with pytest.raises(TypeError, match="needs an operator, such as matrix_operator"):
        jacobi(torch.eye(2))
    with pytest.raises(TypeError, match="needs float32 or float64"):
        block_jacobi(matrix_operator(torch.eye(2, dtype=torch.bfloat16)), 2)
    A = matrix_operator(torch.eye(2), tags=["positive_definite"])
    with pytest.raises(TypeError, match="a preconditioner must be an operator, such as matrix_operator"):
        linear_solve(A, torch.ones(2), CG(preconditioner=torch.eye(2)))
