import pytest
import torch

from diffopt import random
from diffopt.multilevel.single_loop import draw, run
from multilevel.single_loop.methods import METHODS, assert_close, small

METHOD = METHODS["AmIGO"]


def test_run_is_the_loop_over_keys_folded_with_the_count():
    made, key = small(), random.key(3)
    state = start = METHOD.init(made.problem, made.z, made.x)
    for step in range(4):
        state = METHOD.step(made.problem, state, *draw(METHOD, made.problem, random.fold_in(key, step), 5))
    found = run(METHOD, made.problem, start, key, 4, batch_size=5)
    assert_close(found, state, tol=0.0)


def test_without_a_batch_size_steps_see_all_samples():
    made, everyone = small(), torch.arange(24)
    start = METHOD.init(made.problem, made.z, made.x)
    first, second = (run(METHOD, made.problem, start, random.key(seed), 1) for seed in (1, 2))
    assert_close(first, METHOD.step(made.problem, start, everyone, everyone), tol=0.0)
    assert_close(second, first, tol=0.0)


def test_samples_are_uniform_and_batches_differ():
    inner, _ = draw(METHOD, small().problem, random.key(1), 4000)
    frequencies = inner.reshape(-1).bincount(minlength=24) / inner.numel()
    four_errors = 4 * (1 / 24 / inner.numel()) ** 0.5
    assert_close(frequencies, torch.full((24,), 1 / 24), tol=four_errors)
    assert not torch.equal(inner[0], inner[1])


def test_bad_arguments_raise():
    made = small()
    start = METHOD.init(made.problem, made.z, made.x)
    with pytest.raises(ValueError, match="`steps` must be at least 1; got 0"):
        run(METHOD, made.problem, start, random.key(0), 0)
    with pytest.raises(TypeError, match="`batch_size` must be an int"):
        run(METHOD, made.problem, start, random.key(0), 1, batch_size=2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="`batch_size` must be at least 1"):
        draw(METHOD, made.problem, random.key(0), 0)
    with pytest.raises(TypeError, match="`state` must be one that"):
        run(METHOD, made.problem, (made.z, made.x), random.key(0), 1)
    with pytest.raises(TypeError, match="`key` must be an int64 tensor"):
        run(METHOD, made.problem, start, 0, 1, batch_size=2)  # pyright: ignore[reportArgumentType]
