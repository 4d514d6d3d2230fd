"""diffopt.linalg.neumann: the truncated series, and its derivative as that of the series."""

import pytest
import torch
from torch.func import grad, hessian, jacrev, vmap

from diffopt.implicit import custom_root
from diffopt.linalg import LinearSolveError, Neumann, linear_solve, matrix_operator

F64 = torch.float64
A = torch.tensor([[1.5, 0.3, -0.2], [0.1, 1.0, 0.4], [0.2, -0.3, 0.8]], dtype=F64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
TOL = 1e-12


def series(A, b, alpha, n):
    powers = [torch.linalg.matrix_power(torch.eye(3, dtype=F64) - alpha * A, k) for k in range(n + 1)]
    return alpha * torch.stack(powers).sum(0) @ b


@pytest.mark.parametrize("n", [0, 1, 4])
@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3, dtype=F64)], ids=["float", "tensor"])
def test_it_is_the_series(n, alpha):
    x, stats = linear_solve(A, B, Neumann(n, alpha), has_aux=True)
    assert torch.allclose(x, series(A, B, alpha, n), rtol=TOL)
    assert stats.converged
    assert stats.steps == n
    assert torch.allclose(stats.residual, (A @ x - B).norm() / B.norm(), rtol=TOL)
    transposed = linear_solve(matrix_operator(A).transpose(), B, Neumann(n, alpha))
    assert torch.allclose(transposed, series(A.T, B, alpha, n), rtol=TOL)


def test_a_long_series_is_the_solution():
    assert torch.allclose(linear_solve(A, B, Neumann(300, 0.8)), torch.linalg.solve(A, B), rtol=TOL)


def test_derivatives_are_those_of_the_truncated_series():
    def ours(alpha, A, b):
        return linear_solve(A, b, Neumann(3, alpha)).sin().sum()

    def theirs(alpha, A, b):
        return series(A, b, alpha, 3).sin().sum()

    args = torch.tensor(0.3, dtype=F64), A, B
    for found, expected in zip(grad(ours, (0, 1, 2))(*args), grad(theirs, (0, 1, 2))(*args), strict=True):
        assert torch.allclose(found, expected, rtol=TOL)
    assert torch.allclose(hessian(ours)(*args), hessian(theirs)(*args), rtol=TOL)
    leaf = torch.tensor(0.3, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(ours(leaf, A, B), leaf)  # though nothing else is tracked
    assert torch.allclose(slope, grad(theirs)(*args), rtol=TOL)


def test_it_starts_from_the_initial_guess():
    guess = torch.linalg.solve(A, B)
    assert torch.allclose(linear_solve(A, B, Neumann(0, 0.3), init=guess), guess, rtol=TOL)
    x = linear_solve(A, B, Neumann(1, 0.3), init=B)
    step = B + 0.3 * (B - A @ B)
    assert torch.allclose(x, step + 0.3 * (B - A @ step), rtol=TOL)
    assert torch.equal(grad(lambda g: linear_solve(A, B, Neumann(1, 0.3), init=g).sum())(B), torch.zeros_like(B))


def test_vmap_equals_the_loop():
    alphas = torch.tensor([0.1, 0.3], dtype=F64)
    found = vmap(lambda alpha, s: linear_solve(s * A, B, Neumann(3, alpha)))(alphas, alphas.cos())
    loop = [series(a.cos() * A, B, a, 3) for a in alphas]
    assert torch.allclose(found, torch.stack(loop), rtol=TOL)


def test_as_an_adjoint_it_gives_the_truncated_hypergradient():
    def gradient(x, a):
        return A @ x - a

    solve = custom_root(gradient, solve=Neumann(5, 0.5))(lambda init, a: torch.linalg.inv(A) @ a)
    found = jacrev(lambda a: solve(torch.zeros_like(a), a))(B)
    expected = series(A, torch.eye(3, dtype=F64), 0.5, 5)
    assert torch.allclose(found, expected, rtol=TOL)


def test_a_series_that_diverges_raises_and_options_are_checked():
    with pytest.raises(LinearSolveError, match=r"Neumann did not solve.*the series diverges"):
        linear_solve(1e4 * A, B, Neumann(100, 1.0))
    with pytest.raises(LinearSolveError, match="NaN"):
        linear_solve(A, B * torch.nan, Neumann(2))
    with pytest.raises(ValueError, match="n must be a non-negative int; got -1"):
        Neumann(-1)
    with pytest.raises(TypeError, match=r"alpha must be a number or a 0-d tensor; got shape \(3,\)"):
        Neumann(1, B)
