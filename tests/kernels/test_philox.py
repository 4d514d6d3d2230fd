"""diffopt_kernels.philox: known answers, and each launcher against its reference by Triton's interpreter."""

import importlib.util

import pytest
import torch

from diffopt_kernels import philox
from scripts import run_script

FULL = philox.MASK

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_random123_known_answers(counter, key, answer):
    assert philox.philox4x32(*counter, *key) == answer
    tensors = philox.philox4x32(*(torch.tensor([word]) for word in (*counter, *key)))
    assert tuple(int(word) for word in tensors) == answer


def test_words_take_the_high_half_of_the_counter():
    key, first = torch.tensor([5, 6]), (7 << 32) + 9
    lanes = [int(lane[1]) for lane in philox.words(key, first, 2)]
    assert lanes == list(philox.philox4x32(10, 7, 0, 0, 5, 6))
    again = philox.words(key, torch.tensor(first), 2)
    assert [int(lane[1]) for lane in again] == lanes


def test_reference_lays_out_lanes_in_order():
    key = torch.tensor([1, 2])
    lanes = torch.stack(philox.words(key, 2, 3), dim=1).reshape(-1)
    assert torch.equal(philox.bits_reference(key, 9, 9, torch.int64), lanes[1:10])


SCRIPT = """
import torch, triton, triton.language as tl
from diffopt_kernels import philox

@triton.jit
def randint4x(out, seed, first, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    for_lane = tl.randint4x(seed, first + place)
    for lane in tl.static_range(4):
        tl.store(out + 4 * place + lane, for_lane[lane].to(tl.int64) & 0xFFFFFFFF)

for seed in (0, 42, 0x89ABCDEFDEADBEEF - 2**64):
    out = torch.empty(64, dtype=torch.int64)
    randint4x[(1,)](out, seed, 100, 16)
    key = torch.tensor([seed & philox.MASK, (seed >> 32) & philox.MASK])
    assert torch.equal(out, philox.bits_reference(key, 64, 400, torch.int64)), seed

floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
cases = {"bits": [torch.int64, torch.int32], **dict.fromkeys(["uniform", "normal", "gumbel", "rademacher"], floats)}
key = torch.tensor([0xDEADBEEF, 0x89ABCDEF])
for name, dtypes in cases.items():
    for dtype in dtypes:
        for size, start in ((1000, 0), (1003, 5), (1, 3), (0, 2), (7, (1 << 34) + 2), (600_001, 1)):
            values = getattr(philox, name)(key, size, start, dtype)
            expected = getattr(philox, name + "_reference")(key, size, start, dtype)
            assert values.shape == expected.shape and values.dtype == expected.dtype
            if name in ("normal", "gumbel"):
                # Triton has no log1p, and its log, sin and cos are others: a few ulps of numbers below 32.
                atol = 64 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
                rtol = 2 * torch.finfo(dtype).eps
                torch.testing.assert_close(values, expected, rtol=rtol, atol=atol)
            else:
                assert torch.equal(values, expected), (name, dtype, size, start)
print("agreed")
"""


@needs_triton
def test_launchers_agree_with_references_and_triton(tmp_path):
    assert run_script(SCRIPT, tmp_path).endswith("agreed")


def test_importing_the_launchers_does_not_import_triton(tmp_path):
    run_script("import sys, diffopt_kernels.philox; assert 'triton' not in sys.modules", tmp_path)
