"""The argmin operator inside itself: total gradients of two, three and four levels, through every adjoint."""

import pytest
import torch
from torch.func import grad, hessian, vmap
from torch.testing import assert_close

from diffopt.implicit import Detached, Implicit, OneStep, Unrolled
from diffopt.linalg import CG, GMRES, Dense, NormalCG
from diffopt.optimizers import sgd
from diffopt.solvers import FromOptimizer, NewtonCG, minimize
from multilevel.quadratic_programs import EDGES, SHAPES, SIZES, quadratic, solved, start, true_gradient

CHAINS = [name for name in SHAPES if all(len(set(ends)) == len(ends) for ends in zip(*EDGES[name], strict=True))]
TIGHT = {"rtol": 0.0, "atol": 1e-10, "max_steps": 500}
EXACT = {
    "Implicit": (NewtonCG(), Implicit()),
    "Implicit, CG": (NewtonCG(), Implicit(CG(rtol=1e-12))),
    "Implicit, GMRES": (NewtonCG(), Implicit(GMRES(rtol=1e-12))),
    "Implicit, NormalCG": (NewtonCG(), Implicit(NormalCG(rtol=1e-12))),
    "Unrolled": (NewtonCG(), Unrolled()),
    "Unrolled, checkpoint": (NewtonCG(), Unrolled(checkpoint="sqrt")),
}


def nested(shape, solver, adjoint):
    """The top level's loss as a function of its own vector alone: each level's answer is a `minimize(...).value`."""
    reads = SHAPES[shape]
    names = list(reads)

    def answers(known, name):
        """What lies below, given what is known above."""
        if name not in reads:
            return {}

        def loss(x, known):
            here = {**known, name: x}
            here = {**here, **answers(here, below_of[name])}
            return quadratic(name, reads[name])(x, *(here[read] for read in reads[name]))

        init = torch.ones(SIZES[name], dtype=torch.float64)
        x = minimize(loss, init, (known,), solver=solver, adjoint=adjoint, **TIGHT).value
        return {name: x, **answers({**known, name: x}, below_of[name])}

    below_of = dict(zip(names, [*names[1:], ""], strict=True))

    def value(a):
        known = {"a": a, **answers({"a": a}, below_of["a"])}
        return quadratic("a", reads["a"])(*(known[name] for name in ["a", *reads["a"]]))

    return value


def cases():
    """Every adjoint two and three levels deep; the rest is slow."""
    for shape in CHAINS:
        many = shape.startswith("three") and "alone" not in shape
        for how in EXACT if not shape.startswith("four") else ():
            slow = (many and how != "Implicit") or (shape != "two levels" and how == "Unrolled, checkpoint")
            yield pytest.param(shape, how, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("shape", "how"), list(cases()))
def test_total_gradients_are_exact(shape, how):
    a = start(shape)["a"]
    found = grad(nested(shape, *EXACT[how]))(a)
    assert_close(found, true_gradient(shape, "a", {"a": a}), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_four_levels():
    shape = "four, by neighbours"
    a = start(shape)["a"]
    found = grad(nested(shape, NewtonCG(), Implicit(Dense())))(a)
    assert_close(found, true_gradient(shape, "a", {"a": a}), rtol=1e-6, atol=1e-6)


def rotated(solver, adjoint):
    """Three levels whose Hessians are identities, so that one step of gradient descent is the solution."""
    angle = torch.tensor(0.7, dtype=torch.float64)
    R = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    target = torch.tensor([1.0, -2.0], dtype=torch.float64)
    init = torch.ones(2, dtype=torch.float64)
    solve = lambda loss, *args: minimize(loss, init, args, solver=solver, adjoint=adjoint, **TIGHT).value  # noqa: E731
    low = lambda c, b, a: ((c - R @ b - a) ** 2).sum() / 2  # noqa: E731

    def middle(b, a):
        return ((solve(low, b, a) - target) ** 2).sum() / 4 + ((b - 3 * a) ** 2).sum() / 4

    def top(a):
        b = solve(middle, a)
        return (b**2).sum() + ((solve(low, b, a) - 1) ** 2).sum()

    def closed(a):  # (b - 3 a + R' (R b + a - target)) / 2 = 0
        b = (3 * a - R.mT @ (a - target)) / 2
        return (b**2).sum() + ((R @ b + a - 1) ** 2).sum()

    return top, closed


@pytest.mark.parametrize("adjoint", [OneStep(1.0), Implicit(Dense()), Unrolled(truncate=2)], ids=lambda a: repr(a)[:9])
def test_one_step_is_exact_where_the_hessian_is_the_identity(adjoint):
    top, closed = rotated(FromOptimizer(sgd(1.0)), adjoint)
    a = torch.tensor([0.5, 1.5], dtype=torch.float64)
    assert_close(top(a), closed(a), rtol=1e-8, atol=1e-8)
    assert_close(grad(top)(a), grad(closed)(a), rtol=1e-7, atol=1e-7)


def test_detached_answers_are_constants():
    a = start("two levels")["a"]
    b = solved("two levels", "a", {"a": a})["b"]
    found = grad(nested("two levels", NewtonCG(), Detached()))(a)
    assert_close(found, grad(quadratic("a", "b"))(a, b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", ["two levels", pytest.param("three, by neighbours", marks=pytest.mark.slow)])
def test_seeds_map_and_hessians_are_exact(shape):
    a = start(shape)["a"]
    value = nested(shape, NewtonCG(), Implicit(Dense()))
    many = torch.stack([a, 2 * a, a - 1])
    want = torch.stack([true_gradient(shape, "a", {"a": each}) for each in many])
    assert_close(vmap(grad(value))(many), want, rtol=1e-6, atol=1e-6)
    units = torch.eye(len(a), dtype=torch.float64)
    slope = lambda x: true_gradient(shape, "a", {"a": x})  # noqa: E731
    curvature = torch.stack([(slope(a + e) - slope(a - e)) / 2 for e in units])  # exact: the gradient is linear
    assert_close(hessian(value)(a), curvature, rtol=1e-6, atol=1e-6)
