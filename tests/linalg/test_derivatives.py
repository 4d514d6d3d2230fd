"""diffopt.linalg.derivatives: Jacobians, Hessians and Gauss-Newton matrices by their products."""

import pytest
import torch
from torch.func import grad, hessian, jacrev, vmap

from diffopt.linalg import gauss_newton_operator, hessian_operator, jacobian_operator
from problems import W

F64 = torch.float64
X = torch.tensor([0.5, -0.4, 0.8], dtype=F64)
V = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
T = torch.tensor(1.3, dtype=F64)
TOL = 1e-12


def model(x, t):
    return torch.sin(W @ x) * t


def loss(x, t):
    return torch.cosh(W @ x).sum() * t


def close(a, b):
    return torch.allclose(a, b, rtol=TOL, atol=TOL)


def transformed(f):
    """The same value from under a transform, where the other code path runs."""
    return vmap(lambda one: f() * one)(torch.ones(1, dtype=F64))[0]


@pytest.mark.parametrize("path", [lambda f: f(), transformed], ids=["autograd", "torch.func"])
def test_products_are_those_of_the_matrix(path):
    J, H = jacrev(model)(X, T), hessian(loss)(X, T)
    G = J.T @ hessian(lambda y: torch.cosh(y).sum())(model(X, T)) @ J
    cases = [
        (lambda: jacobian_operator(model, X, T), J),
        (lambda: hessian_operator(loss, X, T), H),
        (lambda: gauss_newton_operator(model, lambda y: torch.cosh(y).sum(), X, T), G),
    ]
    for make, matrix in cases:
        assert close(path(lambda: make().matvec(V)), matrix @ V)  # noqa: B023
        assert close(path(lambda: make().rmatvec(V)), matrix.T @ V)  # noqa: B023
        assert close(path(lambda: make().materialize()), matrix)  # noqa: B023


def test_more_rows_than_go_one_by_one():
    x = torch.linspace(-1, 1, 12, dtype=F64)

    def f(x):
        return x.sin() * x.sum()

    assert close(jacobian_operator(f, x).materialize(), jacrev(f)(x))


def test_rectangular_and_tree_valued_jacobians():
    op = jacobian_operator(lambda x: {"a": x["p"].prod(), "b": x["q"] * x["p"][:1]}, {"p": X[:2], "q": X[2:]})
    assert op.shape == (2, 3)
    moved = op.matvec({"p": V[:2], "q": V[2:]})
    assert close(moved["a"], V[0] * X[1] + X[0] * V[1])
    assert close(moved["b"], V[2:] * X[0] + X[2:] * V[0])


def test_points_arguments_and_captured_tensors_are_differentiated():
    one = torch.ones((), dtype=F64)

    def by_argument(x, t, c):
        return jacobian_operator(lambda x, t: c * model(x, t), x, t).matvec(V).sum()

    def plainly(x, t, c):
        return (jacrev(lambda x: c * model(x, t))(x) @ V).sum()

    found = grad(by_argument, (0, 1, 2))(X, T, one)
    expected = grad(plainly, (0, 1, 2))(X, T, one)
    assert all(close(f, e) for f, e in zip(found, expected, strict=True))
    c = one.clone().requires_grad_()
    assert close(torch.autograd.grad(by_argument(X, T, c), c)[0], expected[2])


def test_one_evaluation_serves_many_products():
    calls = []

    def f(x):
        calls.append(1)
        return x**2

    bound = (op := jacobian_operator(f, X)).bind(*op.parameters)
    before = len(calls)
    for _ in range(3):
        bound.matvec(V)
        bound.rmatvec(V)
    bound.dense()
    assert len(calls) == before
    assert before == 2  # the shape of the output, then the graph


def test_under_no_grad():
    with torch.no_grad():
        assert close(hessian_operator(loss, X, T).matvec(V), hessian(loss)(X, T) @ V)


def test_hessians_are_symmetric_by_tag_and_take_more():
    assert hessian_operator(loss, X, T).tags == {"symmetric"}
    assert hessian_operator(loss, X, T, tags=["positive_definite"]).tags == {"symmetric", "positive_definite"}
    with pytest.raises(TypeError, match="must return a scalar tensor"):
        hessian_operator(model, X, T)
    with pytest.raises(ValueError, match="tags describe square operators"):
        jacobian_operator(lambda x: x[:2], X, tags=["symmetric"])
