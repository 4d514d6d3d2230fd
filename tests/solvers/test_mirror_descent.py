"""diffopt.solvers.mirror_descent: on the simplex, with the derivative of the projected fixed point."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from diffopt.convex import kl_projection_simplex, projection_simplex
from diffopt.implicit import Unrolled
from diffopt.solvers import Mirror, MirrorDescent, Objective, entropy_mirror, minimize

F64 = torch.float64
TIGHT = {"rtol": 0.0, "atol": 1e-9}
START = torch.ones(4, dtype=F64) / 4
TARGET = torch.tensor([0.6, 0.3, 0.25, 0.1], dtype=F64)
KL = Mirror(lambda x: x.clamp(min=1e-300).log(), kl_projection_simplex)


def loss(x, c):
    return (torch.arange(1, 5, dtype=F64) * (x - c) ** 2).sum()


def solve(c, **options):
    return minimize(loss, START, (c,), projection=projection_simplex, **options)


@pytest.mark.parametrize(
    "solver",
    [MirrorDescent(entropy_mirror()), MirrorDescent(KL), MirrorDescent(KL, 0.2), MirrorDescent(KL, lambda k: 0.3)],
)
def test_the_minimizer_and_its_derivatives_are_those_of_projected_gradient(solver):
    reference = solve(TARGET, **TIGHT)
    assert torch.allclose(solve(TARGET, solver=solver, **TIGHT).value, reference.value, atol=1e-8)
    there = jacrev(lambda c: solve(c, **TIGHT).value)(TARGET)
    for jacobian in (jacrev, jacfwd):
        assert torch.allclose(jacobian(lambda c: solve(c, solver=solver, **TIGHT).value)(TARGET), there, atol=1e-7)
    unrolled = jacrev(lambda c: solve(c, solver=solver, adjoint=Unrolled(), **TIGHT).value)(TARGET)
    assert torch.allclose(unrolled, there, atol=1e-5)


def test_a_minimizer_on_the_boundary():
    c = torch.tensor([0.9, 0.6, -0.5, 0.1], dtype=F64)
    found = solve(c, solver=MirrorDescent(entropy_mirror()))
    reference = solve(c)
    assert torch.allclose(found.value, reference.value, atol=1e-6)
    assert (reference.value == 0).any()
    there = jacrev(lambda c: solve(c).value)(c)
    assert torch.allclose(jacrev(lambda c: solve(c, solver=MirrorDescent(KL)).value)(c), there, atol=1e-6)


def test_a_step_is_the_exponentiated_gradient():
    solver = MirrorDescent(entropy_mirror(), 0.5)
    objective = Objective(lambda x: loss(x, TARGET), prox=lambda x, s: projection_simplex(x))
    state = solver.step(objective, solver.init(objective, START))
    expected = START * torch.exp(-0.5 * grad(loss)(START, TARGET))
    assert torch.allclose(state.x, expected / expected.sum())


def test_trees_of_rows_and_another_total():
    total = torch.tensor(2.0, dtype=F64)
    c = {"p": torch.tensor([[1.0, 0.2], [0.3, 0.9]], dtype=F64), "q": torch.tensor([0.4, 0.7, 0.6], dtype=F64)}
    init = {"p": torch.ones(2, 2, dtype=F64), "q": torch.ones(3, dtype=F64)}

    def onto(x, total):
        return {"p": vmap(lambda row: projection_simplex(row, total))(x["p"]), "q": projection_simplex(x["q"], total)}

    def minimizer(total, **options):
        return minimize(
            lambda x: ((x["p"] - c["p"]) ** 2).sum() + ((x["q"] - c["q"]) ** 2).sum(),
            init, projection=lambda x: onto(x, total), **options,
        ).value  # fmt: skip

    ours = jacrev(lambda total: minimizer(total, solver=MirrorDescent(entropy_mirror(total)))["q"])(total)
    assert torch.allclose(minimizer(total, solver=MirrorDescent(entropy_mirror(total)))["p"].sum(-1), total)
    assert torch.allclose(ours, torch.full((3,), 1 / 3, dtype=F64), atol=1e-6)


def test_schedules_and_counting():
    solver = MirrorDescent(KL, lambda count: 1.0 / (count + 1))
    found = solve(TARGET, solver=solver, max_steps=3, throw=False)
    assert found.state.steps == 3
    assert torch.allclose(found.state.step_size, torch.tensor(1 / 3, dtype=F64), atol=1e-7)


def test_vmap_equals_the_loop():
    cs = torch.stack([TARGET, TARGET.flip(0), 3 * TARGET])
    run = lambda c: solve(c, solver=MirrorDescent(KL)).value  # noqa: E731
    assert torch.allclose(vmap(run)(cs), torch.stack([run(c) for c in cs]), atol=1e-10)
    slope = grad(lambda c: (run(c) ** 2).sum())
    assert torch.allclose(vmap(slope)(cs), torch.stack([slope(c) for c in cs]), atol=1e-8)


def test_stepping_by_hand_equals_minimize():
    solver = MirrorDescent(KL)
    objective = Objective(lambda x: loss(x, TARGET), prox=lambda x, s: projection_simplex(x))
    state = solver.init(objective, START)
    for _ in range(4):
        state = solver.step(objective, state)
    for mine, its in zip(state, solve(TARGET, solver=solver, max_steps=4, throw=False).state, strict=True):
        assert torch.equal(mine, its)


def test_wrong_options_raise():
    with pytest.raises(TypeError, match="mirror"):
        MirrorDescent(torch.log)
    with pytest.raises(ValueError, match="step_size"):
        MirrorDescent(KL, -1.0)
    with pytest.raises(ValueError, match="projection="):
        minimize(loss, START, (TARGET,), solver=MirrorDescent(KL))
    with pytest.raises(ValueError, match="bounds"):
        minimize(loss, START, (TARGET,), solver=MirrorDescent(KL), bounds=(0, 1))
