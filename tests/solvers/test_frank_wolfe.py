"""diffopt.solvers.frank_wolfe: sets known by an oracle, the duality gap, the derivative by a projection."""

import pytest
import torch
from torch.func import grad, jacrev, vmap

from diffopt.convex import projection_l2_ball, projection_simplex
from diffopt.implicit import Detached, OneStep, Unrolled
from diffopt.solvers import FrankWolfe, Objective, minimize

F64 = torch.float64
TARGET = torch.tensor([0.8, 0.5, 0.3, -0.1], dtype=F64)
START = torch.ones(4, dtype=F64) / 4


def corner(g):
    return torch.nn.functional.one_hot(g.argmin(), 4).to(g.dtype)


def on_sphere(r):
    return lambda g: -r * g / torch.linalg.vector_norm(g)


def loss(x, c):
    return ((x - c) ** 2).sum()


@pytest.mark.parametrize("step_size", ["search", "open"])
def test_on_the_simplex_the_gap_bounds_the_error(step_size):
    found = minimize(loss, START, (TARGET,), solver=FrankWolfe(corner, step_size), atol=1e-2)
    best = loss(projection_simplex(TARGET), TARGET)
    assert found.value.sum().item() == pytest.approx(1)
    assert (found.value >= 0).all()
    assert 0 <= loss(found.value, TARGET) - best <= found.stats.error + 1e-12
    assert found.stats.error <= 1e-2 + 1e-6


def test_on_the_ball_it_converges_linearly_and_is_differentiated_by_the_projection():
    def solve(r, c, **options):
        ball = lambda x: projection_l2_ball(x, r)  # noqa: E731
        return minimize(loss, START, (c,), projection=ball, solver=FrankWolfe(on_sphere(r)), **options).value

    r, c = torch.tensor(0.7, dtype=F64), 2 * TARGET
    n = c.norm()
    assert torch.allclose(solve(r, c), r * c / n, atol=1e-6)
    by_r, by_c = jacrev(solve, argnums=(0, 1))(r, c)
    assert torch.allclose(by_r, c / n, atol=1e-5)
    assert torch.allclose(by_c, r / n * (torch.eye(4, dtype=F64) - torch.outer(c, c) / n**2), atol=1e-5)
    unrolled = jacrev(lambda r: solve(r, c, adjoint=Unrolled(), rtol=0.0, atol=1e-13))(r)
    assert torch.allclose(unrolled, c / n, atol=1e-4)
    loop = torch.stack([solve(r, c) for r in (r, 2 * r)])
    assert torch.allclose(vmap(lambda r: solve(r, c))(torch.stack([r, 2 * r])), loop, atol=1e-10)


def test_a_minimizer_inside():
    inside = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    found = minimize(loss, START, (inside,), solver=FrankWolfe(corner), atol=1e-4)
    assert torch.allclose(found.value, inside, atol=1e-2)


def test_without_a_projection_a_derivative_raises_and_says_so():
    def solve(c, **options):
        return minimize(loss, START, (c,), solver=FrankWolfe(corner), atol=1e-2, **options).value

    assert solve(TARGET).sum().item() == pytest.approx(1)
    for adjoint in (None, OneStep()):
        with pytest.raises(ValueError, match="give projection="):
            grad(lambda c, a=adjoint: solve(c, adjoint=a).sum())(TARGET)
    with pytest.raises(ValueError, match="give projection="):
        solve(TARGET.clone().requires_grad_())
    assert (grad(lambda c: solve(c, adjoint=Detached())[0])(TARGET) == 0).all()
    assert grad(lambda c: solve(c, adjoint=Unrolled())[0])(TARGET).isfinite().all()


def test_trees():
    target = {"a": torch.tensor([3.0, 0.0], dtype=F64), "b": torch.tensor(4.0, dtype=F64)}

    def oracle(g):
        n = (g["a"].pow(2).sum() + g["b"] ** 2).sqrt()
        return {"a": -g["a"] / n, "b": -g["b"] / n}

    start = {"a": torch.zeros(2, dtype=F64), "b": torch.zeros((), dtype=F64)}
    far = lambda x: ((x["a"] - target["a"]) ** 2).sum() + (x["b"] - target["b"]) ** 2  # noqa: E731
    found = minimize(far, start, solver=FrankWolfe(oracle)).value
    assert torch.allclose(found["a"], torch.tensor([0.6, 0.0], dtype=F64), atol=1e-6)
    assert torch.allclose(found["b"], torch.tensor(0.8, dtype=F64), atol=1e-6)


def test_stepping_by_hand_equals_minimize():
    for step_size in ("search", "open"):
        solver = FrankWolfe(corner, step_size)
        objective = Objective(lambda x: loss(x, TARGET))
        state = solver.init(objective, START)
        for _ in range(4):
            state = solver.step(objective, state)
        ours = minimize(loss, START, (TARGET,), solver=solver, max_steps=4, throw=False).state
        for mine, its in zip(state, ours, strict=True):
            assert torch.equal(mine, its)


def test_wrong_options_raise():
    with pytest.raises(TypeError, match="oracle"):
        FrankWolfe(TARGET)
    with pytest.raises(ValueError, match="step_size"):
        FrankWolfe(corner, 0.1)
    with pytest.raises(ValueError, match="bounds"):
        minimize(loss, START, (TARGET,), solver=FrankWolfe(corner), bounds=(0, 1))
