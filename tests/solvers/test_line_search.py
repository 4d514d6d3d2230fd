"""diffopt.solvers.line_search: what each search promises, on convex, wavy, flat and hostile functions."""

import math

import pytest
import torch
from torch.func import grad, vmap

from diffopt.solvers import Backtracking, HagerZhang, Objective, Zoom
from solvers.standard_problems import f64, rosenbrock

CONDITIONS = ("armijo", "goldstein", "wolfe", "strong_wolfe")
SEARCHES = [Zoom(), Zoom(c2=0.1), HagerZhang(), HagerZhang(c2=0.1), *map(Backtracking, CONDITIONS)]
FUNCTIONS = {
    "quadratic": lambda x: (x * x).sum(),
    "steep": lambda x: 1e4 * (x * x).sum(),
    "shallow": lambda x: 1e-4 * (x * x).sum(),
    "rosenbrock": rosenbrock,
    "wavy": lambda x: (x * x).sum() / 50 + (3 * x).sin().sum(),
    "log": lambda x: (x - x.log()).sum(),
}


def search(method, fn, x, start, p=None):
    objective = Objective(fn)
    value, slope = objective.value_and_grad(x)
    p = -slope if p is None else p
    return method.search(objective, x, value, slope, p, torch.as_tensor(start, dtype=x.dtype)), value, slope @ p, p


def holds(method, point, value, d0, p):
    """Whether the conditions of a search hold at a point."""
    d = point.slope @ p
    armijo = point.value <= value + method.c1 * point.step * d0
    kind = getattr(method, "condition", "strong_wolfe" if isinstance(method, Zoom) else "wolfe")
    if kind == "armijo":
        return bool(armijo)
    if kind == "goldstein":
        return bool(armijo & (point.value >= value + (1 - method.c1) * point.step * d0))
    return bool(armijo & (d >= method.c2 * d0) & ((d <= -method.c2 * d0) | torch.tensor(kind == "wolfe")))


@pytest.mark.parametrize("method", SEARCHES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("start", [1e-3, 1.0, 100.0])
def test_conditions_hold(method, name, start):
    point, value, d0, p = search(method, FUNCTIONS[name], f64(1.7, 0.6), start)
    assert bool(point.accepted)
    assert holds(method, point, value, d0, p)
    torch.testing.assert_close(point.x, f64(1.7, 0.6) + point.step * p)
    torch.testing.assert_close(point.slope, grad(FUNCTIONS[name])(point.x))


@pytest.mark.parametrize("method", [Zoom(c2=1e-6), HagerZhang(c2=1e-6), Backtracking("strong_wolfe", c2=1e-6)], ids=str)
def test_exact_searches(method):
    point, *_ = search(method, FUNCTIONS["quadratic"], f64(3.0, -1.0), 0.1)
    torch.testing.assert_close(point.step, f64(0.5)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", SEARCHES, ids=str)
def test_directions_that_do_not_descend_fail_and_stay(method):
    x = f64(1.7, 0.6)
    point, value, *_ = search(method, FUNCTIONS["quadratic"], x, 1.0, p=x)
    assert not bool(point.accepted)
    torch.testing.assert_close(point.x, x)
    assert point.value == value


@pytest.mark.parametrize("method", SEARCHES, ids=str)
def test_functions_that_are_nan_on_the_way_are_improved(method):
    fn = lambda x: torch.where(x[0] < 0.5, math.nan, (x * x).sum())  # noqa: E731
    point, value, *_ = search(method, fn, f64(1.0, 1.0), 1.0)
    assert bool(point.accepted)
    assert point.value < value


@pytest.mark.parametrize("method", SEARCHES, ids=str)
def test_unbounded_functions_end(method):
    point, value, *_ = search(method, lambda x: x.sum(), f64(1.0, 1.0), 1.0)
    assert point.value < value
    assert bool(point.accepted) == (getattr(method, "condition", "") == "armijo")


@pytest.mark.parametrize("method", SEARCHES, ids=str)
def test_where_rounding_hides_the_decrease(method):
    x = f64(1e-9, -2e-9)  # the decrease is 1e-18 of a value of 1
    point, _, d0, p = search(method, lambda x: 1 + (x * x).sum(), x, 0.4)
    assert bool(point.accepted)
    assert (point.slope @ p).abs() < d0.abs()


@pytest.mark.parametrize("method", SEARCHES, ids=str)
def test_lanes_equal_the_loop(method):
    starts = f64(1e-3, 0.3, 7.0, 100.0)
    run = lambda start: search(method, FUNCTIONS["wavy"], f64(1.7, 0.6), start)[0]  # noqa: E731
    batched = vmap(run)(starts)
    for found, single in zip(zip(*batched, strict=True), map(run, starts), strict=True):
        torch.testing.assert_close(type(single)(*found), single)


def test_few_evaluations():
    count = 0

    def fn(x):
        nonlocal count
        count += 1
        return (x * x).sum()

    for method, start, most in ((Zoom(), 0.5, 2), (HagerZhang(), 0.5, 2), (Backtracking(), 0.5, 2), (Zoom(), 20.0, 5)):
        count = 0
        search(method, fn, f64(1.0, 2.0), start)
        assert count <= most


def test_conditions_are_checked():
    with pytest.raises(ValueError, match="condition must be armijo"):
        Backtracking("weak")
