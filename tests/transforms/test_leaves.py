"""diffopt.transforms.leaves: what the doors let through; the messages are tested with the transformations."""

import torch

from diffopt.transforms.leaves import as_dtype, precise_dtype, zero_count


def test_only_sixteen_bit_leaves_compute_in_a_wider_dtype():
    wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert precise_dtype(dtype) == wide.get(dtype, dtype)


def test_casting_a_hyperparameter_keeps_its_gradient():
    value = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    as_dtype(value, torch.float32).backward()
    assert value.grad == 1
    assert as_dtype(0.5, torch.float32) == 0.5


def test_the_count_lives_with_the_leaves():
    assert zero_count([torch.ones(1, device="meta")]).device.type == "meta"
    assert zero_count([]).dtype == torch.int64
