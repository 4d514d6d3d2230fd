"""diffopt.solvers.lbfgsb: minimizers within bounds, SciPy, corners, derivatives in the bounds and the problem."""

import math

import pytest
import scipy.optimize
import torch
from torch.func import jacfwd, jacrev, vmap

from diffopt.solvers import LBFGSB, Backtracking, Zoom, minimize
from diffopt.solvers.lbfgsb import LBFGSBState, _cauchy_point, _model
from diffopt.solvers.solution import REFUSED
from solvers.minimizer_checks import check_by_hand, check_derivatives, check_lanes, check_memory, check_minimizer
from solvers.standard_problems import PROBLEMS, f64, finite_difference, rosenbrock

D = f64(1.5)


def fitted(x, lower, upper, d=D):
    """argmin_p 1/2 (p - d x)^2 within bounds."""
    loss = lambda p, x, d: ((p - d * x) ** 2).sum() / 2  # noqa: E731
    return minimize(loss, torch.zeros_like(x), (x, d), bounds=(lower, upper)).value


@pytest.mark.parametrize("bounds", [(-10.0, 10.0), (None, 10.0), (-10.0, None), (-math.inf, 10.0)])
def test_derivative_within_the_bounds_is_exact(bounds):
    x = f64(0.7, -1.2, 2.0)
    torch.testing.assert_close(fitted(x, *bounds), 1.5 * x)
    J = jacrev(lambda x: fitted(x, *bounds))(x)
    torch.testing.assert_close(J, 1.5 * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-14)


def test_derivative_at_the_bounds_is_that_of_the_bounds():
    x, lower, upper = f64(0.4, -2.0, 3.0), f64(-1.0, -0.5, -2.0), f64(2.0, 1.0, 2.5)
    torch.testing.assert_close(fitted(x, lower, upper), f64(0.6, -0.5, 2.5))
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(lambda x: fitted(x, lower, upper))(x), torch.diag(f64(1.5, 0.0, 0.0)))
        torch.testing.assert_close(transform(lambda b: fitted(x, b, upper))(lower), torch.diag(f64(0.0, 1.0, 0.0)))
        torch.testing.assert_close(transform(lambda b: fitted(x, lower, b))(upper), torch.diag(f64(0.0, 0.0, 1.0)))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_linear_objective_ends_in_the_corner(scale):
    c = scale * f64(1.0, -2.0, 0.5)
    found = minimize(lambda x: c @ x, f64(0.3, 0.2, -0.1), bounds=(-1.0, 1.0), rtol=0.0, atol=1e-12)
    assert found.value.tolist() == [-1.0, 1.0, -1.0]


def test_concave_objective_ends_in_a_corner():
    found = minimize(lambda x: -(x * x).sum() + 0.1 * x.sum(), f64(0.3, -0.2), bounds=(-1.0, 2.0))
    assert found.value.tolist() == [2.0, -1.0]


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n not in ("brown_badly_scaled", "rosenbrock_100")])
def test_without_active_bounds(name):
    atol = 1e-2 if name == "powell_singular" else 1e-5
    check_minimizer(LBFGSB(), name, within=atol, bounds=(-100.0, 100.0))


@pytest.mark.parametrize("upper", [0.5, 0.3, None])
def test_rosenbrock_in_a_box_is_that_of_scipy(upper):
    start = torch.full((6,), -0.9, dtype=torch.float64)
    lower = f64(-1.0, -1.0, -1.0, -0.5, -1.0, -1.0)
    found = minimize(rosenbrock, start, bounds=(lower, upper))
    peer = scipy.optimize.minimize(
        scipy.optimize.rosen, start.numpy(), jac=scipy.optimize.rosen_der, method="L-BFGS-B",
        bounds=[(low, upper) for low in lower.tolist()], options={"ftol": 0.0, "gtol": 1e-10},
    )  # fmt: skip
    # SciPy may stop early, where the value no longer falls
    assert float(rosenbrock(found.value)) <= peer.fun + 1e-9
    torch.testing.assert_close(found.value, torch.as_tensor(peer.x), rtol=0, atol=1e-3)


def test_nonnegative_least_squares_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(10, 5, dtype=torch.float64, generator=generator)
    b = torch.randn(10, dtype=torch.float64, generator=generator)
    found = minimize(lambda x: ((A @ x - b) ** 2).sum(), torch.ones(5, dtype=torch.float64), bounds=(0.0, None))
    expected, _ = scipy.optimize.nnls(A.numpy(), b.numpy())
    torch.testing.assert_close(found.value, torch.as_tensor(expected), atol=1e-7, rtol=0)


def test_every_iterate_is_within_the_bounds():
    seen = []
    minimize(lambda x: -x.log().sum() + (x * f64(3.0, 0.5)).sum(), f64(5.0, -1.0), bounds=(1e-3, 1.5),
             callback=lambda state: seen.append(state.x))  # fmt: skip
    assert all(bool(((x >= 1e-3) & (x <= 1.5)).all()) for x in seen)
    torch.testing.assert_close(seen[-1], f64(1 / 3, 1.5))


def test_cauchy_point_is_the_first_minimizer_along_the_path():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
        A = draw(5, 5)
        steps = draw(3, 5)
        changes = steps @ (A @ A.mT + torch.eye(5, dtype=torch.float64))
        x, g = draw(5), draw(5)
        lower, upper = x - draw(5).abs(), x + draw(5).abs()
        false = torch.zeros((), dtype=torch.bool)
        model = _model(LBFGSBState(x, g, false, x[0], g, steps, changes, draw(()).exp()))
        found = _cauchy_point(model, x, g, lower, upper)
        path = torch.linspace(0, 5, 1001, dtype=torch.float64)[:, None]
        moves = (x - path * g).clamp(lower, upper) - x
        values = moves @ g + torch.stack([m @ model.product(m) for m in moves]) / 2
        rises = (values[1:] > values[:-1]).nonzero()
        first = int(rises[0]) if len(rises) else len(values) - 1
        # the grid has steps of 0.005 in t
        torch.testing.assert_close(found, x + moves[first], rtol=0, atol=0.006 * float(g.abs().max()))


def test_crossed_bounds_are_refused():
    found = minimize(lambda x: (x * x).sum(), f64(0.3, 0.4), bounds=(1.0, -1.0), throw=False)
    assert int(found.result) == REFUSED


def test_options_are_checked():
    with pytest.raises(ValueError, match="memory must be a positive int"):
        LBFGSB(memory=0)
    for search in (Zoom(), Backtracking("wolfe")):
        with pytest.raises(ValueError, match="line_search must be Backtracking"):
            LBFGSB(line_search=search)


def test_by_hand():
    check_by_hand(LBFGSB())


def test_lanes_equal_the_loop():
    check_lanes(LBFGSB(), bounds=(-1.0, 0.8))


def test_lanes_of_bounds():
    uppers = f64(0.2, 0.8, 3.0)
    x = f64(0.7, -1.2)
    found = vmap(lambda u: fitted(x, None, u))(uppers)
    torch.testing.assert_close(found, torch.minimum(1.5 * x, uppers[:, None]))


def test_derivatives():
    check_derivatives(LBFGSB(), bounds=(-3.0, 3.0))


def test_derivatives_with_an_active_bound():
    theta = f64(0.7, -0.5)

    def solution(theta):
        loss = lambda x, t: ((x - t[0]) ** 2).sum() + t[1] * x[0] * x[1]  # noqa: E731
        return minimize(loss, f64(0.1, 0.1), (theta,), bounds=(None, f64(0.5, 5.0)), rtol=0.0, atol=1e-12).value

    torch.testing.assert_close(jacrev(solution)(theta), finite_difference(solution, theta), rtol=0, atol=1e-7)


def test_memory_does_not_grow():
    check_memory(LBFGSB(), bounds=(-3.0, 3.0))


def test_a_problem_without_a_minimum_is_not_taken_for_crossed_bounds():
    found = minimize(lambda x: x.sum(), torch.ones(2), solver=LBFGSB(), max_steps=120, throw=False)
    assert int(found.result) not in (0, REFUSED)
