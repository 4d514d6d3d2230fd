"""diffopt.solvers.trust_region: minimizers, radii, saddles."""

import pytest
import torch

from diffopt.solvers import TrustRegion, minimize
from solvers.minimizer_checks import check_by_hand, check_derivatives, check_lanes, check_memory, check_minimizer
from solvers.standard_problems import PROBLEMS, f64

LOOSE = {"powell_singular": 5e-2}


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n not in ("rosenbrock_100", "brown_badly_scaled")])
def test_minimizers(name):
    check_minimizer(TrustRegion(), name, within=LOOSE.get(name, 1e-5))


@pytest.mark.slow
def test_a_hundred_unknowns():
    check_minimizer(TrustRegion(), "rosenbrock_100")


def test_steps_are_within_the_radius_and_never_increase_the_value():
    fn = PROBLEMS["rosenbrock_2"].fn
    solver = TrustRegion(radius=0.3)
    state = solver.init(fn, PROBLEMS["rosenbrock_2"].start)
    for _ in range(20):
        new = solver.step(fn, state)
        assert (new.x - state.x).norm() <= state.radius * (1 + 1e-12)
        assert new.value <= state.value
        state = new


def test_leaves_a_saddle():
    found = minimize(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4, f64(1.0, 1e-3), solver=TrustRegion())
    torch.testing.assert_close(found.value.abs(), f64(0.0, 0.5**0.5), rtol=0, atol=1e-7)


def test_steps_out_of_the_domain_shorten_the_radius():
    found = minimize(lambda x: x - x.log(), f64(8.0)[0], solver=TrustRegion(radius=50.0))
    torch.testing.assert_close(found.value, f64(1.0)[0])


def test_by_hand():
    check_by_hand(TrustRegion())


def test_lanes_equal_the_loop():
    check_lanes(TrustRegion())


def test_derivatives():
    check_derivatives(TrustRegion())


def test_memory_does_not_grow():
    check_memory(TrustRegion())
