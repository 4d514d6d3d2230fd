"""diffopt.solvers.objective: what vanishes at a solution of each structure."""

import torch

from diffopt.solvers import Objective
from solvers.standard_problems import f64


def value(x):
    return ((x - f64(3.0, -2.0)) ** 2).sum()


def test_a_plain_function_is_a_smooth_problem():
    objective = Objective.of(value)
    assert objective.structure is None
    assert Objective.of(objective) is objective
    assert torch.equal(objective.optimality(f64(3.0, -2.0)), f64(0.0, 0.0))
    assert torch.equal(objective.value_and_grad(f64(3.0, -1.0))[1], f64(0.0, 2.0))


def test_bounds():
    objective = Objective(value, lower=f64(0.0, -1.0), upper=f64(1.0, 9.0))
    assert objective.structure == "bounds"
    assert torch.equal(objective.clip(f64(2.0, -3.0)), f64(1.0, -1.0))
    assert torch.equal(objective.optimality(f64(1.0, -1.0)), f64(0.0, 0.0))
    assert (objective.optimality(f64(0.5, 0.0)) != 0).all()


def test_prox():
    objective = Objective(value, prox=lambda x, s: x.sign() * (x.abs() - s).clamp(min=0))
    assert objective.structure == "prox"
    assert torch.allclose(objective.optimality(f64(2.5, -1.5)), f64(0.0, 0.0))


def test_constraints_hold_their_multipliers_behind_the_unknowns():
    objective = Objective(value, equality=lambda x: x[:1] - 1, inequality=lambda x: x[1:] + 4, sizes=(2, 1, 1))
    assert objective.structure == "constraints"
    point = objective.split(f64(1.0, -4.0, 4.0, 4.0))
    assert torch.equal(point.primal, f64(1.0, -4.0))
    assert torch.equal(point.equality, f64(4.0))
    assert torch.equal(objective.optimality(f64(1.0, -4.0, 4.0, 4.0)), f64(0.0, 0.0, 0.0, 0.0))


def test_functions_of_trees_become_functions_of_vectors():
    tree_of = lambda x: {"a": x[:1], "b": x[1:]}  # noqa: E731
    twice = lambda t: {"a": 2 * t["a"], "b": 3 * t["b"]}  # noqa: E731
    assert torch.equal(Objective(value, unravel=tree_of).on_vectors(twice)(f64(1.0, 1.0)), f64(2.0, 3.0))
    assert torch.equal(Objective(value).on_vectors(torch.neg)(f64(1.0, 1.0)), f64(-1.0, -1.0))
