"""diffopt.solvers.squarem: quadratic convergence of Aitken's process, and what SQUAREM saves."""

import torch

from diffopt.solvers import SQUAREM, Aitken, FixedPointIteration, fixed_point

EXACT = {"rtol": 0.0, "atol": 1e-12}


def test_aitken_is_exact_on_affine_maps_of_numbers():
    rates, shift = (
        torch.tensor([0.9, -0.5, 2.0], dtype=torch.float64),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    )
    solver = Aitken()

    def fn(x):
        return rates * x + shift

    state = solver.step(fn, solver.init(fn, torch.zeros_like(shift)))
    torch.testing.assert_close(state.x, shift / (1 - rates))
    still = solver.step(fn, state._replace(x=shift / (1 - rates), residual=torch.zeros_like(shift)))
    assert still.x.isfinite().all()


def test_squarem_speeds_up_expectation_maximization():
    counts = torch.tensor([162.0, 267, 271, 185, 111, 61, 27, 8, 3, 1], dtype=torch.float64)  # Hasselblad's deaths
    deaths = torch.arange(10, dtype=torch.float64)

    def update(x):  # a mixture of two Poisson distributions
        p, rates = x[0], x[1:]
        logits = deaths[:, None] * rates.log() - rates + torch.stack([p, 1 - p]).log()
        weights = torch.softmax(logits, 1) * counts[:, None]
        return torch.cat([weights[:, :1].sum(0) / counts.sum(), (weights * deaths[:, None]).sum(0) / weights.sum(0)])

    start = torch.tensor([0.28, 1.06, 2.59], dtype=torch.float64)
    tight = {"rtol": 0.0, "atol": 1e-8, "max_steps": 10_000}
    plain = fixed_point(update, start, solver=FixedPointIteration(), **tight)
    fast = fixed_point(update, start, solver=SQUAREM(), **tight)
    torch.testing.assert_close(fast.value, plain.value, rtol=1e-4, atol=0)
    # the published maximum: p = 0.3599, rates 1.256 and 2.663
    torch.testing.assert_close(fast.value, torch.tensor([0.3599, 1.256, 2.663], dtype=torch.float64), rtol=1e-3, atol=0)
    assert 5 * 3 * fast.stats.steps < plain.stats.steps


def test_squarem_falls_back_to_two_plain_steps():
    def fn(x):  # extrapolation from here leaves the domain
        return torch.sqrt(x) + 0.1 * x

    start = torch.full((2,), 1e-3, dtype=torch.float64)
    solution = fixed_point(fn, start, solver=SQUAREM(), **EXACT)
    torch.testing.assert_close(solution.value, torch.full_like(start, 1 / 0.81))


def test_a_map_without_a_fixed_point_is_no_success():
    found = fixed_point(lambda x: x + 1, torch.ones(2), solver=SQUAREM(), throw=False, max_steps=20)
    assert int(found.result) == 1
