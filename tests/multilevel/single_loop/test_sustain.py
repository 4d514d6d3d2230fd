import dataclasses

import pytest
import torch

from diffopt import random
from diffopt.multilevel.single_loop import SUSTAIN
from diffopt.multilevel.single_loop.problem import products_of
from diffopt.multilevel.single_loop.series import random_term, summed_series
from multilevel.single_loop.methods import METHODS, Matrices, assert_close, drawn, small

METHOD = METHODS["SUSTAIN"]


def hypergradient(made, z, x, power, inner, outer):
    """The estimate with as many products as the power says, of four terms."""
    batches = [Matrices(made, i, outer[0]) for i in inner]
    r = batches[0].outer_z(z, x)
    for batch in batches[1 : 1 + power]:
        r = r - 0.25 * batch.hessian @ r
    return batches[4].outer_x(z, x) - 4 * 0.25 * batches[4].cross @ r


def test_steps_are_their_formula_by_matrices():
    made = small()
    state = METHOD.init(made.problem, made.z, made.x)
    z, x = last = made.z, made.x
    u = w = None
    for step in range(4):
        inner, outer = drawn(METHOD, made, step)
        assert inner.shape[0] == 1 + 3 + 1
        power = int(METHOD.power(state.count))
        state = METHOD.step(made.problem, state, inner, outer)
        first = Matrices(made, inner[0], outer[0])
        slope, gradient = first.inner_z(z, x), hypergradient(made, z, x, power, inner, outer)
        if u is None:
            u, w = slope, gradient
        else:
            u = slope + 0.6 * (u - first.inner_z(*last))
            w = gradient + 0.3 * (w - hypergradient(made, *last, power, inner, outer))
        last, z, x = (z, x), z - 0.3 * u, x - 0.2 * w
        assert_close((state.z, state.x, state.inner_mean, state.outer_mean), (z, x, u, w))


def test_the_mean_of_the_random_term_is_the_sum_of_the_series():
    made = small()
    products, z, x = products_of(made.problem, made.z, made.x)
    b, batches = torch.tensor([0.3, -1.2, 0.7], dtype=z.dtype), list(drawn(METHOD, made)[0][:3])
    terms = [random_term(products, z, x, b, 0.25, batches, torch.tensor(q)) for q in range(4)]
    assert_close(torch.stack(terms).mean(0), summed_series(products, z, x, b, 0.25, batches))


def test_powers_are_uniform():
    counts = torch.arange(4000)
    powers = torch.func.vmap(METHOD.power)(counts)
    frequencies = powers.bincount(minlength=4) / 4000
    assert_close(frequencies, torch.full((4,), 0.25), tol=4 * (0.25 * 0.75 / 4000) ** 0.5)  # four standard errors
    assert powers[7] == METHOD.power(torch.tensor(7))


def test_another_key_gives_other_powers():
    other = dataclasses.replace(METHOD, key=random.key(6))
    counts = torch.arange(20)
    assert not torch.equal(*(torch.func.vmap(method.power)(counts) for method in (METHOD, other)))


def test_bad_options_raise():
    with pytest.raises(TypeError, match="`key` must be an int64 tensor"):
        SUSTAIN(0.3, 0.2, key=3, linear_step_size=0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`outer_weight` must be above 0"):
        SUSTAIN(0.3, 0.2, key=random.key(0), linear_step_size=0.1, outer_weight=2.0)
