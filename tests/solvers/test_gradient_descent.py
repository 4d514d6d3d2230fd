"""diffopt.solvers.gradient_descent: rates, searches, hypergradients in the rate."""

import torch

from diffopt.implicit.adjoints import Unrolled
from diffopt.solvers import GradientDescent, Zoom, minimize
from solvers.minimizer_checks import check_by_hand, check_derivatives, check_lanes, check_memory, check_minimizer
from solvers.standard_problems import f64, finite_difference, quartic

MODEST = {"max_steps": 3000}


def test_minimizers():
    for name in ("matyas", "himmelblau", "beale", "zakharov"):
        check_minimizer(GradientDescent(), name, **MODEST)
    check_minimizer(GradientDescent(line_search=Zoom()), "himmelblau", **MODEST)
    check_minimizer(GradientDescent(0.5), "matyas", **MODEST)


def test_a_rate_is_the_plain_iteration():
    x, scales = f64(1.0, -2.0), f64(3.0, 0.5)
    found = minimize(lambda x: (scales * x * x).sum() / 2, x, solver=GradientDescent(0.1), max_steps=7, throw=False)
    torch.testing.assert_close(found.value, x * (1 - 0.1 * scales) ** 7)


def test_the_rate_carries_gradient():
    scales = f64(3.0, 0.5)

    def end(rate):
        loss = lambda x: (scales * x * x).sum() / 2  # noqa: E731
        solver = GradientDescent(rate[0])
        return minimize(loss, f64(1.0, -2.0), solver=solver, adjoint=Unrolled(), max_steps=7, throw=False).value

    found = torch.func.jacfwd(end)(f64(0.1))[:, 0]
    torch.testing.assert_close(found, f64(1.0, -2.0) * 7 * (1 - 0.1 * scales) ** 6 * -scales)


def test_rates_in_lanes():
    def steps(rate):
        return minimize(lambda x: (x * x).sum(), f64(1.0, 2.0), solver=GradientDescent(rate)).stats.steps

    rates = f64(0.1, 0.3, 0.45)
    assert torch.func.vmap(steps)(rates).tolist() == [int(steps(rate)) for rate in rates]


def test_truncated_unrolling():
    theta = f64(0.7, -0.5)

    def solution(theta, truncate):
        return minimize(quartic, f64(0.3, -0.4, 0.9), (theta,), solver=GradientDescent(0.15), rtol=0.0, atol=1e-10,
                        adjoint=Unrolled(truncate=truncate)).value  # fmt: skip

    found = torch.func.jacrev(lambda theta: solution(theta, 200))(theta)
    torch.testing.assert_close(found, finite_difference(lambda t: solution(t, 1), theta), rtol=0, atol=1e-6)


def test_by_hand():
    check_by_hand(GradientDescent())


def test_lanes_equal_the_loop():
    check_lanes(GradientDescent(), max_steps=30)


def test_derivatives():
    check_derivatives(GradientDescent())
    check_derivatives(GradientDescent(0.15))


def test_memory_does_not_grow():
    check_memory(GradientDescent(1e-3), few=10, many=1000)
