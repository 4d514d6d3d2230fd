"""Figures on the generated quadratic: |grad h|^2 in closed form, 11.2 at the start, 64 of 1024 samples a batch."""

import pytest
import torch

from diffopt import random
from diffopt.multilevel.single_loop import F2SA, MRBO, SABA, SOBA, SUSTAIN, AmIGO, StocBiO, run
from multilevel.single_loop.quadratic_benchmark import BATCH, benchmark


def falling(start: float, power: float, delay: float = 30.0):
    """The schedule start (1 + t / delay)^-power."""
    return lambda count: start * (1 + count.double() / delay) ** -power


BOTH = falling(0.5, 0.5), falling(1.0, 1.0)
ROOTS = falling(0.5, 1 / 3, 10), falling(0.5, 2 / 3, 10)
WEIGHTS = {"inner_weight": falling(0.5, 2 / 3, 10), "outer_weight": falling(0.5, 2 / 3, 10)}
METHODS = {
    "SOBA": SOBA(falling(0.5, 0.4, 1), falling(0.5, 0.6, 1)),
    "SABA": SABA(0.3, 0.3),
    "AmIGO": AmIGO(falling(0.5, 0.7), falling(0.7, 1.0), inner_steps=3, linear_steps=3),
    "F2SA": F2SA(*BOTH, penalty=10.0, inner_steps=3),
    "StocBiO": StocBiO(*BOTH, linear_step_size=0.7, inner_steps=3, series_steps=10),
    "MRBO": MRBO(*ROOTS, linear_step_size=0.7, **WEIGHTS, series_steps=10),
    "SUSTAIN": SUSTAIN(*ROOTS, key=random.key(3), linear_step_size=0.7, **WEIGHTS, series_steps=10),
}


def error(name: str, steps: int, seed: int = 1) -> float:
    made, method = benchmark(), METHODS[name]
    start = method.init(made.problem, made.z, made.x)
    state = run(method, made.problem, start, random.key(seed), steps, batch_size=BATCH)
    assert all(leaf.isfinite().all() for leaf in (state.z, state.x))
    return made.error(state.x)


@pytest.mark.parametrize(
    ("name", "steps", "bar"),
    [
        ("SOBA", 256, 0.1),
        ("SABA", 384, 1e-8),
        ("AmIGO", 64, 0.3),
        ("F2SA", 64, 0.3),
        ("StocBiO", 64, 0.3),
        ("MRBO", 64, 0.3),
        ("SUSTAIN", 64, 0.6),
    ],
)
def test_the_gradient_of_the_value_falls(name, steps, bar):
    assert error(name, steps) < bar


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "bar"),
    [
        ("SOBA", 2048, 3e-2),
        ("SABA", 8192, 1e-8),
        ("AmIGO", 2048, 1e-3),
        ("F2SA", 1024, 1e-2),
        ("StocBiO", 1024, 1e-2),
        ("MRBO", 1024, 1e-2),
        ("SUSTAIN", 1024, 1e-2),
    ],
)
def test_the_gradient_of_the_value_reaches_its_figure(name, steps, bar):
    assert error(name, steps) < bar


@pytest.mark.slow
def test_saba_stays_at_the_solution_where_soba_with_its_steps_does_not():
    made, found = benchmark(), {}
    for name, method in (("SABA", SABA(0.3, 0.3)), ("SOBA", SOBA(0.3, 0.3))):
        start = method.init(made.problem, made.z, made.x)
        found[name] = made.error(run(method, made.problem, start, random.key(1), 1024, batch_size=BATCH).x)
    assert found["SABA"] < 1e-12 < 1e-4 < found["SOBA"]


def test_the_start_is_the_same_each_time():
    assert torch.equal(benchmark().x, benchmark().x)
