"""diffopt.random.dispatch: every path gives the numbers of the reference."""

import pytest
import torch

from diffopt import random
from diffopt.random import dispatch

KEY = random.key(7)
SAMPLERS = {
    "bits": dispatch.BITS,
    "uniform": dispatch.UNIFORM,
    "normal": dispatch.NORMAL,
    "gumbel": dispatch.GUMBEL,
    "rademacher": dispatch.RADEMACHER,
}

# log, sin and cos by vector or scalar code: measured 3 relative ulps at most.
ULPS = 8


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("size", [1, 16, 17, 16384, 16388, 65536, 200_003])
@pytest.mark.parametrize("start", [0, 3])
def test_eager_paths_equal_the_reference(name, size, start):
    sampler, dtype = SAMPLERS[name], torch.int64 if name == "bits" else torch.float32
    values = dispatch.draw(sampler, KEY, size, start, dtype)
    expected = sampler.reference(KEY, size, start, dtype)
    assert values.shape == (size,)
    if name in ("normal", "gumbel"):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(values, expected, rtol=ULPS * eps, atol=ULPS * eps)
    else:
        assert torch.equal(values, expected)


def test_words_out_of_range_are_reduced_on_every_path():
    key = torch.tensor([-1, 2**32 + 5])
    reduced = torch.tensor([2**32 - 1, 5])
    for size in (3, 100, 20000):
        expected = random.bits(reduced, (size,))
        assert torch.equal(random.bits(key, (size,)), expected)
        assert torch.equal(torch.func.vmap(lambda k: random.bits(k, (size,)))(key[None])[0], expected)  # noqa: B023


def test_runs_eagerly_knows_transforms():
    seen = []

    def look(x):
        seen.append(dispatch.runs_eagerly(KEY))
        return x

    look(torch.ones(1))
    torch.func.vmap(look)(torch.ones(1))
    torch.func.grad(lambda x: look(x).sum())(torch.ones(1))
    assert seen == [True, False, False]
