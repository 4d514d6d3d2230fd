"""Steps under every transform, against their formula by matrices, and compiled."""

import pytest
import torch

import diffopt
from diffopt.testing import check_composition
from multilevel.single_loop.methods import METHODS, Matrices, assert_close, drawn, moved, small
from multilevel.single_loop.quadratic_benchmark import F64

I, J = torch.tensor([1, 2, 3]), torch.tensor([4, 5])
SAMPLE = ["forward", "grad", "jvp", "vmap(grad)", "grad(vmap)"]


def two_steps(z, x, v):
    made, method = small(), METHODS["SOBA"]
    state = method.init(made.problem, z, x)._replace(v=v)
    for _ in range(2):
        state = method.step(made.problem, state, I, J)
    return state.x


def by_matrices(z, x, v):
    m = Matrices(small(), I, J)
    for _ in range(2):
        slope, linear, outer = m.inner_z(z, x), m.hessian @ v + m.outer_z(z, x), m.cross @ v + m.outer_x(z, x)
        z, v, x = z - 0.3 * slope, v - 0.25 * linear, x - 0.2 * outer
    return x


@pytest.mark.parametrize("cells", [SAMPLE, pytest.param(None, marks=pytest.mark.slow)], ids=["sample", "whole"])
def test_steps_compose_with_transforms(cells):
    args = small().z, small().x, torch.tensor([0.3, -1.2, 0.7], dtype=F64)
    check_composition(two_steps, args, by_matrices, backend=None, cells=cells)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_step_is_the_step(name):
    made, method = small(), METHODS[name]
    state, batches = moved(method, made), drawn(method, made)
    compiled = diffopt.compile(lambda state, i, j: method.step(made.problem, state, i, j), backend="aot_eager")
    assert_close(compiled(state, *batches), method.step(made.problem, state, *batches))
