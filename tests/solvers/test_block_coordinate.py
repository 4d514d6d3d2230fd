"""diffopt.solvers.block_coordinate: sweeps over blocks end where all blocks together would."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from diffopt.convex import projection_simplex, prox_lasso
from diffopt.implicit import Unrolled
from diffopt.solvers import BlockCoordinateDescent, Objective, ProximalGradient, minimize

F64 = torch.float64
TIGHT = {"rtol": 0.0, "atol": 1e-10}


def problem(n=20, d=6):
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(n, d, dtype=F64, generator=generator)
    return X, torch.randn(n, dtype=F64, generator=generator) * 3


X, Y = problem()
LAM = torch.tensor(0.4, dtype=F64)


def lasso(lam, **options):
    return minimize(
        lambda w: ((X @ w - Y) ** 2).mean() / 2, torch.zeros(6, dtype=F64),
        prox=lambda w, s: prox_lasso(w, lam, s), **options,
    )  # fmt: skip


@pytest.mark.parametrize("blocks", [None, 1, 3, (1, 2, 3)])
def test_lasso_for_any_blocks(blocks):
    ours = lasso(LAM, solver=BlockCoordinateDescent(blocks), **TIGHT)
    assert torch.allclose(ours.value, lasso(LAM, **TIGHT).value, atol=1e-8)
    assert ours.state.step_sizes.numel() == {None: 1, 1: 6, 3: 2}.get(blocks, 3)


def test_coordinates_with_exact_steps_are_coordinate_descent():
    exact = 1 / (X * X).mean(0)
    found = lasso(LAM, solver=BlockCoordinateDescent(1, exact), max_steps=1, throw=False).state.x
    w = torch.zeros(6, dtype=F64)
    for j in range(6):
        r = Y - X @ w + X[:, j] * w[j]
        rho = (X[:, j] * r).mean()
        w[j] = rho.sign() * (rho.abs() - LAM).clamp(min=0) * exact[j]
    assert torch.allclose(found, w)


def test_derivatives_implicit_and_unrolled():
    there = jacrev(lambda lam: lasso(lam, **TIGHT).value)(LAM)
    solver = BlockCoordinateDescent(2)
    for jacobian in (jacrev, jacfwd):
        assert torch.allclose(jacobian(lambda lam: lasso(lam, solver=solver, **TIGHT).value)(LAM), there, atol=1e-8)
    for adjoint, tol in ((Unrolled(), 1e-6), (Unrolled(truncate=40), 1e-2)):
        unrolled = jacrev(lambda lam, a=adjoint: lasso(lam, solver=solver, adjoint=a, **TIGHT).value)(LAM)
        assert torch.allclose(unrolled, there, atol=tol)


def test_leaves_of_different_scale_are_blocks_of_their_own():
    def loss(x):
        return ((x["a"] - 1) ** 2).sum() + 1e4 * ((x["b"] - 0.3) ** 2).sum() + x["a"].sum() * x["b"].sum()

    start = {"a": torch.zeros(2, dtype=F64), "b": torch.zeros(3, dtype=F64)}
    blocks = minimize(loss, start, bounds=(0, 0.9), solver=BlockCoordinateDescent())
    whole = minimize(loss, start, bounds=(0, 0.9), solver=ProximalGradient(accelerate=False), throw=False)
    assert blocks.stats.steps < whole.stats.steps / 3
    assert blocks.state.step_sizes[0] > 100 * blocks.state.step_sizes[1]


def test_rows_on_the_simplex():
    target = torch.linspace(-0.5, 1.2, 12, dtype=F64).reshape(4, 3)
    project = lambda W: vmap(projection_simplex)(W)  # noqa: E731
    loss = lambda W: ((W - target) ** 2).sum() + (W.sum(0) ** 2).sum() / 3  # noqa: E731
    start = torch.ones(4, 3, dtype=F64) / 3
    ours = minimize(loss, start, projection=project, solver=BlockCoordinateDescent(3), **TIGHT).value
    assert torch.allclose(ours, minimize(loss, start, projection=project, **TIGHT).value, atol=1e-8)


def test_vmap_equals_the_loop():
    lams = torch.tensor([0.1, 0.4, 9.0], dtype=F64)
    solve = lambda lam: lasso(lam, solver=BlockCoordinateDescent(3)).value  # noqa: E731
    assert torch.allclose(vmap(solve)(lams), torch.stack([solve(lam) for lam in lams]), atol=1e-10)
    slope = grad(lambda lam: solve(lam).sum())
    assert torch.allclose(vmap(slope)(lams), torch.stack([slope(lam) for lam in lams]), atol=1e-8)


def test_stepping_by_hand_equals_minimize():
    solver = BlockCoordinateDescent((2, 4))
    objective = Objective(lambda w: ((X @ w - Y) ** 2).mean() / 2, prox=lambda w, s: prox_lasso(w, LAM, s))
    state = solver.init(objective, torch.zeros(6, dtype=F64))
    for _ in range(4):
        state = solver.step(objective, state)
    for mine, its in zip(state, lasso(LAM, solver=solver, max_steps=4, throw=False).state, strict=True):
        assert torch.equal(mine, its)


def test_wrong_options_raise():
    for blocks in (0, (), (2, 0), "rows"):
        with pytest.raises(ValueError, match="blocks"):
            BlockCoordinateDescent(blocks)
    with pytest.raises(ValueError, match="6 unknowns"):
        lasso(LAM, solver=BlockCoordinateDescent(4))
    with pytest.raises(ValueError, match="step_size"):
        BlockCoordinateDescent(step_size=-1.0)
