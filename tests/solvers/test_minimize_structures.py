"""diffopt.solvers.minimize: the structures, how they are given, and what is refused."""

import pytest
import torch
from torch.func import grad, jacrev, vmap

from diffopt.solvers import (
    LBFGS,
    LBFGSB,
    AugmentedLagrangian,
    FrankWolfe,
    ProximalGradient,
    SciPyMinimize,
    SolverError,
    minimize,
)
from diffopt.solvers.solution import REFUSED

F64 = torch.float64
START = {"p": torch.zeros(2, dtype=F64), "q": torch.zeros((), dtype=F64)}


def loss(x, a):
    return ((x["p"] - a) ** 2).sum() + (x["q"] - 2) ** 2


A = torch.tensor([1.5, -0.5], dtype=F64)


def test_trees_and_batches():
    found = minimize(loss, START, (A,))
    assert torch.allclose(found.value["p"], A)
    assert bool(found.converged)
    batch = torch.stack([A, 2 * A])
    assert torch.allclose(vmap(lambda a: minimize(loss, START, (a,)).value["p"])(batch), batch)


@pytest.mark.parametrize("bounds", [(0, 1), (torch.zeros((), dtype=F64), 1.0), ({"p": 0.0, "q": 0.0}, 1), (0.0, None)])
def test_bounds_are_numbers_tensors_or_trees(bounds):
    found = minimize(loss, START, (A,), bounds=bounds)
    top = 1.0 if bounds[1] is not None else 1.5
    assert torch.allclose(found.value["p"], torch.tensor([top, 0.0], dtype=F64))


def test_bounds_carry_gradient():
    def run(top, solver):
        return minimize(loss, START, (A,), bounds=({"p": -top, "q": -9.0}, top), solver=solver).value["p"].sum()

    for solver in (None, LBFGSB(), ProximalGradient()):
        for top, slope in ((0.8, 1.0), (0.3, 0.0)):
            found = grad(lambda t, s=solver: run(t, s))(torch.tensor(top, dtype=F64))
            assert torch.allclose(found, torch.tensor(slope, dtype=F64), atol=1e-12)


def test_the_default_solver_fits_the_structure():
    assert type(minimize(loss, START, (A,)).state).__name__.startswith("LBFGS")
    constrained = minimize(loss, START, (A,), equality=lambda x, a: x["q"] - 1)
    assert type(constrained.state).__name__ == "AugmentedLagrangianState"
    assert torch.allclose(constrained.dual[0], torch.tensor(2.0, dtype=F64))
    projected = minimize(loss, START, (A,), projection=lambda x: {"p": x["p"].clamp(min=0), "q": x["q"]})
    assert type(projected.state).__name__ == "ProximalGradientState"


def test_a_regularization_path_by_jacrev_of_a_prox():
    def run(lam):
        prox = lambda x, s: {"p": x["p"].sign() * (x["p"].abs() - s * lam).clamp(min=0), "q": x["q"]}  # noqa: E731
        return minimize(loss, START, (A,), prox=prox).value["p"]

    assert torch.allclose(jacrev(run)(torch.tensor(0.4, dtype=F64)), torch.tensor([-0.5, 0.5], dtype=F64), atol=1e-7)


def test_what_is_refused():
    with pytest.raises(ValueError, match="one structure"):
        minimize(loss, START, (A,), bounds=(0, 1), prox=lambda x, s: x)
    with pytest.raises(ValueError, match="pair"):
        minimize(loss, START, (A,), bounds=[0, 1])
    with pytest.raises(ValueError, match="cannot handle prox; use ProximalGradient"):
        minimize(loss, START, (A,), prox=lambda x, s: x, solver=LBFGS())
    with pytest.raises(ValueError, match="cannot handle bounds"):
        minimize(loss, START, (A,), bounds=(0, 1), solver=FrankWolfe(lambda g: g))
    with pytest.raises(ValueError, match="equality="):
        minimize(loss, START, (A,), solver=AugmentedLagrangian())
    with pytest.raises(ValueError, match="Sum it first"):
        minimize(lambda x, a: x["p"], START, (A,))
    with pytest.raises(TypeError, match="tuple"):
        minimize(loss, START, A)
    with pytest.raises(SolverError, match="max_steps"):
        minimize(lambda x: (x**4).sum() + (x[0] - 3 * x[1]) ** 2, torch.ones(2, dtype=F64), max_steps=1)


@pytest.mark.parametrize("solver", [None, ProximalGradient(), SciPyMinimize()])
def test_crossed_bounds_are_refused_by_every_solver(solver):
    def run(upper, throw=False):
        return minimize(lambda x: (x**2).sum(), torch.ones(2), bounds=(1.0, upper), solver=solver, throw=throw)

    assert int(run(-1.0).result) == REFUSED
    assert vmap(lambda u: run(u).result)(torch.tensor([2.0, -1.0])).tolist() == [0, REFUSED]
    with pytest.raises(SolverError, match="a lower bound lies above its upper"):
        run(-1.0, throw=True)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((torch.zeros(3), None), r"the lower bound must expand to the shape of init, \(2,\); got \(3,\)"),
        ((None, torch.zeros(2, 2)), r"the upper bound must expand to the shape of init, \(2,\); got \(2, 2\)"),
        (({"a": 0.0}, None), "`the lower bound` must have the structure of `init`"),
    ],
)
def test_bounds_of_another_shape_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        minimize(lambda x: (x**2).sum(), torch.ones(2), bounds=bounds)


@pytest.mark.parametrize("moved", [lambda x: x[None], lambda x: x.double(), lambda x: {"a": x}])
def test_a_projection_must_keep_its_shape(moved):
    with pytest.raises((ValueError, TypeError), match="the value of prox or projection"):
        minimize(lambda x: (x**2).sum(), torch.ones(2), projection=moved)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: 0.0, "`the value of equality` must be a tensor, got float"),
        (lambda x: (), r"equality must return at least one tensor; got \(\)"),
        (lambda x: x.double(), "equality must return tensors of the dtype of init, torch.float32; got .*float64"),
    ],
)
def test_constraints_must_be_numbers(value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        minimize(lambda x: (x**2).sum(), torch.ones(2), equality=value)
