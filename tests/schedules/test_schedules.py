"""diffopt.schedules: values against formulas in plain Python and torch's schedulers; derivatives; transforms."""

import itertools
import math

import pytest
import torch
from torch.func import grad, vmap

from diffopt import schedules
from diffopt.optimizers import sgd
from diffopt.schedules import (
    constant_schedule,
    cosine_decay_schedule,
    cosine_onecycle_schedule,
    exponential_decay,
    join_schedules,
    linear_onecycle_schedule,
    linear_schedule,
    piecewise_constant_schedule,
    polynomial_schedule,
    sgdr_schedule,
    warmup_constant_schedule,
    warmup_cosine_decay_schedule,
    warmup_exponential_decay_schedule,
)
from diffopt.testing import check_hypergradient
from diffopt.transforms import step


def clip(x):
    return min(max(x, 0.0), 1.0)


def half_cosine(start, end, t, power=1.0):
    return end + (start - end) * (0.5 * (1 + math.cos(math.pi * clip(t)))) ** power


def lines(points, t):
    for (t0, v0), (t1, v1) in itertools.pairwise(points):
        if t < t1:
            return v0 + (v1 - v0) * clip((t - t0) / (t1 - t0))
    return points[-1][1]


WARM = {"init_value": 0.1, "peak_value": 0.8, "warmup_steps": 2.5, "decay_steps": 6.5, "end_value": 0.05}
# name: the schedule of its parameters, the parameters, the value at step t in plain Python
SCHEDULES = {
    "constant": (constant_schedule, {"value": 0.3}, lambda t: 0.3),
    "polynomial": (
        polynomial_schedule,
        {"init_value": 0.9, "end_value": 0.2, "power": 1.7, "transition_steps": 5.5, "transition_begin": 1.25},
        lambda t: 0.2 + 0.7 * (1 - clip((t - 1.25) / 5.5)) ** 1.7,
    ),
    "linear": (
        linear_schedule,
        {"init_value": 0.9, "end_value": 0.2, "transition_steps": 5.5, "transition_begin": 1.25},
        lambda t: 0.9 - 0.7 * clip((t - 1.25) / 5.5),
    ),
    "exponential": (
        exponential_decay,
        {"init_value": 0.9, "transition_steps": 3.5, "decay_rate": 0.4, "transition_begin": 1.25},
        lambda t: 0.9 * 0.4 ** (max(t - 1.25, 0) / 3.5),
    ),
    "exponential, bounded": (
        exponential_decay,
        {"init_value": 0.9, "transition_steps": 3.5, "decay_rate": 0.4, "end_value": 0.3},
        lambda t: max(0.9 * 0.4 ** (t / 3.5), 0.3),
    ),
    "exponential, staircase": (
        lambda init_value, decay_rate: exponential_decay(init_value, 3, decay_rate, staircase=True),
        {"init_value": 0.9, "decay_rate": 0.4},
        lambda t: 0.9 * 0.4 ** (t // 3),
    ),
    "growth, bounded": (
        exponential_decay,
        {"init_value": 0.1, "transition_steps": 3.5, "decay_rate": 2.5, "end_value": 0.3},
        lambda t: min(0.1 * 2.5 ** (t / 3.5), 0.3),
    ),
    "cosine": (
        cosine_decay_schedule,
        {"init_value": 0.9, "decay_steps": 6.5, "alpha": 0.1, "exponent": 1.3},
        lambda t: half_cosine(0.9, 0.09, t / 6.5, 1.3),
    ),
    "piecewise constant": (
        lambda v, a, b: piecewise_constant_schedule(v, {2: a, 5: b}),
        {"v": 0.9, "a": 0.5, "b": 0.1},
        lambda t: 0.9 * (0.5 if t >= 2 else 1.0) * (0.1 if t >= 5 else 1.0),
    ),
    "linear one-cycle": (
        linear_onecycle_schedule,
        {
            "transition_steps": 7.5,
            "peak_value": 0.9,
            "pct_start": 0.25,
            "pct_final": 0.7,
            "div_factor": 5.0,
            "final_div_factor": 10.0,
        },
        lambda t: lines([(0, 0.18), (7.5 * 0.25, 0.9), (7.5 * 0.7, 0.18), (7.5, 0.018)], t),
    ),
    "cosine one-cycle": (
        cosine_onecycle_schedule,
        {"transition_steps": 7.5, "peak_value": 0.9, "pct_start": 0.25, "div_factor": 5.0, "final_div_factor": 10.0},
        lambda t: (
            half_cosine(0.18, 0.9, t / 1.875) if t < 1.875 else half_cosine(0.9, 0.018, (t - 1.875) / (7.5 - 1.875))
        ),
    ),
    "warm-up, constant": (
        warmup_constant_schedule,
        {"init_value": 0.1, "peak_value": 0.8, "warmup_steps": 2.5},
        lambda t: 0.1 + 0.7 * clip(t / 2.5),
    ),
    "warm-up, cosine": (
        warmup_cosine_decay_schedule,
        WARM | {"exponent": 1.3},
        lambda t: 0.1 + 0.7 * t / 2.5 if t < 2.5 else half_cosine(0.8, 0.05, (t - 2.5) / 4, 1.3),
    ),
    "warm-up, exponential": (
        warmup_exponential_decay_schedule,
        {"init_value": 0.1, "peak_value": 0.8, "warmup_steps": 2.5, "transition_steps": 3.0, "decay_rate": 0.4},
        lambda t: 0.1 + 0.7 * t / 2.5 if t < 2.5 else 0.8 * 0.4 ** ((t - 2.5) / 3),
    ),
    "warm-up, exponential, bounded": (
        lambda transition_begin, end_value: warmup_exponential_decay_schedule(
            0.1, 0.8, 2.5, 3.0, 0.4, transition_begin=transition_begin, end_value=end_value
        ),
        {"transition_begin": 1.25, "end_value": 0.3},
        lambda t: 0.1 + 0.7 * t / 2.5 if t < 2.5 else max(0.8 * 0.4 ** (max(t - 3.75, 0) / 3), 0.3),
    ),
    "sgdr": (
        lambda peak_value, warmup_steps, decay_steps: sgdr_schedule(
            [WARM | {"peak_value": peak_value, "warmup_steps": warmup_steps, "decay_steps": decay_steps}, WARM]
        ),
        {"peak_value": 0.6, "warmup_steps": 1.5, "decay_steps": 4.25},
        lambda t: (
            lines([(0, 0.1), (1.5, 0.6)], t)
            if t < 1.5
            else half_cosine(0.6, 0.05, (t - 1.5) / 2.75)
            if t < 4.25
            else 0.1 + 0.7 * (t - 4.25) / 2.5
            if t < 6.75
            else half_cosine(0.8, 0.05, (t - 6.75) / 4)
        ),
    ),
    "join": (
        lambda a, b: join_schedules([constant_schedule(a), lambda t: b * t.double()], [3]),
        {"a": 0.4, "b": 0.2},
        lambda t: 0.4 if t < 3 else 0.2 * (t - 3),
    ),
    "join, boundary": (
        lambda a, b, boundary: join_schedules([constant_schedule(a), lambda t: b * t], [boundary]),
        {"a": 0.4, "b": 0.2, "boundary": 2.1},
        lambda t: 0.4 if t < 2.1 else 0.2 * (t - 2.1),
    ),
}
COUNTS = torch.arange(10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_values_are_those_of_the_formula(name):
    make, values, formula = SCHEDULES[name]
    want = torch.tensor([formula(t) for t in range(10)], dtype=torch.float64)
    schedule = make(**values)
    torch.testing.assert_close(torch.stack([schedule(t) for t in COUNTS]), want, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(vmap(schedule)(COUNTS), want, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(schedule(COUNTS), want, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivative_in_every_parameter_against_finite_differences(name):
    make, values, _ = SCHEDULES[name]
    weights = torch.cos(torch.arange(10, dtype=torch.float64))

    def weighted(values):
        return (weights * make(**values)(COUNTS)).sum()

    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
    check_hypergradient(weighted, (tensors,), tol=1e-8)
    assert all(slope.abs() > 1e-6 for slope in grad(weighted)(tensors).values())


@pytest.mark.parametrize("name", SCHEDULES)
def test_vmap_over_the_parameters_is_the_loop(name):
    make, values, _ = SCHEDULES[name]
    lanes = {k: v * torch.tensor([1.0, 1.05, 0.98], dtype=torch.float64) for k, v in values.items()}
    got = vmap(lambda values: make(**values)(COUNTS))(lanes)
    want = torch.stack([make(**{k: v[i] for k, v in lanes.items()})(COUNTS) for i in range(3)])
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", SCHEDULES)
def test_hypergradient_through_steps_that_follow_the_schedule(name):
    make, values, _ = SCHEDULES[name]
    tensors = {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}

    def after(values):
        optimizer, x = sgd(make(**values)), torch.tensor([1.0, -0.5], dtype=torch.float64)
        state = optimizer.init(x)
        for _ in range(3):
            x, state = step(optimizer, torch.sin(x), state, x)
        return (x**2).sum()

    check_hypergradient(after, (tensors,))


@pytest.mark.parametrize(
    ("schedule", "scheduler"),
    [
        (cosine_decay_schedule(0.5, 8, 0.1), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8, 0.05)),
        (exponential_decay(0.5, 1, 0.7), lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7)),
        (linear_schedule(0.1, 0.5, 4), lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.2, 1.0, 4)),
        (polynomial_schedule(0.5, 0, 2, 8), lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 8, 2)),
        (piecewise_constant_schedule(0.5, {3: 0.1}), lambda o: torch.optim.lr_scheduler.StepLR(o, 3)),
    ],
)
def test_values_of_torchs_schedulers(schedule, scheduler):
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.5)
    torchs = scheduler(optimizer)
    for t in range(6):
        assert schedule(torch.tensor(t)).item() == pytest.approx(torchs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        torchs.step()


def test_derivatives_are_finite_where_a_decay_ends():
    def at_end(power, steps):
        return polynomial_schedule(1.0, 0.0, power, steps)(torch.tensor(5)) + cosine_decay_schedule(
            1.0, steps, exponent=power
        )(torch.tensor(5))

    for slope in grad(at_end, argnums=(0, 1))(torch.tensor(0.5), torch.tensor(5.0)):
        assert slope == 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: polynomial_schedule(1.0, 0.0, 0.0, 3), r"`power` must be above 0\.0; got 0\.0"),
        (lambda: linear_schedule(1.0, 0.0, 0), "`transition_steps` must be above"),
        (lambda: exponential_decay(1.0, 1, -0.5), "`decay_rate` must be above"),
        (lambda: cosine_decay_schedule(1.0, -1), "`decay_steps` must be above"),
        (lambda: warmup_cosine_decay_schedule(0.0, 1.0, 5, 5), "`decay_steps - warmup_steps`"),
        (lambda: linear_onecycle_schedule(10, 1.0, 0.9, 0.5), "`pct_final - pct_start`"),
        (lambda: cosine_onecycle_schedule(10, 1.0, 1.0), "`pct_start` must be above 0.0 and below 1.0"),
        (lambda: join_schedules([constant_schedule(1.0)], [3]), "1 schedules and 1 boundaries"),
        (lambda: join_schedules([constant_schedule(1.0)] * 3, [3, 2]), "must rise"),
        (lambda: sgdr_schedule([]), "at least one schedule"),
        (lambda: piecewise_constant_schedule(1.0, {-1: 0.5}), "`boundary` must be at least"),
    ],
)
def test_bad_parameters_raise(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_join_needs_callables():
    with pytest.raises(TypeError, match="Use constant_schedule"):
        join_schedules([0.1], [])


def test_every_schedule_is_tested():
    tested = {make for make, _, _ in SCHEDULES.values()} | {piecewise_constant_schedule, sgdr_schedule, join_schedules}
    assert {getattr(schedules, name) for name in schedules.__all__} <= tested
