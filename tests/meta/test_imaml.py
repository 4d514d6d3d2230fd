import pytest
import torch
from torch.func import grad, hessian, vmap

import diffopt
from diffopt.implicit import Detached, Implicit, OneStep, Unrolled
from diffopt.linalg import CG, Dense, Neumann
from diffopt.meta import adapt_proximal, imaml
from diffopt.optimizers import sgd
from diffopt.solvers import BFGS, FromOptimizer, GradientDescent, SolverError
from meta.problems import (
    START,
    A,
    assert_trees_close,
    check_slope,
    f64,
    network_params,
    quadratic,
    quadratic_tasks,
    regression,
    regression_tasks,
)

STRENGTH = f64(0.8)
TIGHT = {"rtol": 0.0, "atol": 1e-11}


def minimizer(w, centre, strength):
    """(A + lambda)^-1 (A c + lambda w)."""
    return torch.linalg.inv(A + strength * torch.eye(3, dtype=w.dtype)) @ (A @ centre + strength * w)


def closed_form(w, strength, tasks):
    ends = [minimizer(w, centre, strength) for centre in tasks[0]]
    return torch.stack([quadratic(end, c) for end, c in zip(ends, tasks[1], strict=True)]).mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adjoint": Implicit(CG(rtol=1e-12))},
        {"adjoint": Implicit(Dense()), "solver": BFGS()},
        {"adjoint": Implicit(Neumann(200, 0.3)), "solver": GradientDescent(0.3)},
        {"adjoint": Unrolled(), "solver": GradientDescent(0.3)},
        {"adjoint": Unrolled(checkpoint="sqrt"), "solver": FromOptimizer(sgd(0.3))},
        {"chunk_size": 3},
    ],
)
def test_is_the_exact_implicit_gradient(options):
    tasks = quadratic_tasks()
    ours = lambda w, strength: imaml(quadratic, strength, **options, **TIGHT)(w, tasks)  # noqa: E731
    theirs = lambda w, strength: closed_form(w, strength, tasks)  # noqa: E731
    torch.testing.assert_close(ours(START, STRENGTH), theirs(START, STRENGTH))
    for take in (grad, diffopt.grad):
        got = take(ours, argnums=(0, 1))(START, STRENGTH)
        want = grad(theirs, argnums=(0, 1))(START, STRENGTH)
        if isinstance(options.get("adjoint"), Unrolled):  # the start of the steps carries no gradient
            got, want = got[:1], want[:1]
        assert_trees_close(got, want, rtol=1e-6, atol=1e-8)


def test_the_jacobian_of_the_paper_and_higher_orders():
    tasks, centre = quadratic_tasks(), quadratic_tasks()[0][0]
    jacobian = torch.func.jacrev(lambda w: adapt_proximal(quadratic, w, centre, STRENGTH, **TIGHT))(START)
    torch.testing.assert_close(jacobian, torch.linalg.inv(torch.eye(3, dtype=torch.float64) + A / STRENGTH))
    ours = lambda w: imaml(quadratic, STRENGTH, **TIGHT)(w, tasks)  # noqa: E731
    torch.testing.assert_close(hessian(ours)(START), hessian(lambda w: closed_form(w, STRENGTH, tasks))(START))


def test_vmap_over_strengths():
    tasks, strengths = quadratic_tasks(), f64([0.5, 1.0, 2.0])
    slope = grad(lambda w, s: imaml(quadratic, s, **TIGHT)(w, tasks))
    want = torch.stack([slope(START, s) for s in strengths])
    torch.testing.assert_close(vmap(slope, in_dims=(None, 0))(START, strengths), want)


def test_a_network_against_finite_differences():
    tasks, params = regression_tasks(2), network_params()
    meta = {"params": params, "strength": f64(2.0)}
    meta_loss = lambda m: imaml(regression, m["strength"], **TIGHT)(m["params"], tasks)  # noqa: E731
    check_slope(meta_loss, meta)


def test_adjoints_without_a_solve():
    tasks = quadratic_tasks()
    slope = lambda adjoint: grad(imaml(quadratic, STRENGTH, adjoint=adjoint, **TIGHT))(START, tasks)  # noqa: E731
    assert (slope(Detached()) == 0).all()
    ends = [minimizer(START, c, STRENGTH) for c in tasks[0]]
    pull = torch.stack([grad(quadratic)(end, c) for end, c in zip(ends, tasks[1], strict=True)]).mean(0)
    torch.testing.assert_close(slope(OneStep(0.3)), 0.3 * STRENGTH * pull)


def test_few_steps_and_cg_steps_as_in_the_paper():
    tasks = quadratic_tasks()
    options = {"max_steps": 16, "throw": False, "solver": GradientDescent(0.3), "adjoint": Implicit(CG(max_steps=3))}
    got = grad(imaml(quadratic, STRENGTH, **options))(START, tasks)
    want = grad(closed_form)(START, STRENGTH, tasks)
    # 16 steps leave 4e-5 of what was to go along the slowest eigenvector, (1 - 0.3 (0.77 + 0.8))^16
    torch.testing.assert_close(got, want, rtol=0, atol=4e-5)


def test_bad_arguments_raise_early():
    support, query = quadratic_tasks()
    with pytest.raises(ValueError, match=r"strength.*above 0"):
        imaml(quadratic, 0.0)
    with pytest.raises(TypeError, match="Wrap it: FromOptimizer"):
        imaml(quadratic, 1.0, solver=sgd(0.1))
    with pytest.raises(ValueError, match="`in_dims` must be a pair"):
        imaml(quadratic, 1.0, in_dims=0)
    with pytest.raises(TypeError, match="`query_loss` must be a function"):
        imaml(quadratic, 1.0, query_loss=3)
    with pytest.raises(TypeError, match="int64"):
        imaml(quadratic, 1.0)(torch.tensor([1, 2, 3]), (support, query))
    with pytest.raises(ValueError, match="pair"):
        imaml(quadratic, 1.0)(START, support)
    with pytest.raises(TypeError, match="0-d"):
        imaml(lambda w, c: w - c, 1.0)(START, (support, query))
    with pytest.raises(SolverError, match="throw=False"):
        imaml(quadratic, 1.0, solver=GradientDescent(0.1), max_steps=1)(START, (support, query))
