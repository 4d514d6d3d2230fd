"""diffopt.solvers.golden_section: one unknown, and its implicit derivative."""

import math

import pytest
import torch
from torch.func import grad, vmap

from diffopt.implicit.adjoints import Unrolled
from diffopt.solvers import GoldenSection, minimize
from diffopt.solvers.solution import REFUSED


def cosh(x, a):
    """cosh x - a x, least at asinh a."""
    return x.cosh() - a * x


def solve(a, **options):
    start = torch.zeros((), dtype=torch.float64)
    return minimize(cosh, start, (a,), solver=GoldenSection(-1.0, 3.0), **options)


def test_minimizer_derivative_and_lanes():
    a = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
    found = vmap(lambda a: solve(a).value)(a)
    torch.testing.assert_close(found, a.asinh(), rtol=0, atol=5e-8)
    torch.testing.assert_close(vmap(grad(lambda a: solve(a).value))(a), 1 / (1 + a * a).sqrt(), rtol=0, atol=5e-8)


def test_the_width_shrinks_by_the_golden_ratio():
    found = solve(torch.tensor(1.0, dtype=torch.float64), history=True, max_steps=10, throw=False).stats.history
    torch.testing.assert_close(found[1:] / found[:-1], torch.full((10,), (math.sqrt(5) - 1) / 2, dtype=torch.float64))


def test_shapes_of_one_element():
    start = torch.zeros(1, 1, dtype=torch.float64)
    found = minimize(lambda x: ((x - 0.7) ** 2).sum(), start, solver=GoldenSection(0.0, 1.0))
    torch.testing.assert_close(found.value, torch.full((1, 1), 0.7, dtype=torch.float64), rtol=0, atol=1e-7)


def test_what_is_refused():
    with pytest.raises(ValueError, match="GoldenSection takes one unknown; got 2"):
        minimize(lambda x: x.sum(), torch.ones(2), solver=GoldenSection(0.0, 1.0))
    empty = minimize(lambda x: x * x, torch.ones(()), solver=GoldenSection(1.0, 0.0), throw=False)
    assert int(empty.result) == REFUSED
    with pytest.raises(ValueError, match="its steps have no derivative"):
        solve(torch.tensor(1.0, dtype=torch.float64), adjoint=Unrolled())


def test_ends_are_found():
    found = minimize(lambda x: x, torch.ones((), dtype=torch.float64), solver=GoldenSection(0.5, 2.0))
    torch.testing.assert_close(found.value, torch.tensor(0.5, dtype=torch.float64), rtol=0, atol=5e-8)


def test_the_derivative_at_an_end_is_that_of_the_end():
    def lowest(a, upper):
        return minimize(lambda x, a: (x - a) ** 2, torch.tensor(0.0), (a,), solver=GoldenSection(-1.0, upper)).value

    ends = torch.tensor(5.0), torch.tensor(2.0)
    assert torch.func.grad(lowest)(*ends) == 0
    assert torch.func.grad(lowest, argnums=1)(*ends) == 1
    inside = torch.tensor(0.3), torch.tensor(2.0)
    assert torch.allclose(torch.func.grad(lowest)(*inside), torch.tensor(1.0))
    assert torch.func.grad(lowest, argnums=1)(*inside) == 0
