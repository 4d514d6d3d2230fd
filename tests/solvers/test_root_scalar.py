"""diffopt.solvers.root_scalar: roots of one equation, their derivatives, and brackets that are refused."""

import math

import pytest
import scipy.optimize
import torch
from torch.func import grad, hessian, jvp, vmap

from diffopt.implicit import Implicit, Unrolled
from diffopt.solvers import Bisection, Brent, Broyden, Chord, Newton, SolverError, root_scalar
from diffopt.solvers.solution import CONVERGED, MAX_STEPS, NONFINITE, REFUSED, STALLED

DOTTIE = 0.7390851332151607
EXACT = {"rtol": 0.0, "atol": 1e-14}
BRACKETING = {"bisection": Bisection(), "brent": Brent()}
PROBLEMS = {  # function, ends
    "cosine": (lambda x: torch.cos(x) - x, 0.0, 2.0),
    "cubic": (lambda x: x**3 - 2 * x - 5, 2.0, 3.0),
    "exponential": (lambda x: torch.exp(x) - 1e3 * x, 0.0, 1.0),
    "flat": (lambda x: (x - 1) ** 9, -3.0, 3.4),
    "steep": (lambda x: torch.atan(1e6 * (x - 0.3)), -5.0, 9.0),
    "root at an end": (lambda x: x * (x - 1), 1.0, 5.0),
    "near zero": (lambda x: x - 1e-20, -1.0, 1.5),
    "ends in the wrong order": (lambda x: x**3 - 2, 3.0, -1.0),
}


def dottie(theta, solver, adjoint=None, bracket=(-1.0, 3.0)):
    def fn(x, t):
        return torch.cos(x) + t - x

    return root_scalar(fn, args=(theta,), bracket=bracket, solver=solver, adjoint=adjoint, **EXACT).value


def number(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("solver", BRACKETING)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_against_brentq(problem, solver):
    fn, a, b = PROBLEMS[problem]
    solution = root_scalar(fn, bracket=(number(a), number(b)), solver=BRACKETING[solver])
    theirs = scipy.optimize.brentq(lambda x: float(fn(number(x))), a, b, xtol=1e-12, maxiter=1000)
    assert solution.result == CONVERGED
    assert abs(solution.value.item() - theirs) <= 2 * 1.5e-8  # the bound that the tolerances ask for, and theirs
    assert solution.stats.error <= 1.5e-8 + 1e-9


def test_brent_takes_few_evaluations():
    for problem in ("cosine", "cubic", "exponential"):
        fn, a, b = PROBLEMS[problem]
        mine = root_scalar(fn, bracket=(number(a), number(b)))
        _, theirs = scipy.optimize.brentq(lambda x: float(fn(number(x))), a, b, xtol=1.5e-8, full_output=True)  # noqa: B023
        assert mine.stats.steps <= theirs.function_calls + 1


@pytest.mark.parametrize("solver", [Bisection(), Brent(), Newton(), Chord(), Broyden()], ids=lambda s: type(s).__name__)
def test_cosine_and_its_derivatives(solver):
    theta = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    values = vmap(lambda t: dottie(t, solver))(theta)
    assert abs(values[0].item() - DOTTIE) < 1e-13
    slope, curvature = 1 / (1 + values.sin()), -values.cos() / (1 + values.sin()) ** 3
    torch.testing.assert_close(vmap(grad(lambda t: dottie(t, solver)))(theta), slope, rtol=1e-11, atol=0)
    torch.testing.assert_close(vmap(hessian(lambda t: dottie(t, solver)))(theta), curvature, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        jvp(lambda t: dottie(t, solver), (theta[0],), (theta[2],))[1], slope[0], rtol=1e-11, atol=0
    )


@pytest.mark.parametrize("solver", [Newton(), Chord(), Broyden()], ids=lambda s: type(s).__name__)
def test_unrolled_solvers_without_bracket(solver):
    found = grad(lambda t: dottie(t, solver, Unrolled()))(number(0.3))
    torch.testing.assert_close(found, grad(lambda t: dottie(t, solver, Implicit()))(number(0.3)), rtol=1e-8, atol=0)


def test_at_the_end_of_the_range_of_the_cosine():
    value = dottie(number(math.pi / 2), Brent(), bracket=(1.0, 2.0))
    torch.testing.assert_close(value, number(math.pi / 2), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad(lambda t: dottie(t, Brent(), bracket=(1.0, 2.0)))(number(math.pi / 2)), number(0.5))


@pytest.mark.parametrize("solver", BRACKETING)
def test_lanes_stop_on_their_own_and_brackets_are_mapped(solver):
    theta, low = torch.linspace(0, 1, 5, dtype=torch.float64), -torch.logspace(0, 3, 5, dtype=torch.float64)

    def run(t, lo):
        solution = root_scalar(lambda x: torch.cos(x) + t - x, bracket=(lo, 3.0), solver=BRACKETING[solver])
        return solution.value, solution.stats.steps

    values, steps = vmap(run)(theta, low)
    singles = [run(t, lo) for t, lo in zip(theta, low, strict=True)]
    assert torch.equal(values, torch.stack([v for v, _ in singles]))
    assert steps.tolist() == [s.item() for _, s in singles]
    assert len(set(steps.tolist())) > 1


def test_brackets_carry_no_gradient():
    ends = number(0.0).requires_grad_(), number(2.0).requires_grad_()
    for solver in BRACKETING.values():
        found = root_scalar(lambda x: torch.cos(x) - x, bracket=ends, solver=solver).value
        assert not found.requires_grad or torch.autograd.grad(found, ends, allow_unused=True) in [(None, None), (0, 0)]
    slope = grad(lambda a: root_scalar(lambda x: torch.cos(x) - x, bracket=(a, 2.0)).value)(number(0.0))
    assert slope == 0


@pytest.mark.parametrize("solver", BRACKETING)
def test_a_bad_bracket_is_refused(solver):
    def run(**options):
        return root_scalar(lambda x: x**2 + 1, bracket=(number(0.0), number(1.0)), solver=BRACKETING[solver], **options)

    with pytest.raises(SolverError, match="the ends of the bracket have values of the same sign"):
        run()
    solution = run(throw=False)
    assert solution.result == REFUSED
    assert solution.stats.steps == 0
    results = vmap(
        lambda a: root_scalar(lambda x: x - a, bracket=(0.0, 1.0), solver=BRACKETING[solver], throw=False).result
    )(torch.tensor([0.3, 2.0, 0.9], dtype=torch.float64))
    assert results.tolist() == [CONVERGED, REFUSED, CONVERGED]


@pytest.mark.parametrize("solver", BRACKETING)
def test_poles_nan_and_too_few_steps(solver):
    def run(fn, **options):
        return root_scalar(fn, bracket=(number(0.0), number(1.0)), solver=BRACKETING[solver], throw=False, **options)

    assert run(lambda x: 1 / (x - 0.3)).result == STALLED
    assert run(lambda x: (x - 0.5).sqrt() - 0.1).result == NONFINITE
    assert run(lambda x: (x - 0.3) * (1 - (x - 0.5).abs()).log().nan_to_num(0.0) + x - 0.3).result == CONVERGED
    assert run(lambda x: torch.cos(x) - x, max_steps=2, rtol=0.0).result == MAX_STEPS
    assert run(lambda x: x**3 - 0.1, rtol=0.0, atol=0.0, max_steps=500).result in (CONVERGED, STALLED)


@pytest.mark.parametrize("solver", BRACKETING)
def test_brackets_expand(solver):
    solver = BRACKETING[solver]
    for options in (
        {"bracket": (number(0.0), number(1.0))},
        {"init": number(0.5)},
        {"bracket": (number(20.0), number(21.0))},
    ):
        found = root_scalar(lambda x: x**3 - 1000, solver=solver, expand=True, **options)
        torch.testing.assert_close(found.value, number(10.0), rtol=1e-8, atol=0)
    starts = torch.tensor([0.5, -50.0, 9.0], dtype=torch.float64)
    found = vmap(lambda x: root_scalar(lambda x: x**3 - 1000, x, solver=solver, expand=True).value)(starts)
    torch.testing.assert_close(found, torch.full_like(starts, 10.0), rtol=1e-8, atol=0)
    with pytest.raises(SolverError, match="same sign"):
        root_scalar(lambda x: x**2 + 1, number(0.5), solver=solver, expand=True)


@pytest.mark.parametrize("solver", BRACKETING)
def test_stepping_by_hand_is_the_verb(solver):
    from diffopt.solvers import ScalarEquation

    fn, (a, b) = PROBLEMS["cubic"][0], (number(2.0), number(3.0))
    solution = root_scalar(fn, bracket=(a, b), solver=BRACKETING[solver])
    problem = ScalarEquation(fn, a[None], b[None])
    state = BRACKETING[solver].init(problem, a[None])
    for _ in range(int(solution.stats.steps)):
        state = BRACKETING[solver].step(problem, state)
    assert all(torch.equal(x, y) for x, y in zip(state, solution.state, strict=True))
    assert torch.equal(state.x[0], solution.value)


def test_the_default_solver_and_numbers_for_tensors():
    assert root_scalar(lambda x: x**2 - 2, 1.0).value.dtype == torch.float32
    assert root_scalar(lambda x, a: x**2 - a, bracket=(0, 2), args=(number(2.0),)).value.dtype == torch.float64
    two = number(2.0)
    assert root_scalar(lambda x: x**2 - two, bracket=(0, 2)).value.dtype == torch.float64
    newton = root_scalar(lambda x: x**2 - 2, bracket=(number(0.0), number(2.0)), solver=Newton())
    torch.testing.assert_close(newton.value, number(2.0).sqrt())


def test_wrong_arguments_say_what_to_do():
    def fn(x):
        return x - 1

    with pytest.raises(ValueError, match="Use vmap"):
        root_scalar(fn, torch.ones(2))
    with pytest.raises(ValueError, match="For systems use `root`"):
        root_scalar(lambda x: torch.stack([x, x]), torch.tensor(1.0))
    with pytest.raises(ValueError, match="needs init"):
        root_scalar(fn)
    with pytest.raises(ValueError, match="Bisection needs bracket"):
        root_scalar(fn, 0.0, solver=Bisection())
    with pytest.raises(ValueError, match="Newton keeps no bracket"):
        root_scalar(fn, 0.0, solver=Newton(), expand=True)
    with pytest.raises(ValueError, match="pair of two ends"):
        root_scalar(fn, bracket=1.0)
    with pytest.raises(ValueError, match="depend on signs"):
        root_scalar(fn, bracket=(0.0, 2.0), adjoint=Unrolled())


@pytest.mark.parametrize("options", [{"init": 1j}, {"init": "1"}, {"init": None, "bracket": (None, 5.0)}])
def test_what_is_no_number_is_named(options):
    with pytest.raises(TypeError, match="to be a number or a 0-d tensor; got"):
        root_scalar(lambda x: x**3 - 8, **options)
