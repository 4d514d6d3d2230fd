import pytest
import torch

from diffopt.multilevel.single_loop import F2SA
from multilevel.single_loop.methods import METHODS, Matrices, assert_close, drawn, moved, small

METHOD = METHODS["F2SA"]


@pytest.mark.parametrize("alpha", [None, 0.07], ids=["default", "given"])
def test_the_step_is_its_formula_by_matrices(alpha):
    made = small()
    method = F2SA(0.3, 0.2, penalized_step_size=alpha, penalty=3.0, penalty_increase=0.5, inner_steps=2)
    state = moved(method, made)
    assert_close(state.penalty, torch.tensor(4.0, dtype=torch.float64))
    inner, outer = drawn(method, made)
    assert inner.shape[0] == outer.shape[0] == 3
    *steps, last = [Matrices(made, i, j) for i, j in zip(inner, outer, strict=True)]
    z, x, y = state.z, state.x, state.y
    for batch in steps:
        z = z - 0.3 * batch.inner_z(z, x)
        y = y - (0.3 / 4 if alpha is None else alpha) * (batch.outer_z(y, x) + 4 * batch.inner_z(y, x))
    x = x - 0.2 * (last.outer_x(y, x) + 4 * (last.inner_x(y, x) - last.inner_x(z, x)))
    after = method.step(made.problem, state, inner, outer)
    assert_close((after.z, after.y, after.x, after.penalty), (z, y, x, torch.tensor(4.5, dtype=torch.float64)))


def test_the_bias_falls_as_one_over_the_penalty():
    made, everyone = small(), torch.arange(24)
    errors = []
    for penalty in (100.0, 200.0):
        method = F2SA(1.0, 0.2, penalty=penalty, inner_steps=120)
        state = method.init(made.problem, made.solution(made.x), made.x)
        after = method.step(made.problem, state, everyone, everyone)
        errors.append(((made.x - after.x) / 0.2 - made.gradient(made.x)).norm())
    assert errors[0] < 0.05 * made.gradient(made.x).norm()
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_bad_options_raise():
    with pytest.raises(ValueError, match=r"`penalty` must be above 0\.0"):
        F2SA(0.3, 0.2, penalty=0.0)
    with pytest.raises(ValueError, match=r"`penalty_increase` must be at least 0\.0"):
        F2SA(0.3, 0.2, penalty_increase=-1.0)
