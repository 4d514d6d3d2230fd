"""diffopt.solvers.anderson: the extrapolation against its definition, and against GMRES on affine maps."""

import torch

from diffopt.solvers import Anderson, fixed_point


def affine(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    return M, torch.randn(n, generator=generator, dtype=torch.float64)


def test_a_step_is_the_one_of_the_definition():
    M, b = affine(6)

    def fn(x):
        return torch.tanh(M @ x) + b

    solver = Anderson(3, damping=0.8, ridge=0.0)
    state = solver.init(fn, torch.zeros_like(b))
    xs = [state.x]
    for _ in range(6):
        state = solver.step(fn, state)
        xs.append(state.x)
    for k in range(1, 6):
        kept = xs[max(0, k - 3) : k + 1]
        f = torch.stack([fn(x) - x for x in kept], 1)
        X = torch.stack(kept, 1)
        dX, dF = X.diff(dim=1), f.diff(dim=1)
        gamma = torch.linalg.lstsq(dF, f[:, -1:]).solution
        expected = X[:, -1:] + 0.8 * f[:, -1:] - (dX + 0.8 * dF) @ gamma
        torch.testing.assert_close(xs[k + 1], expected[:, 0], rtol=1e-7, atol=1e-9)  # normal equations against QR


def test_affine_maps_end_after_as_many_steps_as_unknowns():
    M, b = affine(6)  # the spectral radius is about 1: plain iteration fails
    solution = fixed_point(lambda x: M @ x + b, torch.zeros_like(b), solver=Anderson(6), rtol=0.0, atol=1e-9)
    assert solution.stats.steps <= 9
    torch.testing.assert_close(
        solution.value, torch.linalg.solve(torch.eye(6, dtype=b.dtype) - M, b), rtol=1e-7, atol=0
    )
