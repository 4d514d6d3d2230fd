"""diffopt.solvers.newton: Newton's and the chord method on their own."""

import pytest
import torch
from torch.func import grad, vmap

from diffopt.implicit import Unrolled
from diffopt.solvers import Chord, Newton, root
from diffopt.solvers.newton import rows, solved

X = torch.tensor([1.5, -0.7], dtype=torch.float64)
M = torch.tensor([[3.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)


def test_newton_solves_an_affine_equation_in_one_step():
    state = Newton().step(lambda x: M @ x - X, Newton().init(lambda x: M @ x - X, torch.ones_like(X)))
    torch.testing.assert_close(state.x, torch.linalg.solve(M, X))
    assert state.residual.abs().max() < 1e-14


def test_newton_converges_quadratically_and_chord_linearly():
    def errors(solver):
        history = root(lambda x: x**3 - 8, torch.full((1,), 2.5, dtype=torch.float64), solver=solver, history=True,
                       rtol=0.0, atol=1e-12).stats.history  # fmt: skip
        return history[history > 1e-10]

    newton, chord = errors(Newton()), errors(Chord())
    assert len(newton) <= 5
    ratios = chord[1:] / chord[:-1]
    assert (ratios[2:] - ratios[-1]).abs().max() < 0.05


def test_step_size_is_differentiated_when_unrolled():
    def ended(size, steps=2):
        return root(lambda x: x**2 - 2, torch.ones(1, dtype=torch.float64), solver=Newton(step_size=size), throw=False,
                    max_steps=steps, adjoint=Unrolled(), rtol=0.0, atol=0.0).state.x  # fmt: skip

    def by_hand(size):
        x = torch.ones(1, dtype=torch.float64)
        for _ in range(2):
            x = x - size * (x**2 - 2) / (2 * x)
        return x.sum()

    def value(size):
        run = root(lambda x: x**2 - 2, torch.ones(1, dtype=torch.float64), solver=Newton(step_size=size), throw=False,
                   max_steps=2, adjoint=Unrolled(), rtol=0.0, atol=0.0)  # fmt: skip
        return run.value.sum()

    size = torch.tensor(0.6, dtype=torch.float64)
    torch.testing.assert_close(ended(size).sum(), by_hand(size))
    torch.testing.assert_close(grad(value)(size), grad(by_hand)(size))


@pytest.mark.parametrize("n", [1, 2, 9, 12])
def test_rows_and_solved_under_nested_lanes(n):
    generator = torch.Generator().manual_seed(n)
    A = torch.randn(4, 3, n, n, generator=generator, dtype=torch.float64) + 3 * torch.eye(n, dtype=torch.float64)
    b = torch.randn(3, n, generator=generator, dtype=torch.float64)

    def one(A, b):
        return rows(lambda u: u @ A, b), solved(A, b)

    J, d = vmap(vmap(one), in_dims=(0, None))(A, b)
    torch.testing.assert_close(J, A)
    torch.testing.assert_close(d, torch.linalg.solve(A, b.expand(4, 3, n)))


def test_solved_tells_singular_and_nan_lanes_apart_by_nan():
    bad = torch.stack([M, torch.zeros_like(M), torch.full_like(M, torch.nan)])
    found = vmap(solved, in_dims=(0, None))(bad, X)
    torch.testing.assert_close(found[0], torch.linalg.solve(M, X))
    assert found[1:].isnan().all()
