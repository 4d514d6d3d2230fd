"""diffopt.linalg.structured: Diagonal, Triangular and Tridiagonal against dense solutions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_banded
from torch.func import grad, jacfwd, jacrev, vmap

from diffopt.linalg import (
    Dense,
    Diagonal,
    LinearSolveError,
    Triangular,
    Tridiagonal,
    function_operator,
    linear_solve,
    matrix_operator,
)
from diffopt.linalg.dense import chosen

F64 = torch.float64
B = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
TOL = 1e-11


def bands(n, seed, dominance=2.5):
    generator = torch.Generator().manual_seed(seed)
    lower, middle, upper, b = torch.randn(4, n, dtype=F64, generator=generator)
    return lower, middle + dominance * middle.sign(), upper, b


def product(p, v):
    """A tridiagonal product, in which the first of `lower` and the last of `upper` have no place."""
    lower, middle, upper = p
    above = torch.cat([v.new_zeros(1), v[:-1]])
    below = torch.cat([v[1:], v.new_zeros(1)])
    return lower * above + middle * v + upper * below


def matrix(p):
    lower, middle, upper = p
    return torch.diag(middle) + torch.diag(lower[1:], -1) + torch.diag(upper[:-1], 1)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 70), st.integers(0, 1000))
def test_tridiagonal_systems_of_any_size_are_those_of_scipy(n, seed):
    *p, b = bands(n, seed)
    op = function_operator(product, tuple(p), b, tags=["tridiagonal"])
    band = torch.stack([p[2].roll(1), p[1], p[0].roll(-1)]).numpy()
    expected = torch.from_numpy(solve_banded((1, 1), band, b.numpy()))
    assert torch.allclose(linear_solve(op, b, Tridiagonal()), expected, rtol=TOL, atol=TOL)
    transposed = linear_solve(op.transpose(), b, Tridiagonal())
    assert torch.allclose(transposed, torch.linalg.solve(matrix(p).T, b), rtol=TOL, atol=TOL)


def test_three_products_and_no_matrix():
    n = 20000
    *p, b = bands(n, 0)
    products = []

    def counting(p, v):
        products.append(1)
        return product(p, v)

    op = function_operator(counting, tuple(p), b, tags=["tridiagonal"])
    products.clear()
    x = linear_solve(op, b)  # Tridiagonal is chosen at any size
    assert len(products) == 3
    assert (product(p, x) - b).norm() <= 1e-14 * b.norm() * 10

    def total(middle):
        return linear_solve(function_operator(product, (p[0], middle, p[2]), b, tags=["tridiagonal"]), b).sum()

    w = linear_solve(op.transpose(), torch.ones_like(b))
    assert torch.allclose(grad(total)(p[1]), -w * x, rtol=1e-9, atol=1e-12)


def test_tridiagonal_derivatives_are_those_of_the_inverse():
    *p, b = bands(6, 1)

    def solve(lower, middle, b):
        op = function_operator(product, (lower, middle, p[2]), b, tags=["tridiagonal"])
        return linear_solve(op, b, Tridiagonal())

    def reference(lower, middle, b):
        return torch.linalg.inv(matrix((lower, middle, p[2]))) @ b

    for derivative in (jacrev, jacfwd, lambda f, i: jacfwd(jacrev(f, i), i)):
        for i in range(3):
            found, expected = derivative(solve, i)(p[0], p[1], b), derivative(reference, i)(p[0], p[1], b)
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)


def test_a_matrix_that_needs_pivoting_is_given_to_lu():
    swap = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 2.0], [0.0, 3.0, 1.0]], dtype=F64)
    op = matrix_operator(swap, tags=["tridiagonal"])
    assert torch.allclose(linear_solve(op, B, Tridiagonal()), torch.linalg.solve(swap, B), rtol=TOL)
    tiny = swap + 1e-14 * torch.eye(3, dtype=F64)  # elimination without pivoting loses 14 digits here
    op = matrix_operator(tiny, tags=["tridiagonal"])
    assert torch.allclose(linear_solve(op, B, Tridiagonal()), torch.linalg.solve(tiny, B), rtol=TOL)
    lanes = torch.stack([swap, 3 * torch.eye(3, dtype=F64)])
    found = vmap(lambda A: linear_solve(matrix_operator(A, tags=["tridiagonal"]), B))(lanes)
    assert torch.allclose(found, torch.linalg.solve(lanes, B), rtol=TOL)


def test_a_large_one_that_needs_pivoting_raises_with_advice():
    n = 2100
    zero, one = torch.zeros(n, dtype=F64), torch.ones(n, dtype=F64)
    op = function_operator(product, (one, zero, 2 * one), one, tags=["tridiagonal"])
    with pytest.raises(LinearSolveError, match=r"Tridiagonal did not solve.*needs pivoting \(use LU\(\) or GMRES"):
        linear_solve(op, one, Tridiagonal())


@pytest.mark.parametrize("tag", ["diagonal", "lower_triangular", "upper_triangular", "tridiagonal"])
def test_singular_and_nan_raise(tag):
    for value in (0.0, torch.nan):
        op = matrix_operator(torch.diag(torch.tensor([1.0, value, 2.0], dtype=F64)), tags=[tag])
        solver = chosen(frozenset([tag]))
        with pytest.raises(LinearSolveError, match=rf"{type(solver).__name__} did not solve .*NaN"):
            linear_solve(op, B, solver)
        assert not linear_solve(op, B, solver, throw=False).isfinite().all()


@pytest.mark.parametrize(
    ("solver", "tag"),
    [(Diagonal(), '"diagonal"'), (Triangular(), '"lower_triangular" or "upper'), (Tridiagonal(), '"tridiagonal"')],
)
def test_each_needs_its_tag(solver, tag):
    op = matrix_operator(torch.eye(3, dtype=F64), tags=["symmetric"])
    message = rf"{type(solver).__name__} needs an operator tagged {tag}.*has the tags \['symmetric'\].*Dense\(\) choo"
    with pytest.raises(ValueError, match=message):
        linear_solve(op, B, solver)


def test_one_unknown_and_zero_right_sides():
    for tag in ("diagonal", "lower_triangular", "tridiagonal"):
        one = matrix_operator(torch.full((1, 1), 4.0, dtype=F64), tags=[tag])
        assert linear_solve(one, B[:1]).item() == 0.25
        op = matrix_operator(torch.eye(3, dtype=F64), tags=[tag])
        assert torch.equal(linear_solve(op, torch.zeros(3, dtype=F64)), torch.zeros(3, dtype=F64))


def test_a_diagonal_takes_one_product_at_any_size():
    d = torch.linspace(1, 2, 100000, dtype=F64)
    op = function_operator(lambda d, v: d * v, d, d, tags=["diagonal"])
    assert torch.allclose(linear_solve(op, d, Diagonal()), torch.ones_like(d))
    assert torch.allclose(linear_solve(op, d, Dense()), torch.ones_like(d))
