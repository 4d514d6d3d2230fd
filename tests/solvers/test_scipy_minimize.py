"""diffopt.solvers.scipy_minimize: SciPy's methods, with implicit derivatives."""

import subprocess
import sys

import pytest
import torch
from torch.func import grad, jacrev, vmap

from diffopt.implicit.adjoints import Unrolled
from diffopt.solvers import SciPyMinimize, minimize
from diffopt.solvers.solution import STALLED
from solvers.minimizer_checks import check_derivatives, check_minimizer
from solvers.standard_problems import PROBLEMS, f64, rosenbrock

GRADIENT = ("CG", "BFGS", "L-BFGS-B", "TNC", "SLSQP", "Newton-CG", "trust-ncg")


@pytest.mark.parametrize("method", GRADIENT)
def test_minimizers(method):
    check_minimizer(SciPyMinimize(method), "rosenbrock_2")
    check_minimizer(SciPyMinimize(method), "himmelblau")


@pytest.mark.parametrize("method", ["Nelder-Mead", "Powell", "COBYQA"])
def test_gradient_free(method):
    # values place x no better than 1e-8, where the gradient is some 1e-6
    check_minimizer(SciPyMinimize(method), "himmelblau", within=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", ["L-BFGS-B", "TNC", "SLSQP"])
@pytest.mark.parametrize("bounds", [(None, f64(0.4, 5.0)), (-1.0, 0.4)])
def test_bounds(method, bounds):
    x = f64(0.7, 0.2)
    options = {"atol": 1e-7, "bounds": bounds}

    def solution(x):
        loss = lambda p, x: ((p - x) ** 2).sum()  # noqa: E731
        return minimize(loss, f64(0.0, 0.1), (x,), solver=SciPyMinimize(method), **options).value

    torch.testing.assert_close(solution(x), f64(0.4, 0.2), rtol=0, atol=1e-5)
    torch.testing.assert_close(jacrev(solution)(x), torch.diag(f64(0.0, 1.0)), rtol=0, atol=1e-6)


def test_methods_without_bounds_say_so():
    with pytest.raises(ValueError, match=r"SciPyMinimize cannot handle bounds; use LBFGSB"):
        minimize(rosenbrock, f64(0.1, 0.2), bounds=(0.0, 1.0), solver=SciPyMinimize("BFGS"))


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="method must be one of bfgs, cg"):
        SciPyMinimize("annealing")


def test_float32_and_trees():
    start = {"a": torch.tensor([0.3]), "b": torch.tensor([[0.1, 0.2]])}
    found = minimize(lambda t: ((t["a"] - 1) ** 2).sum() + ((t["b"] - 2) ** 2).sum(), start, solver=SciPyMinimize())
    assert found.value["b"].dtype == torch.float32
    torch.testing.assert_close(found.value["b"], torch.tensor([[2.0, 2.0]]))


def test_options_reach_scipy():
    found = minimize(rosenbrock, f64(-1.2, 1.0), solver=SciPyMinimize(options={"maxiter": 3}), throw=False)
    assert int(found.result) == STALLED
    assert int(found.stats.steps) == 1


def test_lanes():
    theta = f64(0.3, 1.2, -0.4)

    def solution(t):
        loss = lambda x, t: (x - t) ** 2 + x**4  # noqa: E731
        return minimize(loss, f64(0.5)[0], (t,), solver=SciPyMinimize("BFGS"), rtol=0.0, atol=1e-8).value

    torch.testing.assert_close(vmap(solution)(theta), torch.stack([solution(t) for t in theta]))
    x = vmap(solution)(theta)
    torch.testing.assert_close(vmap(grad(solution))(theta), 2 / (2 + 12 * x**2))


def test_unrolling_is_refused():
    with pytest.raises(ValueError, match="cannot be unrolled: use Implicit"):
        minimize(rosenbrock, PROBLEMS["rosenbrock_2"].start, solver=SciPyMinimize(), adjoint=Unrolled())


def test_derivatives():
    check_derivatives(SciPyMinimize("BFGS"), unrolled=False, within=1e-5, atol=1e-8)


def test_scipy_is_imported_when_first_used():
    code = "import sys, diffopt.solvers; assert 'scipy.optimize' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
