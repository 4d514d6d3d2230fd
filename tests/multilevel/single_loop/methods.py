"""All methods with small step sizes, a small instance of the benchmark, and its derivatives by explicit matrices."""

import functools

import torch
from torch import Tensor

from diffopt import random
from diffopt.multilevel.single_loop import F2SA, MRBO, SABA, SOBA, SUSTAIN, AmIGO, StocBiO, draw
from multilevel.single_loop.quadratic_benchmark import Benchmark, benchmark, means

KEY = random.key(5)
METHODS = {
    "SOBA": SOBA(0.3, 0.2, linear_step_size=0.25),
    "SABA": SABA(0.3, 0.2, linear_step_size=0.25),
    "F2SA": F2SA(0.3, 0.2, penalty=3.0, penalty_increase=0.5, inner_steps=2),
    "AmIGO": AmIGO(0.3, 0.2, linear_step_size=0.25, inner_steps=2, linear_steps=3),
    "StocBiO": StocBiO(0.3, 0.2, linear_step_size=0.25, inner_steps=2, series_steps=3),
    "MRBO": MRBO(0.3, 0.2, linear_step_size=0.25, inner_weight=0.4, outer_weight=0.7, series_steps=3),
    "SUSTAIN": SUSTAIN(0.3, 0.2, key=KEY, linear_step_size=0.25, inner_weight=0.4, outer_weight=0.7, series_steps=4),
}


@functools.cache
def small() -> Benchmark:
    """An instance of 24 samples, 3 inner unknowns and 2 outer ones."""
    return benchmark(24, 3, 2, seed=1)


class Matrices:
    """The derivatives of a small instance over batches, from the means of its matrices there."""

    def __init__(self, made: Benchmark, inner_batch: Tensor, outer_batch: Tensor):
        self.G = means({name: leaf[inner_batch] for name, leaf in made.problem.inner_data.items()})
        self.F = means({name: leaf[outer_batch] for name, leaf in made.problem.outer_data.items()})

    def inner_z(self, z: Tensor, x: Tensor) -> Tensor:
        return self.G["zz"] @ z + self.G["xz"].mT @ x + self.G["z"]

    def inner_x(self, z: Tensor, x: Tensor) -> Tensor:
        return self.G["xx"] @ x + self.G["xz"] @ z + self.G["x"]

    def outer_z(self, z: Tensor, x: Tensor) -> Tensor:
        return self.F["zz"] @ z + self.F["xz"].mT @ x + self.F["z"]

    def outer_x(self, z: Tensor, x: Tensor) -> Tensor:
        return self.F["xx"] @ x + self.F["xz"] @ z + self.F["x"]

    @property
    def hessian(self) -> Tensor:
        return self.G["zz"]

    @property
    def cross(self) -> Tensor:
        return self.G["xz"]


def drawn(method, made: Benchmark, step: int = 0, batch_size: int = 4):
    """The batches of one step."""
    return draw(method, made.problem, random.fold_in(random.key(9), step), batch_size)


def moved(method, made: Benchmark, steps: int = 2):
    """A state some steps from the start, so that no field is zero."""
    state = method.init(made.problem, made.z, made.x)
    for step in range(steps):
        state = method.step(made.problem, state, *drawn(method, made, step))
    return state


def assert_close(value, expected, tol: float = 1e-12):
    torch.testing.assert_close(value, expected, rtol=tol, atol=tol)
