"""diffopt.implicit.diagnostics: the estimated error of a hypergradient against the true one."""

import pytest
import torch

from diffopt.implicit import KKT, Equation, diagnose, kkt_map, root_vjp, stationarity_map
from diffopt.linalg import CG
from diffopt.solvers import root

F64 = torch.float64


def ridge_loss(w, lam, X, y):
    return ((X @ w - y) ** 2).mean() / 2 + lam / 2 * (w @ w)


RIDGE = Equation(stationarity_map(ridge_loss), symmetric=True)


def ridge(seed=0, n=30, d=6):
    """`(lam, X, y), w`: a ridge regression and its solution in closed form."""
    generator = torch.Generator().manual_seed(seed)
    X, y = torch.randn(n, d, dtype=F64, generator=generator), torch.randn(n, dtype=F64, generator=generator)
    lam = torch.tensor(0.3, dtype=F64)
    return (lam, X, y), torch.linalg.solve(X.T @ X / n + lam * torch.eye(d, dtype=F64), X.T @ y / n)


def size(found):
    return torch.cat([part.reshape(-1) for part in found]).norm()


def error_of(found, true):
    return size([a - b for a, b in zip(found, true, strict=True)])


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_error_of_an_inexact_solution_is_estimated_within_a_factor_of_two(distance, seed):
    args, w = ridge(seed)
    away = torch.linspace(-1, 1.4, 6, dtype=F64)
    found, v = w + distance * away / away.norm(), torch.linspace(0.2, 1.0, 6, dtype=F64)
    true = error_of(root_vjp(RIDGE.residual, found, args, v), root_vjp(RIDGE.residual, w, args, v))
    diagnosis = diagnose(RIDGE, found, args, v)
    assert torch.allclose(diagnosis.distance, torch.tensor(distance, dtype=F64), rtol=1e-6)
    assert true / 2 <= diagnosis.gradient_error <= 2 * true
    assert diagnosis.adjoint_error < 1e-12
    assert bool(diagnosis.trustworthy) == (true < 0.01 * diagnosis.gradient_norm)


def test_a_cotangent_that_depends_on_the_solution_is_part_of_the_error():
    args, w = ridge()
    found = w + 1e-3
    cotangent = torch.func.grad(lambda w: (w**4).sum())
    pulled = [root_vjp(RIDGE.residual, point, args, cotangent(point)) for point in (found, w)]
    true = error_of(*pulled)
    assert true / 1.1 <= diagnose(RIDGE, found, args, cotangent).gradient_error <= 1.1 * true


@pytest.mark.parametrize("solver", [CG(max_steps=1), CG(max_steps=3)])
def test_the_error_of_an_inexact_adjoint_is_estimated(solver):
    args, w = ridge()
    v = torch.linspace(0.2, 1.0, 6, dtype=F64)
    with pytest.warns(UserWarning, match="did not converge"):
        rough = root_vjp(RIDGE.residual, w, args, v, solve=solver, symmetric=True)
    true = error_of(rough, root_vjp(RIDGE.residual, w, args, v))
    diagnosis = diagnose(RIDGE, w, args, v, solver)
    assert true > 1e-8
    assert torch.allclose(diagnosis.adjoint_error, true, rtol=1e-3)
    assert diagnosis.adjoint_residual > 1e-8


def test_the_conditioning_is_that_of_the_jacobian():
    args, w = ridge()
    H = args[1].T @ args[1] / 30 + args[0] * torch.eye(6, dtype=F64)
    diagnosis = diagnose(RIDGE, w, args, torch.ones_like(w))
    assert torch.allclose(diagnosis.condition, torch.linalg.cond(H))
    assert torch.allclose(diagnosis.inverse_norm, torch.linalg.matrix_norm(torch.linalg.inv(H), 2))


@pytest.mark.parametrize("symmetric", [True, False])
def test_many_unknowns_are_estimated_by_power_iterations(symmetric):
    values = torch.linspace(1.0, 50.0, 1500, dtype=F64)
    equation = Equation(lambda x, a: values * x - a, symmetric=symmetric)
    a = torch.linspace(-1, 2, 1500, dtype=F64)
    diagnosis = diagnose(equation, a / values + 1e-4, (a,), torch.ones_like(a))
    assert 40 < diagnosis.condition < 50.01
    assert diagnosis.solution_error < 1e-8, "the derivative of a linear equation in its right side is exact everywhere"
    assert bool(diagnosis.trustworthy)


def test_a_singular_hessian_is_flagged():
    (lam, X, y), _ = ridge()
    X = torch.cat([X, X[:, :1]], 1)
    w = torch.linalg.lstsq(X, y, driver="gelsd").solution
    diagnosis = diagnose(RIDGE, w, (0.0 * lam, X, y), torch.ones_like(w))
    assert bool(diagnosis.singular)
    assert not bool(diagnosis.trustworthy)
    assert "singular" in str(diagnosis)
    zero = diagnose(lambda x, a: 0 * x + 0 * a, torch.ones(2), (torch.ones(2),), torch.ones(2))
    assert bool(zero.singular)
    assert not bool(zero.trustworthy)


def test_it_reads_well():
    args, w = ridge()
    v = torch.ones_like(w)
    assert "can be trusted" in str(diagnose(RIDGE, w, args, v))
    assert "the solution is too inexact" in str(diagnose(RIDGE, w + 0.3, args, v))
    assert "the adjoint solve is too inexact" in str(diagnose(RIDGE, w, args, v, CG(max_steps=1)))


def test_the_verdict_blames_neither_the_adjoint_for_rounding_nor_for_a_wrong_equation():
    args, w = ridge()
    X, a = args[1][:6], torch.linspace(-2, 1, 6, dtype=F64)
    flat = diagnose(lambda x, a: X @ (x - a.softmax(0)), a.softmax(0), (a,), torch.ones_like(a))  # of sum 1, always
    assert flat.gradient_norm < 1e-13
    assert "it is zero" in str(flat)
    found = diagnose(RIDGE, w, args, torch.ones_like(w))._replace(solution_error=torch.tensor(torch.nan, dtype=F64))
    assert "this is not its equation" in str(found)


def test_trees_and_kkt_points():
    objective, constraint = lambda x, a: (x["p"] ** 2).sum() + x["q"] ** 2, lambda x, a: x["p"].sum() + x["q"] - a
    point = KKT({"p": torch.ones(2, dtype=F64), "q": torch.tensor(1.0, dtype=F64)}, torch.tensor(-2.0, dtype=F64))
    a = torch.tensor(3.0, dtype=F64)
    diagnosis = diagnose(kkt_map(objective, equality=constraint), point, (a,), point)
    assert diagnosis.residual < 1e-14
    assert bool(diagnosis.trustworthy)


def test_it_is_for_eager_code():
    with pytest.raises(RuntimeError, match="eager"):
        torch.func.grad(lambda x: diagnose(torch.sin, x, (), x).residual)(torch.tensor(1.0))
    with pytest.raises(ValueError, match="shaped like"):
        diagnose(lambda x: x[:1], torch.ones(2), (), torch.ones(2))
    with pytest.raises(ValueError, match="cotangent"):
        diagnose(torch.sin, torch.ones(2), (), torch.ones(3))
    with pytest.raises(TypeError, match="linear_solver"):
        diagnose(torch.sin, torch.ones(2), (), torch.ones(2), CG)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_solution_that_is_not_finite_is_refused(bad):
    x = torch.tensor([0.7, bad])
    with pytest.raises(ValueError, match="The solve failed"):
        diagnose(lambda x, a: x**3 + x - a, x, (torch.ones(2),), torch.ones(2))


def test_a_jacobian_that_is_not_finite_is_singular():
    x = torch.zeros(2, dtype=torch.float64)
    found = diagnose(lambda x, a: x.sqrt() - a, x, (x,), torch.ones_like(x))
    assert bool(found.singular)
    assert not bool(found.trustworthy)


def test_a_cotangent_of_zero_leaves_no_residual():
    x = torch.full((2,), 1.0, dtype=torch.float64)
    found = diagnose(lambda x, a: x**3 - a, x, (x,), torch.zeros_like(x))
    assert float(found.adjoint_residual) == 0


def test_arguments_and_precision_are_checked():
    x = torch.ones(2)
    with pytest.raises(TypeError, match="args as a tuple; got Tensor"):
        diagnose(lambda x, a: x - a, x, x, x)
    half = x.bfloat16()
    with pytest.raises(TypeError, match="diagnose needs float32 or float64"):
        diagnose(lambda x, a: x - a, half, (half,), half)


def test_a_whole_solution_is_refused():
    solution = root(lambda x, a: x**2 - a, torch.ones(1), (torch.full((1,), 4.0),))
    with pytest.raises(TypeError, match=r"Write solution\.value"):
        diagnose(lambda x, a: x**2 - a, solution, (torch.full((1,), 4.0),), torch.ones(1))
