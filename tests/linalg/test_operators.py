"""diffopt.linalg.operators: matrices, their products, transposes and shifts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacrev, vmap

from diffopt.linalg import function_operator, matrix_operator

F64 = torch.float64
A = torch.tensor([[0.5, 0.2, -0.3], [0.1, 0.4, 0.2]], dtype=F64)
S = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
V = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
U = torch.tensor([0.3, -0.7], dtype=F64)
TOL = 1e-12


def close(a, b):
    return torch.allclose(a, b, rtol=TOL, atol=TOL)


def test_products_of_a_matrix():
    op = matrix_operator(A)
    assert op.shape == (2, 3)
    assert close(op.matvec(V), A @ V)
    assert close(op.rmatvec(U), A.T @ U)
    assert close(op.materialize(), A)
    assert close(op.transpose().matvec(U), A.T @ U)
    assert close(op.transpose().transpose().materialize(), A)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000))
def test_products_are_adjoint_and_the_matrix_is_theirs(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    M, v, u = (torch.randn(*shape, dtype=F64, generator=generator) for shape in ((m, n), (n,), (m,)))
    op = function_operator(lambda M, v: torch.sin(M) @ v, M, v)
    assert torch.allclose(u @ op.matvec(v), op.rmatvec(u) @ v)
    assert torch.allclose(op.materialize(), torch.sin(M))
    assert torch.allclose(op.transpose().materialize(), torch.sin(M).T)


def test_trees_go_in_and_out():
    op = matrix_operator(A, domain={"x": V[:2], "y": V[2:]}, codomain=(U[:1], U[1]))
    first, second = op.matvec({"x": V[:2], "y": V[2:]})
    assert close(torch.cat([first, second[None]]), A @ V)
    assert second.shape == ()
    assert close(op.rmatvec((U[:1], U[1]))["y"], (A.T @ U)[2:])


def test_parameters_are_differentiated_in_products():
    def quadratic(M):
        return U @ function_operator(lambda p, v: p["M"] @ v, {"M": M}, V).matvec(V)

    assert close(grad(quadratic)(A), torch.outer(U, V))
    assert close(grad(lambda M: V @ matrix_operator(M).rmatvec(U))(A), torch.outer(U, V))
    assert close(vmap(lambda M: matrix_operator(M).matvec(V))(torch.stack([A, 2 * A])), torch.stack([A @ V, 2 * A @ V]))


def test_shifted_adds_a_multiple_of_the_identity():
    shift = torch.tensor(0.7, dtype=F64)
    op = matrix_operator(S, tags=["symmetric"]).shifted(shift)
    assert close(op.materialize(), S + shift * torch.eye(2, dtype=F64))
    assert close(op.matvec(U), S @ U + shift * U)
    assert close(op.rmatvec(U), S @ U + shift * U)
    assert op.symmetric
    assert close(jacrev(lambda s: matrix_operator(S).shifted(s).matvec(U))(shift), U)
    with pytest.raises(ValueError, match=r"only a square operator can be shifted; got shape \(2, 3\)"):
        matrix_operator(A).shifted(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strides_and_dtypes(dtype):
    M = torch.arange(12, dtype=dtype).reshape(3, 4).T[::2]
    assert not M.is_contiguous()
    v = torch.ones(1, dtype=dtype).expand(3)
    assert torch.allclose(matrix_operator(M).matvec(v), M.sum(1))
    assert torch.allclose(function_operator(lambda M, v: M @ v, M, v).rmatvec(M[:, 0].contiguous()), M.T @ M[:, 0])


def test_integer_parameters_and_none():
    op = function_operator(lambda p, v: p["n"] * v, {"n": torch.tensor([2, 3, 4]), "none": None}, V)
    assert close(op.materialize(), torch.diag(torch.tensor([2.0, 3.0, 4.0], dtype=F64)))
    assert close(function_operator(lambda _, v: 2 * v, None, V).matvec(V), 2 * V)


def test_operators_hold_no_graph_and_change_nothing():
    M = A.clone()
    before = M.clone()
    op = matrix_operator(M)
    op.matvec(V)
    op.materialize()
    assert torch.equal(M, before)
    assert not op.matvec(V).requires_grad


BAD = {
    "list": (lambda: matrix_operator([[1.0]]), TypeError, "A must be a real floating-point tensor; got list"),
    "numpy": (lambda: matrix_operator(np.eye(2)), TypeError, "A must be a real floating-point tensor; got float64"),
    "integers": (lambda: matrix_operator(torch.eye(2, dtype=torch.long)), TypeError, "got torch.int64"),
    "batch": (lambda: matrix_operator(torch.ones(2, 3, 3)), ValueError, r"shape \(m, n\); got \(2, 3, 3\)\. Map over"),
    "vector": (lambda: matrix_operator(V), ValueError, r"A must have shape \(m, n\); got \(3,\)"),
    "domain": (lambda: matrix_operator(A, domain=U), ValueError, "needs a domain of 3 elements; got 2"),
    "codomain": (lambda: matrix_operator(A, codomain=V), ValueError, "needs a codomain of 2 elements; got 3"),
    "tag": (lambda: matrix_operator(S, tags=["spd"]), ValueError, r"unknown tags \['spd'\]; the tags are symmetric"),
    "tags str": (lambda: matrix_operator(S, tags="symmetric"), TypeError, r"write tags=\['symmetric'\]"),
    "tags rect": (lambda: matrix_operator(A, tags=["symmetric"]), ValueError, "tags describe square operators"),
    "size": (lambda: matrix_operator(A).matvec(U), ValueError, "v must have 3 elements; got 2"),
    "transposed size": (lambda: matrix_operator(A).rmatvec(V), ValueError, "u must have 2 elements"),
    "dtype": (lambda: matrix_operator(A).matvec(V.float()), TypeError, "got torch.float32"),
    "mixed": (lambda: function_operator(lambda _, v: v[0], (), (V, V.float())), TypeError, "leaves of one dtype"),
    "empty": (lambda: function_operator(lambda _, v: v, (), ()), ValueError, "at least one leaf"),
    "integer example": (lambda: function_operator(lambda _, v: v, (), torch.arange(3)), TypeError, "floating-point"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_raise(case):
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()
