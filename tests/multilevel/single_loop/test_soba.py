import pytest
import torch

from diffopt.multilevel.single_loop import SOBA
from multilevel.single_loop.methods import METHODS, Matrices, assert_close, drawn, moved, small


@pytest.mark.parametrize("full", [True, False], ids=["all samples", "batches"])
def test_the_step_is_its_formula_by_matrices(full):
    method, made = METHODS["SOBA"], small()
    state = moved(method, made)
    i, j = (torch.arange(24), torch.arange(24)) if full else drawn(method, made)
    by_matrix = Matrices(made, i.reshape(-1), j.reshape(-1))
    z, x, v = state.z, state.x, state.v
    after = method.step(made.problem, state, i, j)
    assert_close((z - after.z) / 0.3, by_matrix.inner_z(z, x))
    assert_close((v - after.v) / 0.25, by_matrix.hessian @ v + by_matrix.outer_z(z, x))
    assert_close((x - after.x) / 0.2, by_matrix.cross @ v + by_matrix.outer_x(z, x))
    assert after.count == state.count + 1


def test_the_linear_step_size_is_the_inner_one_by_default():
    made = small()
    state = moved(SOBA(0.3, 0.2), made)
    assert_close(state, moved(SOBA(0.3, 0.2, linear_step_size=0.3), made), tol=0.0)


def test_at_the_solution_nothing_moves():
    made = small()
    x = made.x - torch.linalg.solve(torch.func.jacrev(made.gradient)(made.x), made.gradient(made.x))
    z, everyone = made.solution(x), torch.arange(24)
    v = -torch.linalg.solve(made.inner["zz"], Matrices(made, everyone, everyone).outer_z(z, x))
    method = SOBA(0.3, 0.2)
    state = method.init(made.problem, z, x)._replace(v=v)
    after = method.step(made.problem, state, everyone, everyone)
    assert_close((after.z, after.x, after.v), (z, x, v))
