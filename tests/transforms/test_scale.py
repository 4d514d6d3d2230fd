"""diffopt.transforms.scale: constants, learning rates and schedules."""

import pytest
import torch
from torch.func import grad, vmap

from diffopt.transforms import EmptyState, ScaleByScheduleState, scale, scale_by_learning_rate


def test_signs_and_values():
    x = torch.randn(3)
    assert torch.equal(scale(2.0).update(x, EmptyState())[0], 2 * x)
    assert torch.equal(scale_by_learning_rate(2.0).update(x, EmptyState())[0], -2 * x)
    assert torch.equal(scale_by_learning_rate(-2.0).update(x, EmptyState())[0], 2 * x)
    assert torch.equal(scale_by_learning_rate(2).update(x, EmptyState())[0], -2 * x)


def test_schedule_counts_from_zero():
    transformation = scale_by_learning_rate(lambda count: 1.0 / (count + 1))
    x = torch.ones(2, dtype=torch.float64)
    state = transformation.init(x)
    assert isinstance(state, ScaleByScheduleState)
    assert state.count.dtype == torch.int64
    for i in range(4):
        updates, state = transformation.update(x, state)
        torch.testing.assert_close(updates, -x / (i + 1), check_dtype=True)
        assert state.count == i + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(), (2,), (0,)])
def test_a_float64_rate_promotes_nothing(dtype, shape):
    x, rate = torch.ones(shape, dtype=dtype), torch.tensor(0.1, dtype=torch.float64)
    for transformation in (scale(rate), scale_by_learning_rate(rate), scale_by_learning_rate(lambda _: rate)):
        updates, _ = transformation.update(x, transformation.init(x))
        assert updates.dtype == dtype
        assert vmap(lambda r: scale(r).update(x, EmptyState())[0])(rate.expand(2)).dtype == dtype


def test_bfloat16_is_scaled_by_the_exact_rate():
    # 0.3 rounds to 0.30078 in bfloat16: 100 * 0.3 would be 30.078, which rounds to 30.125.
    x = torch.full((4,), 100.0, dtype=torch.bfloat16)
    assert torch.equal(scale(torch.tensor(0.3)).update(x, EmptyState())[0], torch.full_like(x, 30.0))


def test_gradient_and_vmap_over_the_rate_and_the_schedule():
    x = torch.randn(3, dtype=torch.float64)

    def total(rate):
        transformation = scale_by_learning_rate(lambda count: rate * (count + 2))
        return transformation.update(x, transformation.init(x))[0].sum()

    rate = torch.tensor(0.1, dtype=torch.float64)
    torch.testing.assert_close(grad(total)(rate), -2 * x.sum())
    torch.testing.assert_close(vmap(grad(total))(rate.expand(3)), -2 * x.sum().expand(3))


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (torch.ones(3), ValueError, r"got shape \(3,\).*vmap"),
        (torch.tensor(1), TypeError, "floating-point tensor; got torch.int64"),
        (None, TypeError, "got NoneType"),
        ("0.1", TypeError, "got str"),
        (True, TypeError, "got bool"),
    ],
)
def test_bad_rates_raise(value, error, match):
    with pytest.raises(error, match=match):
        scale(value)
    with pytest.raises(error, match=match):
        scale_by_learning_rate(value)
    transformation = scale_by_learning_rate(lambda count: value)
    with pytest.raises(error, match=match):
        transformation.update(torch.ones(1), transformation.init(torch.ones(1)))


def test_integer_updates_raise():
    with pytest.raises(TypeError, match="`updates` must be a floating-point tensor"):
        scale(0.5).update(torch.tensor(1), EmptyState())
