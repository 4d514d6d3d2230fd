"""diffopt.transforms.trace: momentum as a decaying sum."""

import pytest
import torch
from torch.func import grad

from diffopt.transforms import TraceState, trace

GRADS = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(decay, nesterov=False, grads=GRADS):
    transformation = trace(decay, nesterov)
    state = transformation.init(grads[0])
    for g in grads:
        updates, state = transformation.update(g, state)
    return updates, state


def weights(decay):
    return torch.tensor([decay**k for k in reversed(range(len(GRADS)))], dtype=torch.float64)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0, -0.5])
def test_against_the_closed_form(decay):
    plain, state = run(decay)
    torch.testing.assert_close(plain, weights(decay) @ GRADS)
    assert torch.equal(state.trace, plain)
    torch.testing.assert_close(run(decay, nesterov=True)[0], GRADS[-1] + decay * plain)


def test_gradient_in_decay_against_the_closed_form():
    decay = torch.tensor(0.7, dtype=torch.float64)
    slopes = torch.tensor([k * 0.7 ** (k - 1) for k in reversed(range(5))], dtype=torch.float64)
    torch.testing.assert_close(grad(lambda d: run(d)[0].sum())(decay), (slopes @ GRADS).sum())


def test_sixteen_bits_accumulate_in_float32():
    ones = torch.ones(2000, 1, dtype=torch.bfloat16)
    updates, state = run(1.0, grads=ones)
    assert state.trace.dtype == torch.float32
    assert state.trace == 2000  # a bfloat16 sum stops at 256
    assert updates.dtype == torch.bfloat16


def test_a_state_of_other_parameters_raises():
    transformation = trace(0.9)
    with pytest.raises(ValueError, match=r"`state.trace\[1\]` must have shape \(2,\), as `updates\[1\]` has"):
        transformation.update([torch.ones(2)] * 2, TraceState([torch.ones(2), torch.ones(3)]))
    with pytest.raises(ValueError, match=r"`state\.trace` must have the structure of `updates`"):
        transformation.update({"w": torch.ones(2)}, TraceState(torch.ones(2)))
