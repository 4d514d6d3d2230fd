"""diffopt.solvers.nonlinear_cg: all its formulas, and conjugate gradients on a quadratic."""

import pytest
import torch

from diffopt.solvers import Backtracking, HagerZhang, NonlinearCG, minimize
from solvers.minimizer_checks import check_by_hand, check_derivatives, check_lanes, check_memory, check_minimizer

METHODS = ("fletcher_reeves", "polak_ribiere", "hestenes_stiefel", "dai_yuan")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["rosenbrock_2", "beale", "wood", "himmelblau", "matyas", "zakharov"])
def test_minimizers(method, name):
    check_minimizer(NonlinearCG(method), name)


def test_ten_unknowns():
    check_minimizer(NonlinearCG(), "rosenbrock_10")
    check_minimizer(NonlinearCG(line_search=HagerZhang(c2=0.1)), "rosenbrock_10")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_hundred_unknowns(method):
    check_minimizer(NonlinearCG(method), "rosenbrock_100", max_steps=5000)


@pytest.mark.parametrize("method", METHODS)
def test_quadratics_take_as_many_steps_as_unknowns(method):
    scales = torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=torch.float64)
    exact = Backtracking("strong_wolfe", c2=1e-7, max_steps=60)
    found = minimize(lambda x: (scales * x * x).sum() / 2, torch.tensor([1.0, -1.0, 2.0, 0.5], dtype=torch.float64),
                     solver=NonlinearCG(method, exact), rtol=0.0, atol=1e-5)  # fmt: skip
    assert int(found.stats.steps) == 4


def test_methods_are_checked():
    with pytest.raises(ValueError, match="method must be fletcher_reeves"):
        NonlinearCG("newton")


def test_by_hand():
    check_by_hand(NonlinearCG())


def test_lanes_equal_the_loop():
    check_lanes(NonlinearCG("dai_yuan"))


@pytest.mark.parametrize("method", METHODS)
def test_derivatives(method):
    check_derivatives(NonlinearCG(method))


def test_memory_does_not_grow():
    check_memory(NonlinearCG())
