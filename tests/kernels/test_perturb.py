"""diffopt_kernels.perturb: references against draws, and each launcher against its reference by the interpreter."""

import importlib.util

import pytest
import torch

from diffopt_kernels import perturb, philox
from scripts import run_script

KEY = torch.tensor([0xDEADBEEF, 0x89ABCDEF])

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_noise_is_a_part_of_the_draw(size, distribution):
    members = torch.tensor([3, 0, (1 << 33) + 1])
    noises = perturb.noise_reference(KEY.expand(3, 2), members, size, torch.float64, distribution)
    stride = 4 * -(-size // 4)
    for row, member in zip(noises, members.tolist(), strict=True):
        draw = getattr(philox, distribution + "_reference")
        torch.testing.assert_close(row, draw(KEY, size, member * stride, torch.float64), rtol=1e-14, atol=1e-15)


def test_a_negative_member_gives_nan():
    noises = perturb.noise_reference(KEY.expand(2, 2), torch.tensor([-1, 1]), 3, torch.float32, "rademacher")
    assert noises.isnan().all(1).tolist() == [True, False]


SCRIPT = """
import torch
from diffopt_kernels import perturb

torch.manual_seed(0)
keys = torch.tensor([[0xDEADBEEF, 0x89ABCDEF], [5, 6], [7, 8]])
members = torch.tensor([2, (1 << 33) + 1, 0])


def close(ours, theirs, terms=1):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    # Triton's log, sin and cos are others: a few ulps of numbers below 32, in each term of a sum.
    atol = 64 * terms**0.5 * torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(ours.dtype).eps, atol=atol, equal_nan=True)


for dtype, sizes, distributions in CASES:
    for size in sizes:
        for distribution in distributions:
            x, sigma = torch.randn(3, size).to(dtype), torch.rand(3, size, dtype=torch.float64).to(dtype)
            args = keys, x, sigma, members, distribution
            close(perturb.perturb(*args), perturb.perturb_reference(*args))
            args = keys[:1].expand(3, 2), x[:1].expand(3, size), sigma[:, :1].expand(3, size), members, distribution
            close(perturb.perturb(*args), perturb.perturb_reference(*args))
            weights = torch.randn(3, 7).to(dtype)
            args = keys, weights, members, size, dtype, distribution
            close(perturb.accumulate(*args), perturb.accumulate_reference(*args), terms=7)
            args = keys, members, size, dtype, distribution
            close(perturb.noise(*args), perturb.noise_reference(*args))
            if distribution == "rademacher":
                assert torch.equal(perturb.noise(*args), perturb.noise_reference(*args))
            args = keys, x, members, 5, dtype, distribution
            close(perturb.project(*args), perturb.project_reference(*args), terms=size)

x = torch.randn(2, 9)
args = keys[:2].T.contiguous().T, x, torch.ones(1, 1).expand(2, 9), torch.tensor([-1, 1]), "normal"
expected = perturb.perturb_reference(*args)
assert perturb.perturb(*args, out=x) is x and expected[0].isnan().all()
close(x, expected)
assert torch.equal(perturb.accumulate(keys, torch.ones(3, 0), members, 4, torch.float32, "normal"), torch.zeros(3, 4))
print("agreed")
"""


# Interpreted programs take a second each: every dtype and distribution once, and all of them in the slow run.
SOME = """(
    (torch.bfloat16, (7,), ("rademacher",)), (torch.float32, (0, 102), ("normal",)), (torch.float64, (5,), ("normal",))
)"""
ALL = """[
    (dtype, (0, 1, 1003) if dtype == torch.float32 else (102,), ("normal", "rademacher"))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
]"""


@needs_triton
@pytest.mark.parametrize("cases", [SOME, pytest.param(ALL, marks=pytest.mark.slow)], ids=["some", "all"])
def test_launchers_agree_with_references(cases, tmp_path):
    assert run_script(SCRIPT.replace("CASES", cases), tmp_path).endswith("agreed")


def test_importing_the_launchers_does_not_import_triton(tmp_path):
    run_script("import sys, diffopt_kernels.perturb; assert 'triton' not in sys.modules", tmp_path)
