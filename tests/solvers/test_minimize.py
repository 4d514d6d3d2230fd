"""diffopt.solvers.minimize: the verb itself, its checks, failures, adjoints and reports."""

import math

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from diffopt.implicit.adjoints import Detached, Implicit, OneStep, Unrolled
from diffopt.linalg import CG
from diffopt.solvers import (
    BFGS,
    LBFGS,
    LBFGSB,
    GradientDescent,
    NelderMead,
    NewtonCG,
    NonlinearCG,
    SolverError,
    TrustRegion,
    minimize,
)
from diffopt.solvers.solution import CONVERGED, MAX_STEPS, NONFINITE, STALLED
from solvers.standard_problems import f64, quartic, rosenbrock

SMOOTH = [BFGS(), LBFGS(), NonlinearCG(), NewtonCG(), TrustRegion(), GradientDescent()]
THETA, START = f64(0.7, -0.5), f64(0.3, -0.4, 0.9)


def ridge(w, l2, X, y):
    return ((X @ w - y) ** 2).mean() / 2 + l2 / 2 * w @ w


def data():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((10, 3), (10,)))


def closed(l2, X, y):
    return torch.linalg.solve(X.mT @ X / len(y) + l2 * torch.eye(3, dtype=X.dtype), X.mT @ y / len(y))


@pytest.mark.parametrize("solver", [None, *SMOOTH], ids=lambda s: type(s).__name__)
def test_ridge_and_its_derivatives(solver):
    X, y = data()
    l2 = f64(0.5)[0]

    def solution(l2, X, y):
        return minimize(ridge, torch.ones_like(X[0]), (l2, X, y), solver=solver, rtol=0.0, atol=1e-9).value

    torch.testing.assert_close(solution(l2, X, y), closed(l2, X, y), rtol=0, atol=1e-7)
    for transform in (jacrev, jacfwd):
        expected = transform(closed, argnums=(0, 1, 2))(l2, X, y)
        torch.testing.assert_close(transform(solution, argnums=(0, 1, 2))(l2, X, y), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(hessian(lambda l2: solution(l2, X, y).sum())(l2),
                               hessian(lambda l2: closed(l2, X, y).sum())(l2), rtol=0, atol=1e-6)  # fmt: skip


def test_linear_solvers_of_the_adjoint():
    X, y = data()
    l2, adjoint = f64(0.5)[0], Implicit(CG())
    found = grad(lambda l2: minimize(ridge, torch.ones_like(X[0]), (l2, X, y), adjoint=adjoint).value.sum())(l2)
    torch.testing.assert_close(found, grad(lambda l2: closed(l2, X, y).sum())(l2), rtol=0, atol=1e-6)


def test_other_adjoints():
    solve = lambda theta, adjoint: minimize(quartic, START, (theta,), adjoint=adjoint).value.sum()  # noqa: E731
    exact = grad(solve)(THETA, Implicit())
    torch.testing.assert_close(grad(solve)(THETA, Detached()), torch.zeros(2, dtype=torch.float64))
    assert torch.nn.functional.cosine_similarity(grad(solve)(THETA, OneStep(0.3)), exact, dim=0) > 0.9
    for checkpoint in (None, "sqrt"):
        torch.testing.assert_close(grad(solve)(THETA, Unrolled(checkpoint=checkpoint)), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", [BFGS(), LBFGS(), NonlinearCG()], ids=lambda s: type(s).__name__)
def test_truncated_unrolling_of_learned_curvature_is_refused(solver):
    with pytest.raises(ValueError, match="learns the curvature from its steps"):
        minimize(quartic, START, (THETA,), solver=solver, adjoint=Unrolled(truncate=3))


def test_trees_and_captured_tensors():
    target = {"a": f64(1.0, 2.0), "b": f64([3.0])}

    def solution(target):
        loss = lambda x: ((x["a"] - target["a"]) ** 2).sum() + ((x["b"] - target["b"]) ** 4 + x["b"] ** 2).sum()  # noqa: E731
        return minimize(loss, {"a": f64(0.1, 0.2), "b": f64([0.3])}).value

    found = solution(target)
    torch.testing.assert_close(found["a"], target["a"], rtol=0, atol=1e-7)
    slopes = grad(lambda t: solution(t)["b"].sum())(target)
    z = target["b"] - found["b"]
    torch.testing.assert_close(slopes["b"], 12 * z**2 / (12 * z**2 + 2), rtol=0, atol=1e-6)


def test_at_the_minimizer_no_step_is_taken():
    for solver in (*SMOOTH, LBFGSB()):
        options = {"bounds": (-9.0, 9.0)} if isinstance(solver, LBFGSB) else {}
        found = minimize(rosenbrock, f64(1.0, 1.0), solver=solver, **options)
        assert int(found.stats.steps) == 0
        assert bool(found.converged)


@pytest.mark.parametrize("solver", [*SMOOTH, NelderMead(), LBFGSB()], ids=lambda s: type(s).__name__)
def test_nan_is_reported(solver):
    fn = lambda x: (x * x).sum() * math.nan  # noqa: E731
    options = {"bounds": (-9.0, 9.0)} if isinstance(solver, LBFGSB) else {}
    found = minimize(fn, f64(1.0, 2.0), solver=solver, throw=False, **options)
    assert int(found.result) == NONFINITE
    assert "became NaN or infinite" in found.message
    with pytest.raises(SolverError, match=r"minimize did not converge .* NaN or infinite.* Pass throw=False"):
        minimize(fn, f64(1.0, 2.0), solver=solver, **options)


@pytest.mark.parametrize("solver", [*SMOOTH, NelderMead()], ids=lambda s: type(s).__name__)
def test_unbounded_below_is_reported(solver):
    for fn in (lambda x: x.sum(), lambda x: -(x**4).sum()):
        found = minimize(fn, f64(1.0, 2.0), solver=solver, throw=False, max_steps=200)
        assert int(found.result) in (MAX_STEPS, NONFINITE, STALLED)


@pytest.mark.parametrize(
    "solver", [BFGS(), LBFGS(), NonlinearCG(), NewtonCG(), GradientDescent()], ids=lambda s: type(s).__name__
)
def test_a_wrong_derivative_stalls(solver):
    def fn(x):
        return (x * x).sum() - 2 * (x.detach() ** 2).sum()  # falls where its derivative says it rises

    found = minimize(fn, f64(1.0, 2.0), solver=solver, throw=False)
    assert int(found.result) in (STALLED, MAX_STEPS, NONFINITE)


def test_max_steps_is_reported_and_the_best_iterate_returned():
    values = []
    found = minimize(rosenbrock, f64(-1.2, 1.0), solver=GradientDescent(0.002), max_steps=12, throw=False,
                     callback=lambda state: values.append(float(state.value)))  # fmt: skip
    assert int(found.result) == MAX_STEPS
    assert int(found.stats.steps) == len(values) == 12
    assert float(rosenbrock(found.value)) == min([*values, float(rosenbrock(f64(-1.2, 1.0)))])
    with pytest.raises(SolverError, match="the most steps were taken"):
        minimize(rosenbrock, f64(-1.2, 1.0), max_steps=2)


def test_history():
    found = minimize(rosenbrock, f64(-1.2, 1.0), history=True, max_steps=60)
    history, steps = found.stats.history, int(found.stats.steps)
    assert history.shape == (61,)
    assert history[: steps + 1].isfinite().all()
    assert history[steps + 1 :].isnan().all()
    assert history[steps] == found.stats.error


def test_one_lane_of_many_fails():
    fn = lambda x, a: (a * x * x).sum() + (x**4).sum().clamp(max=1.0) * 0  # noqa: E731
    run = lambda a, throw: minimize(fn, f64(1.0), (a,), max_steps=50, throw=throw)  # noqa: E731
    a = f64(1.0, -1.0, 2.0)
    found = vmap(lambda a: run(a, False))(a)
    assert found.result[[0, 2]].tolist() == [CONVERGED, CONVERGED]
    assert int(found.result[1]) != CONVERGED
    torch.testing.assert_close(found.value[[0, 2]], torch.zeros(2, 1, dtype=torch.float64))
    with pytest.raises(SolverError, match="in every lane"):
        vmap(lambda a: run(a, None))(a)


def test_dtypes():
    for dtype, atol in ((torch.float32, 3e-3), (torch.float64, 1e-7)):
        for solver in SMOOTH[:-1]:
            found = minimize(rosenbrock, torch.tensor([-1.2, 1.0], dtype=dtype), solver=solver)
            assert found.value.dtype == dtype
            torch.testing.assert_close(found.value, torch.ones(2, dtype=dtype), rtol=0, atol=atol)


def test_arguments_are_checked():
    x = f64(1.0, 2.0)
    with pytest.raises(ValueError, match=r"needs a function of a scalar value.*got \(2,\)"):
        minimize(lambda x: x * x, x)
    with pytest.raises(ValueError, match=r"bounds must be a pair"):
        minimize(rosenbrock, x, bounds=1.0)
    with pytest.raises(ValueError, match=r"BFGS cannot handle bounds; use LBFGSB"):
        minimize(rosenbrock, x, bounds=(0.0, 1.0), solver=BFGS())
    with pytest.raises(TypeError, match=r"args as a tuple"):
        minimize(quartic, START, THETA)
    with pytest.raises(TypeError, match=r"needs a solver with init and step"):
        minimize(rosenbrock, x, solver=BFGS)
    with pytest.raises(ValueError, match=r"takes one structure; got bounds and prox"):
        minimize(rosenbrock, x, bounds=(0.0, 1.0), prox=lambda x, s: x)


def test_bounds_take_the_default_solver():
    found = minimize(lambda x: ((x["a"] - 2) ** 2).sum(), {"a": f64(0.1, 0.2)}, bounds=(None, {"a": f64(1.0, 5.0)}))
    torch.testing.assert_close(found.value["a"], f64(1.0, 2.0), rtol=0, atol=1e-7)


@pytest.mark.parametrize("init", [1.0, {"a": torch.ones(2), "b": "s"}])
def test_a_start_that_is_no_tensor_is_named(init):
    with pytest.raises(TypeError, match=r"`init.* must be a tensor"):
        minimize(lambda x: x, init)


def test_an_integer_value_is_refused():
    with pytest.raises(TypeError, match=r"of a floating-point value; got torch\.int64"):
        minimize(lambda x: (x > 0).sum(), torch.ones(2))


def test_half_precision_is_refused_where_torch_has_no_factorization():
    loss = lambda x: ((x - 2) ** 2).sum()  # noqa: E731
    with pytest.raises(TypeError, match="bfloat16: start from float32"):
        minimize(loss, torch.ones(2, dtype=torch.bfloat16), bounds=(0.0, 1.5))
    found = minimize(loss, torch.ones(2, dtype=torch.bfloat16), solver=BFGS())
    assert torch.equal(found.value, torch.full((2,), 2.0, dtype=torch.bfloat16))


def test_one_step_is_refused_with_constraints():
    with pytest.raises(ValueError, match="OneStep is no derivative of a constrained minimizer"):
        minimize(
            lambda x: (x**2).sum(), torch.ones(2), equality=lambda x: x.sum() - 1, adjoint=OneStep(0.1)
        )  # fmt: skip
