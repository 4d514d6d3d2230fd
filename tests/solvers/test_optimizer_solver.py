"""diffopt.solvers.optimizer_solver: optimizers as solvers."""

import pytest
import torch

import diffopt
from diffopt.implicit.adjoints import Unrolled
from diffopt.optimizers import sam
from diffopt.solvers import FromOptimizer, GradientDescent, minimize
from solvers.minimizer_checks import check_by_hand, check_derivatives, check_lanes, check_memory, check_minimizer
from solvers.standard_problems import f64, quartic

START = f64(0.3, -0.4, 0.9)


def test_minimizers():
    check_minimizer(FromOptimizer(diffopt.sgd(0.01, momentum=0.8)), "himmelblau")
    check_minimizer(FromOptimizer(diffopt.adam(0.1)), "matyas", max_steps=2000)


def test_sgd_is_gradient_descent():
    options = {"max_steps": 9, "throw": False}
    theta = f64(0.7, -0.5)
    found = minimize(quartic, START, (theta,), solver=FromOptimizer(diffopt.sgd(0.1)), **options).value
    torch.testing.assert_close(found, minimize(quartic, START, (theta,), solver=GradientDescent(0.1), **options).value)


def test_the_steps_are_those_of_the_optimizer():
    optimizer, x = diffopt.adam(0.1), START
    state = optimizer.init(x)
    theta = f64(0.7, -0.5)
    for _ in range(5):
        x, state = diffopt.step(optimizer, torch.func.grad(quartic)(x, theta), state, x)
    found = minimize(quartic, START, (theta,), solver=FromOptimizer(optimizer), max_steps=5, throw=False)
    torch.testing.assert_close(found.value, x)


def test_hyperparameters_carry_gradient():
    def end(rate, make):
        return minimize(quartic, START, (f64(0.7, -0.5),), solver=make(rate), adjoint=Unrolled(), max_steps=6,
                        throw=False).value.sum()  # fmt: skip

    rate = torch.tensor(0.1, dtype=torch.float64)
    found = torch.func.grad(lambda rate: end(rate, lambda r: FromOptimizer(diffopt.sgd(r))))(rate)
    torch.testing.assert_close(found, torch.func.grad(lambda rate: end(rate, GradientDescent))(rate))


def test_optimizers_that_ask_for_the_gradients_function():
    solver = FromOptimizer(sam(diffopt.sgd(0.1), rho=0.0))
    plain = FromOptimizer(diffopt.sgd(0.1))
    theta, options = f64(0.7, -0.5), {"max_steps": 4, "throw": False}
    found = minimize(quartic, START, (theta,), solver=solver, **options).value
    torch.testing.assert_close(found, minimize(quartic, START, (theta,), solver=plain, **options).value)


def test_what_is_not_an_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"must be a GradientTransformation, such as diffopt\.adam"):
        FromOptimizer(torch.optim.Adam)


def test_by_hand():
    check_by_hand(FromOptimizer(diffopt.adam(0.1)))


def test_lanes_equal_the_loop():
    check_lanes(FromOptimizer(diffopt.adam(0.1)), max_steps=30)


def test_derivatives():
    check_derivatives(FromOptimizer(diffopt.sgd(0.1, momentum=0.5)))


def test_memory_does_not_grow():
    check_memory(FromOptimizer(diffopt.sgd(0.05)))
