import pytest
import torch

from diffopt.multilevel.single_loop import StocBiO
from multilevel.single_loop.methods import METHODS, Matrices, assert_close, drawn, moved, small

METHOD = METHODS["StocBiO"]


def test_the_step_is_its_formula_by_matrices():
    made = small()
    state = moved(METHOD, made)
    inner, outer = drawn(METHOD, made)
    assert inner.shape[0] == 2 + 3 + 1
    batches = [Matrices(made, i, outer[0]) for i in inner]
    z, x = state.z, state.x
    for batch in batches[:2]:
        z = z - 0.3 * batch.inner_z(z, x)
    product = torch.eye(3, dtype=z.dtype)
    series = product
    for batch in batches[2:5]:
        product = (torch.eye(3, dtype=z.dtype) - 0.25 * batch.hessian) @ product
        series = series + product
    v = -0.25 * series @ batches[0].outer_z(z, x)
    x = x - 0.2 * (batches[5].cross @ v + batches[5].outer_x(z, x))
    after = METHOD.step(made.problem, state, inner, outer)
    assert_close((after.z, after.x), (z, x))


def test_with_all_samples_and_many_steps_the_direction_is_the_hypergradient():
    made, everyone = small(), torch.arange(24)
    method = StocBiO(1.0, 0.2, linear_step_size=1.0, inner_steps=200, series_steps=200)
    after = method.step(made.problem, method.init(made.problem, made.z, made.x), everyone, everyone)
    assert_close((made.x - after.x) / 0.2, made.gradient(made.x), tol=1e-5)  # 0.94^200, of the least eigenvalue 0.06


def test_bad_options_raise():
    with pytest.raises(ValueError, match="`series_steps` must be at least 1; got 0"):
        StocBiO(0.3, 0.2, linear_step_size=0.1, series_steps=0)
    with pytest.raises(ValueError, match=r"`linear_step_size` must be above 0\.0"):
        StocBiO(0.3, 0.2, linear_step_size=0.0)
