import pytest

from diffopt.multilevel.single_loop import AmIGO
from multilevel.single_loop.methods import METHODS, Matrices, assert_close, drawn, moved, small

METHOD = METHODS["AmIGO"]


def test_the_step_is_its_formula_by_matrices():
    made = small()
    state = moved(METHOD, made)
    inner, outer = drawn(METHOD, made)
    assert inner.shape[0] == 2 + 3 + 1
    batches = [Matrices(made, i, outer[0]) for i in inner]
    z, x, v = state.z, state.x, state.v
    for batch in batches[:2]:
        z = z - 0.3 * batch.inner_z(z, x)
    for batch in batches[2:5]:
        v = v - 0.25 * (batch.hessian @ v + batch.outer_z(z, x))
    x = x - 0.2 * (batches[5].cross @ v + batches[5].outer_x(z, x))
    after = METHOD.step(made.problem, state, inner, outer)
    assert_close((after.z, after.v, after.x), (z, v, x))


def test_the_linear_step_size_is_the_inner_one_by_default():
    made = small()
    assert_close(moved(AmIGO(0.3, 0.2), made), moved(AmIGO(0.3, 0.2, linear_step_size=0.3), made), tol=0.0)


def test_bad_options_raise():
    with pytest.raises(ValueError, match="`inner_steps` must be at least 1; got 0"):
        AmIGO(0.3, 0.2, inner_steps=0)
    with pytest.raises(TypeError, match="`linear_steps` must be an int"):
        AmIGO(0.3, 0.2, linear_steps=2.0)  # pyright: ignore[reportArgumentType]
