"""diffopt.solvers.residuals: the function to first order, dense and by products, and the free unknowns."""

import pytest
import torch
from torch.func import vmap

from diffopt.solvers import Residuals


@pytest.mark.parametrize("m", [2, 3, 7])
def test_linearized_is_the_jacobian_and_the_gradient(m):
    W = torch.randn(m, 3, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    x = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)

    def fn(x):
        return torch.tanh(W @ x) + x.sum() ** 2

    at = Residuals(fn).linearized(x, True)
    J = torch.func.jacrev(fn)(x)
    torch.testing.assert_close(at.jacobian, J)
    torch.testing.assert_close(at.slope, J.mT @ fn(x))
    torch.testing.assert_close(at.value, fn(x).square().sum() / 2)
    torch.testing.assert_close(Residuals(fn).push(x, x), J @ x)
    torch.testing.assert_close(Residuals(fn).normal_operator(x).materialize(), J.mT @ J)
    free = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(Residuals(fn).normal_operator(x, free).materialize(), (J * free).mT @ (J * free))
    assert Residuals(fn).linearized(x, False).jacobian.shape == (0, 3)
    lanes = vmap(lambda x: Residuals(fn).linearized(x, True).jacobian)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(lanes, torch.stack([J, torch.func.jacrev(fn)(2 * x)]))


def test_unknowns_are_held_where_the_gradient_presses_them_against_a_bound():
    x = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5])
    slope = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    problem = Residuals(lambda x: x, torch.zeros(5), torch.ones(5))
    assert problem.free(x, slope).tolist() == [0, 1, 1, 0, 1]
    assert problem.optimality(x, slope).tolist() == [0, -1, 1, 0, 0.5]
    assert Residuals(lambda x: x).free(x, slope) is None
