import pytest
import torch

from diffopt.multilevel.single_loop import MRBO, StocBiO
from multilevel.single_loop.methods import METHODS, Matrices, assert_close, drawn, small

METHOD = METHODS["MRBO"]


def hypergradient(made, z, x, inner, outer):
    """The estimate with three products, each on a batch of its own."""
    batches = [Matrices(made, i, outer[0]) for i in inner]
    r = series = batches[0].outer_z(z, x)
    for batch in batches[1:4]:
        r = r - 0.25 * batch.hessian @ r
        series = series + r
    return batches[4].outer_x(z, x) - 0.25 * batches[4].cross @ series


def test_steps_are_their_formula_by_matrices():
    made = small()
    state = METHOD.init(made.problem, made.z, made.x)
    z, x = last = made.z, made.x
    u = w = None
    for step in range(3):
        inner, outer = drawn(METHOD, made, step)
        assert inner.shape[0] == 1 + 3 + 1
        state = METHOD.step(made.problem, state, inner, outer)
        first = Matrices(made, inner[0], outer[0])
        slope, gradient = first.inner_z(z, x), hypergradient(made, z, x, inner, outer)
        if u is None:
            u, w = slope, gradient
        else:
            u = slope + 0.6 * (u - first.inner_z(*last))
            w = gradient + 0.3 * (w - hypergradient(made, *last, inner, outer))
        last, z, x = (z, x), z - 0.3 * u, x - 0.2 * w
        assert_close((state.z, state.x, state.inner_mean, state.outer_mean), (z, x, u, w))
        assert_close((state.last_z, state.last_x), last)


def test_without_memory_each_direction_is_that_of_its_batch():
    made = small()
    forgetful = MRBO(0.3, 0.2, linear_step_size=0.25, inner_weight=1.0, outer_weight=1.0, series_steps=3)
    state = forgetful.init(made.problem, made.z, made.x)
    for step in range(2):
        z, x = state.z, state.x
        inner, outer = drawn(forgetful, made, step)
        state = forgetful.step(made.problem, state, inner, outer)
    assert_close((x - state.x) / 0.2, hypergradient(made, z, x, inner, outer))


def test_with_all_samples_means_are_gradients():
    made, everyone = small(), torch.arange(24)
    state = METHOD.init(made.problem, made.z, made.x)
    for _ in range(3):
        z, x = state.z, state.x
        state = METHOD.step(made.problem, state, everyone, everyone)
    assert_close(state.inner_mean, Matrices(made, everyone, everyone).inner_z(z, x))
    tiny = StocBiO(1e-30, 0.2, linear_step_size=0.25, inner_steps=1, series_steps=3)  # leaves z where it is
    after = tiny.step(made.problem, tiny.init(made.problem, z, x), everyone, everyone)
    assert_close(state.outer_mean, (x - after.x) / 0.2)


def test_bad_options_raise():
    for weight in (0.0, 1.5):
        with pytest.raises(ValueError, match="`inner_weight` must be above 0"):
            MRBO(0.3, 0.2, linear_step_size=0.1, inner_weight=weight)
        with pytest.raises(ValueError, match="`outer_weight` must be above 0"):
            MRBO(0.3, 0.2, linear_step_size=0.1, outer_weight=weight)
