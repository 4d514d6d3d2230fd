"""diffopt.solvers.nelder_mead: minimizers by values alone, and an implicit derivative all the same."""

import pytest
import scipy.optimize
import torch

from diffopt.implicit.adjoints import Unrolled
from diffopt.solvers import NelderMead, minimize
from diffopt.solvers.solution import NONFINITE
from solvers.minimizer_checks import check_by_hand, check_derivatives, check_lanes, check_memory, check_minimizer
from solvers.standard_problems import PROBLEMS, f64, rosenbrock


@pytest.mark.parametrize("name", ["rosenbrock_2", "beale", "himmelblau", "matyas", "wood"])
def test_minimizers(name):
    check_minimizer(NelderMead(), name)


def test_adaptive():
    check_minimizer(NelderMead(adaptive=True), "zakharov")


def test_the_steps_are_those_of_scipy():
    start = f64(-1.2, 1.0)
    solver = NelderMead()
    state = solver.init(rosenbrock, start)
    for _ in range(40):
        state = solver.step(rosenbrock, state)
    peer = scipy.optimize.minimize(scipy.optimize.rosen, start.numpy(), method="Nelder-Mead", options={"maxiter": 40})
    torch.testing.assert_close(state.x, torch.as_tensor(peer.x), rtol=1e-10, atol=1e-10)


def test_kinks():
    found = minimize(lambda x: (x - f64(1.0, -2.0)).abs().sum(), f64(0.3, 0.4), solver=NelderMead())
    torch.testing.assert_close(found.value, f64(1.0, -2.0), rtol=0, atol=1e-7)


def test_a_function_without_values():
    found = minimize(lambda x: (-x.abs() - 1).log().sum(), f64(0.3, 0.4), solver=NelderMead(), throw=False)
    assert int(found.result) == NONFINITE


def test_values_outside_of_the_domain_are_avoided():
    found = minimize(lambda x: (x - x.log()).sum(), f64(0.1, 3.0), solver=NelderMead())
    torch.testing.assert_close(found.value, f64(1.0, 1.0), rtol=0, atol=1e-6)


def test_unrolling_is_refused():
    with pytest.raises(ValueError, match="its steps have no derivative: use Implicit"):
        minimize(rosenbrock, PROBLEMS["rosenbrock_2"].start, solver=NelderMead(), adjoint=Unrolled())


def test_by_hand():
    check_by_hand(NelderMead())


def test_lanes_equal_the_loop():
    check_lanes(NelderMead())


def test_derivatives():
    check_derivatives(NelderMead(), unrolled=False, within=1e-3, max_steps=2000)  # values place x no better than 1e-8


def test_memory_does_not_grow():
    check_memory(NelderMead())
