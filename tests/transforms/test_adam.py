"""diffopt.transforms.adam: the scaling, its bias correction and its derivatives at zero gradient."""

import math
from fractions import Fraction

import pytest
import torch
from torch.func import grad, jacrev, vmap

from diffopt.transforms import scale_by_adam

GRADS = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(grads, *hyperparameters, **options):
    transformation = scale_by_adam(*hyperparameters, **options)
    state = transformation.init(grads[0])
    for g in grads:
        updates, state = transformation.update(g, state)
    return updates, state


@pytest.mark.parametrize("eps_root", [0.0, 1e-3])
@pytest.mark.parametrize("nesterov", [False, True])
def test_against_the_paper(eps_root, nesterov):
    b1, b2, eps, steps = 0.8, 0.9, 1e-2, len(GRADS)
    powers = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    mu = ((1 - b1) * b1**powers) @ GRADS
    nu = ((1 - b2) * b2**powers) @ GRADS**2
    mean = mu / (1 - b1**steps)
    if nesterov:
        mean = b1 * mu / (1 - b1 ** (steps + 1)) + (1 - b1) * GRADS[-1] / (1 - b1**steps)
    want = mean / ((nu / (1 - b2**steps) + eps_root).sqrt() + eps)
    got, state = run(GRADS, b1, b2, eps, eps_root, nesterov=nesterov)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(state.mu, mu)
    torch.testing.assert_close(state.nu, nu)
    assert state.count == steps


def test_a_constant_gradient_gives_updates_of_one_for_ever():
    # The corrections cancel the decays exactly, so any inaccuracy of theirs shows.
    updates, _ = run(torch.full((50, 1), 2.0, dtype=torch.float64), 0.9, 0.999, 0.0)
    torch.testing.assert_close(updates, torch.ones(1, dtype=torch.float64), rtol=1e-12, atol=0)
    updates, _ = run(torch.full((50, 1), 2.0), 0.9, 0.999, 0.0)
    torch.testing.assert_close(updates, torch.ones(1), rtol=1e-6, atol=0)


def test_the_correction_is_accurate_to_float64_when_b2_is_near_one():
    b2, steps = 1 - 2.0**-20, 3
    updates, state = run(GRADS[:steps], 0.0, b2, 0.0)
    correction = float(1 - Fraction(b2) ** steps)
    torch.testing.assert_close(updates, GRADS[steps - 1] / (state.nu / correction).sqrt(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("position", [0, 1])
def test_derivatives_at_decay_zero_are_finite(position):
    """d/db b^t at 0 is 0 for t > 1 and 1 for t = 1; exp(t log b) would give NaN."""
    decays = [torch.tensor(0.5, dtype=torch.float64)] * 2

    def total(b):
        return run(GRADS[:1], *(b if i == position else d for i, d in enumerate(decays)))[0].sum()

    # After one step the corrected means are g and g^2, whatever the decays.
    slope = grad(total)(torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(slope, torch.zeros((), dtype=torch.float64))


def test_eps_root_makes_the_derivative_at_zero_gradient_finite():
    zero = torch.zeros(2, dtype=torch.float64)

    def update(g, eps_root):
        return run(g[None], 0.9, 0.999, 1e-8, eps_root)[0]

    assert torch.equal(update(zero, 0.0), zero)
    assert jacrev(update)(zero, 0.0).isnan().any()
    # u = g / (sqrt(g^2 + eps_root) + eps), so du/dg = 1 / (sqrt(eps_root) + eps) at 0.
    want = torch.eye(2, dtype=torch.float64) / (math.sqrt(1e-6) + 1e-8)
    torch.testing.assert_close(jacrev(update)(zero, 1e-6), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_their_moments_in_float32(dtype):
    updates, state = run(torch.ones(2000, 1, dtype=dtype), 0.9, torch.tensor(0.999))
    assert updates.dtype == dtype
    assert state.mu.dtype == state.nu.dtype == torch.float32
    torch.testing.assert_close(updates, torch.ones(1, dtype=dtype))  # with moments of 16 bits: 1.6


def test_shared_initial_state_under_vmap():
    transformation = scale_by_adam()
    state = transformation.init(GRADS[0])
    updates, states = vmap(lambda g: transformation.update(g, state))(GRADS)
    assert states.count.tolist() == [1] * 4
    for g, u, mu in zip(GRADS, updates, states.mu, strict=True):
        want, want_state = transformation.update(g, state)
        torch.testing.assert_close(u, want)
        torch.testing.assert_close(mu, want_state.mu)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"b1": 1.0}, r"`b1` must be at least 0.0 and below 1.0; got 1.0"),
        ({"b1": -0.1}, "`b1`"),
        ({"b2": 1.5}, "`b2`"),
        ({"b2": math.nan}, "`b2`"),
        ({"eps": -1e-8}, "`eps` must be at least 0.0; got -1e-08"),
        ({"eps_root": -1.0}, "`eps_root`"),
        ({"b1": torch.ones(2)}, "0-d tensor"),
    ],
)
def test_bad_hyperparameters_raise(options, match):
    with pytest.raises(ValueError, match=match):
        scale_by_adam(**options)
