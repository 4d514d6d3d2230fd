"""diffopt.solvers.newton_cg: the inner solve with its exits, and Newton's method on top."""

import pytest
import torch

from diffopt.implicit import Unrolled
from diffopt.solvers import NewtonCG, TrustRegion, Zoom, minimize
from diffopt.solvers.newton_cg import truncated_cg
from solvers.minimizer_checks import check_by_hand, check_derivatives, check_lanes, check_memory, check_minimizer
from solvers.standard_problems import PROBLEMS, f64

LOOSE = {"powell_singular": 5e-2}


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n not in ("rosenbrock_100", "brown_badly_scaled")])
def test_minimizers(name):
    check_minimizer(NewtonCG(), name, within=LOOSE.get(name, 1e-5))


@pytest.mark.slow
def test_a_hundred_unknowns():
    check_minimizer(NewtonCG(), "rosenbrock_100")
    check_minimizer(NewtonCG(Zoom()), "rosenbrock_100")


def test_superlinear_convergence():
    options = {"solver": NewtonCG(), "rtol": 0.0, "atol": 1e-12, "history": True}
    history = minimize(PROBLEMS["beale"].fn, f64(2.9, 0.45), **options).stats.history
    a, b, c = history[history.isfinite()][-3:]
    assert b < a**1.5
    assert c < b**1.5


def test_inner_solve_of_a_regular_system():
    A, g = torch.diag(f64(1.0, 4.0, 9.0)), 1e-6 * f64(1.0, -2.0, 3.0)
    z, Az = truncated_cg(lambda v: A @ v, g, None)
    torch.testing.assert_close(z, -g / f64(1.0, 4.0, 9.0), rtol=2e-3, atol=0)
    torch.testing.assert_close(Az, A @ z)


def test_negative_curvature_at_once_gives_the_gradient():
    g = f64(1.0, 2.0)
    torch.testing.assert_close(truncated_cg(lambda v: -v, g, None)[0], -g)


def test_negative_curvature_goes_to_the_boundary():
    g = f64(1.0, 2.0)
    z, Hz = truncated_cg(lambda v: -3 * v, g, f64(2.5)[0])
    torch.testing.assert_close(z, -2.5 * g / g.norm())
    torch.testing.assert_close(Hz, -3 * z)


def test_the_boundary_stops_the_path():
    A, g, radius = torch.diag(f64(1.0, 50.0)), f64(10.0, 10.0), f64(1.0)[0]
    z, Az = truncated_cg(lambda v: A @ v, g, radius)
    torch.testing.assert_close(z.norm(), radius)
    torch.testing.assert_close(Az, A @ z)
    cauchy = -g * (g @ g) / (g @ A @ g)
    assert g @ z + z @ A @ z / 2 <= g @ cauchy + cauchy @ A @ cauchy / 2


def test_leaves_a_saddle():
    found = minimize(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4, f64(1.0, 1e-3), solver=NewtonCG())
    torch.testing.assert_close(found.value.abs(), f64(0.0, 0.5**0.5), rtol=0, atol=1e-7)


def test_by_hand():
    check_by_hand(NewtonCG())


def test_lanes_equal_the_loop():
    check_lanes(NewtonCG())


def test_derivatives():
    check_derivatives(NewtonCG())


def test_memory_does_not_grow():
    check_memory(NewtonCG())


@pytest.mark.parametrize("solver", [NewtonCG(), TrustRegion()], ids=["NewtonCG", "TrustRegion"])
def test_the_last_steps_alone_are_refused(solver):
    """At a solution the inner conjugate gradients stop at once, and the step's derivative is none."""
    with pytest.raises(ValueError, match="no meaningful derivative"):
        minimize(
            lambda x, a: ((x - a) ** 2).sum(),
            torch.ones(2),
            (torch.zeros(2),),
            solver=solver,
            adjoint=Unrolled(truncate=2),
        )
