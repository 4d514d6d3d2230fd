"""diffopt.implicit.root: the derivative of a root by its equation, against closed forms."""

import warnings

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from diffopt.implicit import root_jvp, root_vjp
from diffopt.linalg import CG, GMRES, ConvergenceWarning, Dense, NormalCG
from problems import equation, reference_root, root_args

F64 = torch.float64
RIDGE_TOL = 1e-8
TOL = 1e-10


@pytest.fixture(scope="module")
def ridge():
    """`(X, y, lam, w, dw/dlam)`: ridge regression, its solution and the derivative in closed form."""
    from sklearn.datasets import make_regression

    X, y = (torch.as_tensor(a, dtype=F64) for a in make_regression(10, 3, random_state=0))
    lam = torch.tensor(5.0, dtype=F64)
    H = X.T @ X / len(y) + lam * torch.eye(3, dtype=F64)
    w = torch.linalg.solve(H, X.T @ y / len(y))
    return X, y, lam, w, -torch.linalg.solve(H, w)


def ridge_slope(w, lam, X, y):
    return X.T @ (X @ w - y) / len(y) + lam * w


SOLVERS = [None, Dense(), CG(rtol=1e-13), GMRES(rtol=1e-13), NormalCG(rtol=1e-13)]


@pytest.mark.parametrize("solve", SOLVERS, ids=lambda s: type(s).__name__)
def test_ridge_against_the_closed_form(ridge, solve):
    X, y, lam, w, dw = ridge
    for i, row in enumerate(torch.eye(3, dtype=F64)):
        by_lam, by_X, by_y = root_vjp(ridge_slope, w, (lam, X, y), row, solve=solve, symmetric=True)
        assert torch.allclose(by_lam, dw[i], rtol=RIDGE_TOL, atol=RIDGE_TOL)

        def solution(X, y, i=i):
            H = X.T @ X / len(y) + lam * torch.eye(3, dtype=F64)
            return (torch.linalg.inv(H) @ X.T @ y / len(y))[i]

        for found, expected in zip((by_X, by_y), jacrev(solution, (0, 1))(X, y), strict=True):
            assert torch.allclose(found, expected, rtol=RIDGE_TOL, atol=RIDGE_TOL)
    tangents = torch.ones_like(lam), torch.zeros_like(X), torch.zeros_like(y)
    found = root_jvp(ridge_slope, w, (lam, X, y), tangents, solve=solve, symmetric=True)
    assert torch.allclose(found, dw, rtol=RIDGE_TOL, atol=RIDGE_TOL)


@pytest.mark.parametrize("theta", [0.0, torch.pi / 2, 1.0])
def test_cosine_equation(theta):
    """cos(x) + theta = x has dx/dtheta = 1 / (1 + sin x)."""
    theta = torch.tensor(theta, dtype=F64)
    x = theta.clone()
    for _ in range(60):
        x = x - (x - torch.cos(x) - theta) / (1 + torch.sin(x))
    if theta == 0:
        assert abs(x.item() - 0.739085) < 1e-6

    def f(x, theta):
        return torch.cos(x) + theta - x

    one = torch.ones((), dtype=F64)
    expected = 1 / (1 + torch.sin(x))
    assert torch.allclose(root_vjp(f, x, (theta,), one)[0], expected, rtol=TOL)
    assert torch.allclose(root_jvp(f, x, (theta,), (one,)), expected, rtol=TOL)


def test_both_rules_agree_with_the_unrolled_solver_under_transforms():
    a, b = root_args()
    x = reference_root(a, b)
    by_a, by_b = jacrev(reference_root, (0, 1))(a, b)
    rows = torch.eye(3, dtype=F64)
    found = vmap(lambda row: root_vjp(equation, x, (a, b), row))(rows)
    assert torch.allclose(found[0], by_a, rtol=TOL, atol=TOL)
    assert torch.allclose(found[1], by_b, rtol=TOL, atol=TOL)
    still = torch.zeros_like(b)
    columns = vmap(lambda column: root_jvp(equation, x, (a, b), (column, still)), out_dims=1)(rows)
    assert torch.allclose(columns, by_a, rtol=TOL, atol=TOL)


def test_the_rules_are_differentiable_in_solution_arguments_and_weight():
    """d/d(cotangent), d/d(sol), d/d(args) of the adjoint of x^2 - a at fixed x, which is v / (2 x)."""
    x, a, v = (torch.tensor(t, dtype=F64) for t in ([2.0, 3.0], [4.0, 9.0], [1.0, -0.5]))

    def adjoint(x, a, v):
        return root_vjp(lambda x, a: x**2 - a, x, (a,), v)[0]

    by_x, by_a, by_v = jacrev(adjoint, (0, 1, 2))(x, a, v)
    assert torch.allclose(by_v, torch.diag(1 / (2 * x)))
    assert torch.allclose(by_x, torch.diag(-v / (2 * x**2)))
    assert torch.allclose(by_a, torch.zeros(2, 2, dtype=F64))
    assert torch.allclose(jacfwd(adjoint)(x, a, v), by_x)
    w = v.clone().requires_grad_()
    assert torch.allclose(torch.autograd.grad(adjoint(x, a, w).sum(), w)[0], 1 / (2 * x))


def test_trees_static_leaves_and_integers():
    def f(x, params, power, mode):
        assert mode == "p"
        return {"u": [x["u"][0] ** power["n"] - params["a"]]}

    sol = {"u": [torch.tensor([2.0, 3.0], dtype=F64)]}
    args = {"a": torch.tensor([4.0, 9.0], dtype=F64), "none": None}, {"n": torch.tensor(2), "s": "x"}, "p"
    cotangent = {"u": [torch.ones(2, dtype=F64)]}
    by_params, by_power, by_mode = root_vjp(f, sol, args, cotangent)
    assert torch.allclose(by_params["a"], 1 / (2 * sol["u"][0]))
    assert by_params["none"] is None
    assert by_power["n"] is None
    assert by_mode == "p"
    tangent = {"a": torch.ones(2, dtype=F64), "none": None}, {"n": torch.tensor(0), "s": "x"}, "p"
    assert torch.allclose(root_jvp(f, sol, args, tangent)["u"][0], 1 / (2 * sol["u"][0]))


@pytest.mark.parametrize("n", [1, 8, 9, 300])
def test_sizes_on_both_sides_of_every_choice(n):
    generator = torch.Generator().manual_seed(n)
    M = 0.5 * torch.randn(n, n, dtype=F64, generator=generator) / n**0.5 + torch.eye(n, dtype=F64)
    b, v = (torch.randn(n, dtype=F64, generator=generator) for _ in range(2))
    (found,) = root_vjp(lambda x, b: M @ x - b, torch.linalg.solve(M, b), (b,), v)
    assert torch.allclose(found, torch.linalg.solve(M.T, v), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("transformed", [False, True])
def test_a_singular_jacobian_warns(transformed):
    def adjoint(v):
        return root_vjp(lambda x, a: x**2 - a, torch.zeros(1, dtype=F64), (torch.zeros(1, dtype=F64),), v)[0]

    v = torch.ones(1, dtype=F64)
    with pytest.warns(ConvergenceWarning, match="that derivative cannot be trusted.*the matrix is singular"):
        found = vmap(adjoint)(v[None]) if transformed else adjoint(v)
    assert not found.isfinite().any()


def test_an_adjoint_that_is_stopped_early_warns():
    d = torch.logspace(0, 4, 30, dtype=F64)
    with pytest.warns(ConvergenceWarning, match=r"did not converge \(GMRES\)"):
        root_vjp(lambda x, a: d * x - a, 1 / d, (torch.ones_like(d),), d, solve=GMRES(restart=2, max_restarts=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root_vjp(lambda x, a: d * x - a, 1 / d, (torch.ones_like(d),), d, solve=GMRES())


X2 = torch.tensor([2.0, 3.0], dtype=F64)
BAD = {
    "equation shape": (lambda: root_vjp(lambda x, a: (x - a).sum(), X2, (X2,), X2), ValueError, "shaped like the sol"),
    "equation structure": (lambda: root_vjp(lambda x, a: (x - a,), X2, (X2,), X2), ValueError, "tuple of 1"),
    "equation dtype": (lambda: root_vjp(lambda x, a: (x - a).float(), X2, (X2,), X2), TypeError, "dtype torch.float64"),
    "cotangent shape": (lambda: root_vjp(lambda x, a: x - a, X2, (X2,), X2[0]), ValueError, "`cotangent` must have sh"),
    "tangent shape": (lambda: root_jvp(lambda x, a: x - a, X2, (X2,), (X2[0],)), ValueError, "tangents must be like"),
    "tangent count": (lambda: root_jvp(lambda x, a: x - a, X2, (X2,), ()), ValueError, "tangents must be like args"),
    "integer solution": (lambda: root_vjp(lambda x: x, torch.arange(2), (), torch.arange(2)), TypeError, "floating-po"),
    "mixed solution": (
        lambda: root_vjp(lambda x: x, (X2, X2.float()), (), (X2, X2.float())), TypeError, "leaves of one dtype"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_raise(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_a_gradient_through_the_adjoint_of_a_captured_parameter():
    w = torch.tensor(2.0, dtype=F64, requires_grad=True)
    (found,) = root_vjp(lambda x, a: w * x - a, X2, (X2,), torch.ones_like(X2))
    assert torch.allclose(torch.autograd.grad(found.sum(), w)[0], torch.tensor(-0.5, dtype=F64))
    by_grad = grad(lambda w: root_vjp(lambda x, a: w * x - a, X2, (X2,), torch.ones_like(X2))[0].sum())
    assert torch.allclose(by_grad(w.detach()), torch.tensor(-0.5, dtype=F64))


def test_cg_on_a_jacobian_that_is_not_symmetric_is_noticed():
    """CG is taken at its word, but what it solves is the true adjoint system, whose residual tells."""
    A = torch.eye(8, dtype=torch.float64) + 0.05 * torch.ones(8, 8, dtype=torch.float64).triu(1) / 8**0.5
    b, w = torch.ones(8, dtype=torch.float64), torch.linspace(1, 2, 8, dtype=torch.float64)
    x = torch.linalg.solve(A, b)
    exact = torch.linalg.solve(A.mT, w)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (found,) = root_vjp(lambda x, b: A @ x - b, x, (b,), w, solve=CG())
    assert caught or torch.allclose(found, exact, rtol=1e-5)
