"""diffopt.solvers.scipy_root: SciPy's methods, in lanes and under transforms."""

import pytest
import scipy.optimize
import torch
from torch.func import grad, jacrev, vmap

from diffopt.solvers import SciPyRoot, SolverError, root
from problems import equation, reference_root, root_args

A, B = root_args()
X0 = torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize("method", ["hybr", "lm", "broyden1", "krylov", "df-sane"])
def test_methods_in_lanes_and_under_grad(method):
    def f(a):
        solver = SciPyRoot(method, tol=1e-11 if method != "df-sane" else None)
        return root(equation, X0, (a, B), solver=solver, rtol=0.0, atol=1e-6).value

    rows = torch.stack([A, -0.5 * A])
    expected = torch.stack([reference_root(a, B) for a in rows])
    torch.testing.assert_close(vmap(f)(rows), expected, rtol=0, atol=1e-5)
    slopes = torch.stack([jacrev(reference_root)(a, B) for a in rows])
    torch.testing.assert_close(vmap(jacrev(f))(rows), slopes, rtol=0, atol=1e-5)
    torch.testing.assert_close(grad(lambda r: vmap(f)(r).sum())(rows), slopes.sum(1), rtol=0, atol=1e-5)


def test_it_is_scipys_result_and_options_reach_it():
    theirs = scipy.optimize.root(lambda x: equation(torch.as_tensor(x), A, B).numpy(), X0.numpy(), tol=1e-13)
    found = root(equation, X0, (A, B), solver=SciPyRoot(tol=1e-13))
    torch.testing.assert_close(found.value, torch.as_tensor(theirs.x), rtol=1e-12, atol=1e-13)
    assert found.stats.steps == 1
    with pytest.raises(SolverError, match="no step makes progress"):
        root(equation, X0, (A, B), solver=SciPyRoot(options={"maxfev": 2}))


def test_float32_stays_float32():
    found = root(lambda x: x**2 - 2, torch.ones(2), solver=SciPyRoot()).value
    torch.testing.assert_close(found, torch.full((2,), 2.0).sqrt())
