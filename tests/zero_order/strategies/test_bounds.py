"""diffopt.zero_order.strategies.bounds: reflection on one side and two, optima on the boundary, bad input."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from diffopt import random
from diffopt.zero_order import cma_es, reflect, run, sep_cma_es, snes, xnes
from zero_order.strategies.cases import sphere, start


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@hypothesis.given(st.floats(-100, 100), st.floats(-5, 5), st.floats(0, 5))
def test_reflection_between_two_bounds(y, lower, width):
    upper = lower + width
    x = float(reflect(tensor([y]), (lower, upper)))
    assert lower <= x <= upper
    if lower <= y <= upper:
        assert abs(x - y) < 1e-12
    again = reflect(tensor([y + 2 * width, 2 * lower - y]), (lower, upper))
    assert bool(((again - x).abs() < 1e-9).all())  # the period, and the mirror


@hypothesis.given(st.floats(-100, 100), st.floats(-5, 5))
def test_reflection_at_one_bound(y, bound):
    for other in (None, float("inf")):
        assert float(reflect(tensor([y]), (bound, other))) == pytest.approx(bound + abs(y - bound), abs=1e-12)
        above = None if other is None else -other
        assert float(reflect(tensor([y]), (above, bound))) == pytest.approx(bound - abs(y - bound), abs=1e-12)
    assert float(reflect(tensor([y]), (None, None))) == y


def test_bounds_may_differ_by_entry():
    lower, upper = tensor([0.0, -torch.inf, 0.0, -torch.inf, 1.0]), tensor([1.0, 1.0, torch.inf, torch.inf, 1.0])
    x = reflect(tensor([-0.25, 1.25, -0.25, -7.0, 3.0]), (lower, upper))
    assert x.tolist() == [0.25, 0.75, 0.25, -7.0, 1.0]


def test_bounds_of_trees():
    population = {"w": tensor([[[-1.0, 3.0]], [[0.5, 0.5]]]), "b": tensor([-2.0, 9.0])}
    inside = reflect(population, ({"w": tensor([0.0, 1.0]), "b": 0.0}, {"w": 2.0, "b": torch.inf}))
    assert inside["w"].tolist() == [[[1.0, 1.0]], [[0.5, 1.5]]]
    assert inside["b"].tolist() == [2.0, 9.0]
    assert reflect(population, None) is population


def test_derivatives_of_reflection_are_signs():
    y = tensor([-0.25, 0.3, 1.2, 2.3])
    slope = torch.autograd.functional.jacobian(lambda y: reflect(y, (0.0, 1.0)), y).diagonal()
    assert slope.tolist() == [-1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("make", [snes, xnes, cma_es, sep_cma_es])
def test_a_linear_function_ends_in_the_corner(make):
    x, slope = tensor([0.3, -0.2, 0.1]), tensor([1.0, -2.0, 0.5])
    found = run(make(0.3, 12), lambda x: slope @ x, x, random.key(0), 120, bounds=(-1.0, 2.0))
    torch.testing.assert_close(found.params, tensor([-1.0, 2.0, -1.0]), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [cma_es, xnes])
def test_a_ridge_that_leaves_the_box(make):
    """The covariance is narrow, and half of what it draws lies outside."""

    def ridge(x):
        return 1e6 * (x[0] - x[1]) ** 2 + (x.sum() - 3) ** 2 + (x[2:] ** 2).sum()

    found = run(make(0.3, 8), ridge, torch.full((5,), 0.2).double(), random.key(0), 400, bounds=(-1.0, 1.0))
    torch.testing.assert_close(found.params, tensor([1.0, 1.0, 0.25, 0.25, 0.25]), rtol=0, atol=1e-4)


def test_a_tensor_holds_for_every_leaf():
    found = run(snes(0.3), sphere, start(), random.key(0), 100, bounds=(tensor(0.2), None))
    torch.testing.assert_close(found.loss, tensor(5 * 0.2**2), rtol=1e-3, atol=0)


def test_bad_bounds_are_refused():
    def searched(bounds, x):
        return run(snes(0.3), sphere, x, random.key(0), 1, bounds=bounds)

    with pytest.raises(ValueError, match="must be a pair"):
        searched(0.0, start())
    for bounds in ((1.0, 0.0), (float("nan"), 0.0), (tensor([0.0, 3.0]), 2.0)):
        with pytest.raises(ValueError, match="at most the upper one"):
            searched(bounds, torch.ones(2))
    with pytest.raises(ValueError, match="structure"):
        searched(({"a": 0.0}, None), {"b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"must expand to the shape \(\) of `params\['b'\]`"):
        searched(({"w": 0.0, "b": torch.zeros(3)}, None), start())
