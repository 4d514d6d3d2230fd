"""diffopt.solvers.bfgs: known minimizers, SciPy, batches, derivatives."""

import pytest
import scipy.optimize
import torch

from diffopt.solvers import BFGS, Backtracking, HagerZhang, minimize
from solvers.minimizer_checks import check_by_hand, check_derivatives, check_lanes, check_memory, check_minimizer
from solvers.standard_problems import PROBLEMS, rosenbrock

# where the Hessian is singular at the minimizer, a small gradient says little of the distance
LOOSE = {"powell_singular": 1e-2}


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n != "rosenbrock_100"])
def test_minimizers(name):
    check_minimizer(BFGS(), name, within=LOOSE.get(name, 1e-5))


@pytest.mark.slow
def test_a_hundred_unknowns():
    check_minimizer(BFGS(), "rosenbrock_100", max_steps=2000)


@pytest.mark.parametrize("search", [HagerZhang(), Backtracking("wolfe"), Backtracking("goldstein")])
def test_other_line_searches(search):
    check_minimizer(BFGS(search), "rosenbrock_2")
    check_minimizer(BFGS(search), "wood")


def test_as_few_steps_as_scipy():
    start = PROBLEMS["rosenbrock_10"].start
    found = minimize(rosenbrock, start, solver=BFGS(), rtol=0.0, atol=1e-5)
    peer = scipy.optimize.minimize(scipy.optimize.rosen, start.numpy(), jac=scipy.optimize.rosen_der, method="BFGS")
    assert int(found.stats.steps) <= 1.3 * peer.nit


def test_inverse_hessian_of_a_quadratic():
    A = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]], dtype=torch.float64)
    start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    exact = Backtracking("strong_wolfe", c2=1e-3)
    state = minimize(lambda x: x @ A @ x / 2, start, solver=BFGS(exact), rtol=0.0, atol=1e-10).state
    torch.testing.assert_close(state.inverse, torch.linalg.inv(A), rtol=0, atol=1e-2)


def test_by_hand():
    check_by_hand(BFGS())


def test_256_lanes_equal_the_loop_at_every_16th():
    steps = check_lanes(BFGS(), count=256, every=16)
    assert steps.unique().numel() > 5  # each lane stops on its own


@pytest.mark.slow
def test_256_lanes_equal_the_loop():
    check_lanes(BFGS(), count=256)


def test_derivatives():
    check_derivatives(BFGS())


def test_memory_does_not_grow():
    check_memory(BFGS())
