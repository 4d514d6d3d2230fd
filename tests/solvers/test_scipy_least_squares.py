"""diffopt.solvers.scipy_least_squares: SciPy's methods, in lanes, with bounds and under transforms."""

import pytest
import torch
from torch.func import jacrev, vmap

from diffopt.implicit import Unrolled
from diffopt.solvers import SciPyLeastSquares, SolverError, least_squares

X = torch.linspace(0, 2, 9, dtype=torch.float64)
START = torch.tensor([0.5, -0.2], dtype=torch.float64)


def curve(c, y):
    return c[0] * torch.exp(c[1] * X) - y


@pytest.mark.parametrize("method", ["trf", "dogbox", "lm"])
def test_methods_in_lanes_and_under_grad(method):
    def f(y, solver):
        return least_squares(curve, START, (y,), solver=solver, rtol=0.0, atol=1e-8).value

    rows = torch.stack([torch.exp(-X) + 0.1 * X.cos(), 2 * torch.exp(-0.5 * X) + 0.05 * X.sin()])
    solver = SciPyLeastSquares(method)
    torch.testing.assert_close(vmap(lambda y: f(y, solver))(rows), vmap(lambda y: f(y, None))(rows), rtol=1e-6, atol=0)
    found, expected = (vmap(jacrev(lambda y: f(y, s)))(rows) for s in (solver, None))  # noqa: B023
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_bounds_options_and_refusals():
    y = torch.exp(-X)
    found = least_squares(curve, START, (y,), bounds=(-0.5, None), solver=SciPyLeastSquares()).value
    mine = least_squares(curve, START, (y,), bounds=(-0.5, None)).value
    torch.testing.assert_close(found, mine, rtol=1e-6, atol=0)
    with pytest.raises(SolverError, match="no step makes progress"):
        least_squares(curve, START, (y,), solver=SciPyLeastSquares(options={"max_nfev": 1}))
    with pytest.raises(ValueError, match="cannot be unrolled"):
        least_squares(curve, START, (y,), solver=SciPyLeastSquares(), adjoint=Unrolled())
