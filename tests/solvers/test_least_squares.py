"""diffopt.solvers.least_squares: standard problems against SciPy, derivatives by every solver, bounds, failures."""

import pytest
import scipy.optimize
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from diffopt.implicit import Implicit, Unrolled
from diffopt.linalg import CG, LSMR, SVD
from diffopt.solvers import (
    Dogleg,
    GaussNewton,
    LevenbergMarquardt,
    SciPyLeastSquares,
    SolverError,
    least_squares,
)
from diffopt.solvers.solution import CONVERGED, MAX_STEPS, NONFINITE, REFUSED, STALLED
from solvers.standard_problems import finite_difference

DOSE = torch.tensor([0.038, 0.194, 0.425, 0.626, 1.253, 2.5, 3.74], dtype=torch.float64)
RATE = torch.tensor([0.05, 0.127, 0.094, 0.2122, 0.2729, 0.2665, 0.3317], dtype=torch.float64)
START = torch.tensor([0.9, 0.2], dtype=torch.float64)
FITTED = torch.tensor([0.36183689, 0.55626653], dtype=torch.float64)
PUBLISHED = {"rtol": 0.0, "atol": 1e-7}  # the published digits are those of an iterate
TIGHT = {"rtol": 0.0, "atol": 1e-12}
SOLVERS = {
    "gauss-newton": GaussNewton(), "svd": GaussNewton(SVD()), "lsmr": GaussNewton(LSMR(rtol=1e-14)),
    "normal cg": GaussNewton(CG(rtol=1e-14)), "lm": LevenbergMarquardt(),
    "lm, cg": LevenbergMarquardt(linear_solver=CG(rtol=1e-14)), "dogleg": Dogleg(),
}  # fmt: skip
DAMPED = ["lm", "lm, cg", "dogleg"]
STANDARD = {  # start, residuals, the sums of squares at the local minima
    "rosenbrock": ([-1.2, 1.0], lambda x: [10 * (x[1] - x[0] ** 2), 1 - x[0]], [0.0]),
    "freudenstein-roth": (
        [0.5, -2.0],
        lambda x: [-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]],
        [0.0, 48.98425],
    ),
    "powell singular": (
        [3.0, -1.0, 0.0, 1.0],
        lambda x: [x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2],
        [0.0],
    ),
    "wood": (
        [-3.0, -1.0, -3.0, -1.0],
        lambda x: [10 * (x[1] - x[0] ** 2), 1 - x[0], 90**0.5 * (x[3] - x[2] ** 2), 1 - x[2],
                   10**0.5 * (x[1] + x[3] - 2), (x[1] - x[3]) / 10**0.5],
        [0.0],
    ),
    "beale": ([1.0, 1.0], lambda x: [y - x[0] * (1 - x[1] ** k) for k, y in ((1, 1.5), (2, 2.25), (3, 2.625))], [0.0]),
    "brown": ([1.0, 1.0], lambda x: [x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2], [0.0]),
    "jennrich-sampson": (
        [0.3, 0.4],
        lambda x: [2 + 2 * k - ((k * x[0]).exp() + (k * x[1]).exp()) for k in range(1, 11)],
        [124.36218],
    ),
    "bard": (
        [1.0, 1.0, 1.0],
        lambda x: [y - (x[0] + u / ((16 - u) * x[1] + min(u, 16 - u) * x[2])) for u, y in enumerate(
            [0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39], start=1)],
        [8.21488e-3],
    ),
}  # fmt: skip


def residuals(problem):
    return lambda x: torch.stack(STANDARD[problem][1](x))


def enzyme(c, rate):
    return c[0] * DOSE / (c[1] + DOSE) - rate


def fitted(name, rate, adjoint=None):
    return least_squares(enzyme, START, (rate,), solver=SOLVERS[name], adjoint=adjoint, **TIGHT).value


@pytest.mark.parametrize("name", DAMPED)
@pytest.mark.parametrize("problem", STANDARD)
def test_standard_problems(problem, name):
    start, _, minima = STANDARD[problem]
    solution = least_squares(residuals(problem), torch.tensor(start, dtype=torch.float64), solver=SOLVERS[name])
    assert solution.result == CONVERGED
    assert solution.stats.steps <= 100
    square = 2 * solution.state.value.item()
    assert min(abs(square - m) - 2e-6 * m for m in minima) <= 1e-8


@pytest.mark.parametrize("problem", ["rosenbrock", "wood", "bard", "jennrich-sampson"])
def test_against_scipy(problem):
    start = torch.tensor(STANDARD[problem][0], dtype=torch.float64)
    fn = residuals(problem)
    theirs = scipy.optimize.least_squares(
        lambda x: fn(torch.as_tensor(x)).numpy(), start.numpy(), method="lm", xtol=1e-13, ftol=1e-13, gtol=1e-13
    )
    for solver in (LevenbergMarquardt(), SciPyLeastSquares("lm")):
        mine = least_squares(fn, start, solver=solver)
        torch.testing.assert_close(mine.value, torch.as_tensor(theirs.x), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(mine.state.value.item(), theirs.cost, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_enzyme_fit_and_its_derivatives(name):
    torch.testing.assert_close(fitted(name, RATE), FITTED, **PUBLISHED)
    jacobian = jacrev(lambda y: fitted(name, y))(RATE)
    torch.testing.assert_close(jacobian, finite_difference(lambda y: fitted("lm", y), RATE, 1e-5), rtol=0, atol=1e-7)
    torch.testing.assert_close(jacfwd(lambda y: fitted(name, y))(RATE), jacobian, rtol=1e-9, atol=1e-11)
    leaf = RATE.clone().requires_grad_()
    for adjoint in (Implicit(), Unrolled()):
        (slope,) = torch.autograd.grad(fitted(name, leaf, adjoint).sum(), leaf)
        torch.testing.assert_close(slope, jacobian.sum(0), rtol=0, atol=1e-7)  # a linear rate leaves 1e-9 or so


def test_second_derivatives():
    def f(y, adjoint):
        return fitted("lm", y, adjoint)[1]

    implicit = hessian(lambda y: f(y, Implicit()))(RATE)
    torch.testing.assert_close(
        implicit, finite_difference(grad(lambda y: f(y, Implicit())), RATE, 1e-5), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(implicit, hessian(lambda y: f(y, Unrolled()))(RATE), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_vmap_is_the_loop_and_lanes_stop_on_their_own(name):
    rows = torch.stack([RATE, 0.8 * RATE + 0.05, RATE.flip(0) * 0.2 + RATE])

    def run(y):
        solution = least_squares(enzyme, START, (y,), solver=SOLVERS[name], **TIGHT)
        return solution.value, solution.stats.steps

    values, steps = vmap(run)(rows)
    singles = [run(y) for y in rows]
    torch.testing.assert_close(values, torch.stack([v for v, _ in singles]), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(steps, torch.stack([s for _, s in singles]), rtol=0, atol=2)  # rounding decides the last
    assert len(set(steps.tolist())) > 1


def test_a_batch_of_starts_is_the_loop():
    fn = residuals("rosenbrock")
    generator = torch.Generator().manual_seed(0)
    starts = 4 * torch.rand(256, 2, generator=generator, dtype=torch.float64) - 2

    def run(x):
        solution = least_squares(fn, x)
        return solution.value, solution.stats.steps

    values, steps = vmap(run)(starts)
    torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-6)
    for k in range(0, 256, 32):
        value, count = run(starts[k])
        torch.testing.assert_close(values[k], value, rtol=0, atol=1e-9)
        assert abs(int(steps[k]) - int(count)) <= 1


@pytest.mark.parametrize("name", SOLVERS)
def test_stepping_by_hand_is_the_verb(name):
    def fn(c):
        return enzyme(c, RATE)

    solution = least_squares(fn, START, solver=SOLVERS[name])
    state = SOLVERS[name].init(fn, START)
    for _ in range(int(solution.stats.steps)):
        state = SOLVERS[name].step(fn, state)
    for mine, verbs in zip(state, solution.state, strict=True):
        torch.testing.assert_close(mine, verbs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("make", [GaussNewton, LevenbergMarquardt, Dogleg], ids=lambda m: m.__name__)
def test_hyperparameters_are_differentiated_when_unrolled(make):
    field = {GaussNewton: "step_size", LevenbergMarquardt: "damping", Dogleg: "radius"}[make]

    def f(h):
        return least_squares(enzyme, START, (RATE,), solver=make(**{field: h}), adjoint=Unrolled(), throw=False,
                             max_steps=2, rtol=0.0, atol=0.0).value.sum()  # fmt: skip

    h, step = torch.tensor(0.3, dtype=torch.float64), 1e-6
    torch.testing.assert_close(grad(f)(h), (f(h + step) - f(h - step)) / (2 * step), rtol=1e-6, atol=1e-9)
    assert grad(f)(h) != 0


@pytest.mark.parametrize("solver", [LevenbergMarquardt(), LevenbergMarquardt(linear_solver=CG(rtol=1e-14))], ids=str)
def test_bounds_and_their_derivatives(solver):
    def f(top, adjoint=None):
        upper = torch.stack([top, torch.ones_like(top)])
        return least_squares(enzyme, 0.5 * START, (RATE,), bounds=(0.0, upper), solver=solver, adjoint=adjoint, **TIGHT)

    top = torch.tensor(0.3, dtype=torch.float64)
    theirs = scipy.optimize.least_squares(
        lambda c: enzyme(torch.as_tensor(c), RATE).numpy(), [0.2, 0.2], bounds=([0, 0], [0.3, 1]),
        xtol=1e-14, ftol=1e-14, gtol=1e-14,
    )  # fmt: skip
    solution = f(top)
    assert solution.value[0] == 0.3
    torch.testing.assert_close(solution.value, torch.as_tensor(theirs.x), rtol=1e-6, atol=0)
    slope = jacrev(lambda t: f(t).value)(top)
    expected = (f(top + 1e-5).value - f(top - 1e-5).value) / 2e-5
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(jacrev(lambda t: f(t, Unrolled()).value)(top), expected, rtol=1e-6, atol=1e-8)
    loose = f(torch.tensor(5.0, dtype=torch.float64))
    torch.testing.assert_close(loose.value, FITTED, **PUBLISHED)


def test_bounds_of_trees_under_vmap():
    def run(a):
        init = {"u": torch.zeros(2, dtype=torch.float64), "v": torch.zeros((), dtype=torch.float64)}
        fn = lambda x: (x["u"] - a, x["v"] - 3 * a)  # noqa: E731
        return least_squares(fn, init, bounds=(-1.0, {"u": torch.ones(2), "v": torch.tensor(2.0)})).value

    found = vmap(run)(torch.tensor([0.5, -4.0, 4.0], dtype=torch.float64))
    expected = torch.tensor([0.5, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found["u"], expected[:, None].expand(3, 2))
    torch.testing.assert_close(found["v"], torch.tensor([1.5, -1.0, 2.0], dtype=torch.float64))


def test_more_unknowns_than_residuals_and_many_unknowns():
    M = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = least_squares(lambda x: M @ x - 1, torch.zeros(5, dtype=torch.float64), solver=GaussNewton(), **TIGHT)
    torch.testing.assert_close(found.value, torch.linalg.pinv(M).sum(1))
    n = 400  # beyond the dense size: by products

    def fn(x):
        return torch.cat([x + 0.1 * x.roll(1) ** 2 - 1, 0.1 * (x - x.roll(1))])

    for solver in (GaussNewton(), LevenbergMarquardt()):
        solution = least_squares(fn, torch.zeros(n, dtype=torch.float64), solver=solver)
        assert solution.state.jacobian.shape == (0, n)
        torch.testing.assert_close(fn(solution.value), torch.zeros(2 * n, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_step_out_of_the_domain_is_not_taken_and_leaves_no_nan():
    start = torch.tensor([20.0, 1.0], dtype=torch.float64)
    for solver in (LevenbergMarquardt(), Dogleg(20.0)):
        for adjoint in (Implicit(), Unrolled()):

            def f(a, solver=solver, adjoint=adjoint):
                fn = lambda x: torch.stack([x[0].log() - a, x[1] - 2])  # noqa: E731
                return least_squares(fn, start, solver=solver, adjoint=adjoint, **TIGHT).value[0]

            a = torch.tensor(1.0, dtype=torch.float64)
            torch.testing.assert_close(grad(f)(a), a.exp(), rtol=1e-8, atol=0)


def test_failures_are_told():
    one = torch.ones(2, dtype=torch.float64)
    with pytest.raises(SolverError, match="the Jacobian is singular"):
        least_squares(residuals("beale"), one, solver=GaussNewton())
    assert least_squares(residuals("beale"), one, solver=GaussNewton(), throw=False).result == STALLED
    assert least_squares(lambda x: (x - 3).sqrt(), one, throw=False).result == NONFINITE
    few = least_squares(residuals("rosenbrock"), -one, max_steps=2, throw=False)
    assert few.result == MAX_STEPS
    assert few.state.value <= residuals("rosenbrock")(-one).square().sum() / 2
    assert least_squares(enzyme, START, (RATE,), rtol=0.0, atol=0.0, max_steps=60, throw=False).result != NONFINITE


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="Dogleg cannot handle bounds; use LevenbergMarquardt"):
        least_squares(enzyme, START, (RATE,), bounds=(0.0, 1.0), solver=Dogleg())
    with pytest.raises(ValueError, match="pair"):
        least_squares(enzyme, START, (RATE,), bounds=0.0)
    with pytest.raises(ValueError, match="learns the curvature"):
        fitted("lm", RATE, Unrolled(truncate=2))


def test_crossed_bounds_are_refused():
    found = least_squares(lambda x: x - 3, torch.ones(2), bounds=(2.0, 1.0), throw=False)
    assert int(found.result) == REFUSED
    with pytest.raises(SolverError, match="a lower bound lies above its upper"):
        least_squares(lambda x: x - 3, torch.ones(2), bounds=(2.0, 1.0), solver=SciPyLeastSquares())


@pytest.mark.parametrize("fn", [lambda x: x.double(), lambda x: (x > 0).long(), lambda x: x * 1j])
def test_residuals_of_another_dtype_are_refused(fn):
    with pytest.raises(TypeError, match=r"residuals of the dtype of init, torch\.float32"):
        least_squares(fn, torch.ones(2))


def test_residuals_and_starts_that_are_no_tensors_are_named():
    with pytest.raises(TypeError, match="the value of fn` must be a tensor"):
        least_squares(lambda x: 3.0, torch.ones(2))
    with pytest.raises(TypeError, match="`init` must be a tensor"):
        least_squares(lambda x: x, 1.0)


def test_no_unknowns_are_solved():
    assert least_squares(lambda x: x, torch.ones(0)).value.shape == (0,)


def test_constant_residuals_have_no_descent_but_an_answer():
    found = least_squares(lambda x: torch.ones(3, dtype=x.dtype), torch.ones(2, dtype=torch.float64))
    assert found.value.tolist() == [1.0, 1.0]
