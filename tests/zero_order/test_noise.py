"""diffopt.zero_order.noise: counters, shards, transforms, derivatives, memory and bad inputs."""

import functools
import resource
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from diffopt import random
from diffopt.zero_order import accumulate, launch, native, noise, on_cpu, perturb
from diffopt_kernels import perturb as kernel

KEY = random.key(42)
F32, F64 = torch.float32, torch.float64
DRAWS = {"normal": random.normal, "rademacher": random.rademacher}

# Eager, compiled and vector code differ in the last places of log, sin and cos; sums of terms add these up.
CLOSE = {"rtol": 1e-13, "atol": 1e-13}
SINGLE = {"rtol": 1e-5, "atol": 1e-5}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@given(
    size=st.integers(1, 40),
    members=st.integers(1, 6),
    start=st.integers(0, 1 << 40),
    distribution=st.sampled_from(["normal", "rademacher"]),
)
@settings(max_examples=25, deadline=None)
def test_a_member_is_its_part_of_the_draw(size, members, start, distribution):
    noises = noise(KEY, size, members, start=start, dtype=F64, distribution=distribution)
    stride = 4 * -(-size // 4)
    for i, row in enumerate(noises):
        expected = DRAWS[distribution](KEY, (size,), dtype=F64, start=(start + i) * stride)
        torch.testing.assert_close(row, expected, **CLOSE)


def test_signs_are_the_top_bits_of_the_words():
    words = random.bits(KEY, (3 * 8,), start=5 * 8).reshape(3, 8)[:, :7]
    signs = noise(KEY, 7, 3, start=5, distribution="rademacher")
    assert torch.equal(signs, (1 - 2 * (words >> 31)).float())


def test_shards_equal_slices_of_the_whole():
    whole = noise(KEY, 11, 20, dtype=F64)
    torch.testing.assert_close(noise(KEY, 11, 7, start=6, dtype=F64), whole[6:13], **CLOSE)
    weights = torch.linspace(-1.0, 2.0, 20, dtype=F64)
    parts = [accumulate(KEY, part, 11, start=10 * i) for i, part in enumerate(weights.split(10))]
    torch.testing.assert_close(parts[0] + parts[1], weights @ whole, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_perturb_and_accumulate_are_their_formulas(dtype):
    real = kernel.compute_dtype(dtype)
    noises = noise(KEY, 9, 4, start=2, dtype=real)
    x, weights = torch.linspace(-1, 2, 9).to(dtype), torch.tensor([0.3, -0.2, 1.5, 0.7]).to(dtype)
    eps = 4 * torch.finfo(dtype).eps
    for sigma in (0.3, torch.tensor(0.3, dtype=F64), torch.linspace(0.1, 0.9, 9, dtype=F64)):
        moved = perturb(KEY, x, sigma, torch.tensor(4))
        expected = x.to(real) + torch.as_tensor(sigma, dtype=real) * noises[2]
        assert moved.dtype == dtype
        torch.testing.assert_close(moved.to(real), expected, rtol=eps, atol=eps)
    total = accumulate(KEY, weights, 9, start=torch.tensor(2))
    assert total.dtype == dtype
    torch.testing.assert_close(total.to(real), weights.to(real) @ noises, rtol=eps, atol=eps)
    assert accumulate(KEY, weights, 9, dtype=F64).dtype == F64


@pytest.mark.parametrize("chunk", [1 << 20, 16])
@pytest.mark.parametrize("native_from", [1, 1 << 20])
def test_chunks_change_nothing(chunk, native_from, monkeypatch):
    monkeypatch.setattr(on_cpu, "CHUNK", chunk)
    monkeypatch.setattr(on_cpu, "NATIVE_FROM", native_from)
    keys = random.split(KEY, 3)
    x, sigma = torch.linspace(-1, 2, 3 * 21, dtype=F64).reshape(3, 21), torch.full((3, 21), 0.3, dtype=F64)
    members, weights = torch.tensor([4, 0, 1 << 33]), torch.linspace(0.2, 1.0, 15, dtype=F64).reshape(3, 5)
    for rows in (keys, keys[:1].expand(3, 2)):
        for starts in (members, members[1:2].expand(3), torch.arange(3)):
            for ours, args in (
                ("noise", (rows, starts, 21, F64, "normal")),
                ("perturb", (rows, x, sigma, starts, "normal")),
                ("accumulate", (rows, weights, starts, 21, F64, "normal")),
                ("project", (rows, x, starts, 5, F64, "normal")),
            ):
                expected = getattr(kernel, ours + "_reference")(*args)
                torch.testing.assert_close(getattr(on_cpu, ours)(*args), expected, **CLOSE)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", [1, 7, 64, 1003])
def test_native_code_equals_the_reference(size, dtype):
    keys, members = random.split(KEY, 70), torch.arange(70) * ((1 << 33) // 3) + (1 << 32) - 9
    for distribution, tolerance in (("normal", 16 * torch.finfo(dtype).eps), ("rademacher", 0.0)):
        expected = kernel.noise_reference(keys, members, size, dtype, distribution)
        # The reference rounds the angle, which is at most 2 pi, and then scales by at most 6.7.
        found = native.draw(keys, members, -(-size // 4), 0, size, dtype, distribution)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        part = native.draw(keys, members, -(-size // 4), size // 8, size - 4 * (size // 8), dtype, distribution)
        assert torch.equal(part, found[:, 4 * (size // 8) :])


@needs_compiler
def test_threads_change_nothing(monkeypatch):
    draw = functools.partial(native.draw, random.split(KEY, 5), torch.arange(5), 100, 0, 397, F64, "normal")
    alone = draw()
    monkeypatch.setattr(native, "SHARE", 40)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(draw(), alone)


@needs_compiler
def test_native_code_is_taken_by_size_alone(monkeypatch):
    whole = noise(KEY, 1003, 8, start=2)
    for members in (whole, vmap(lambda i: noise(KEY, 1003, 4, start=i))(torch.tensor([2, 6])).flatten(0, 1)):
        assert torch.equal(members, native.draw(KEY.expand(8, 2), torch.arange(2, 10), 251, 0, 1003, F32, "normal"))
    monkeypatch.setenv("DIFFOPT_COMPILE", "0")
    torch.testing.assert_close(noise(KEY, 1003, 8, start=2), whole, **SINGLE)
    assert not torch.equal(noise(KEY, 1003, 8, start=2), whole)


def test_a_compiler_that_fails_is_told_of(monkeypatch):
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)
    monkeypatch.setattr(native.compiled_body, "available", lambda: True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="failed .*no-such-compiler.*DIFFOPT_COMPILE=0"):
        assert noise(KEY, 1003, 8).shape == (8, 1003)


def test_vmap_equals_the_loop():
    keys, x = random.split(KEY, 3), torch.linspace(-1, 2, 7, dtype=F64)
    rows = vmap(lambda key: noise(key, 7, 2, start=3, dtype=F64))(keys)
    torch.testing.assert_close(rows, torch.stack([noise(key, 7, 2, start=3, dtype=F64) for key in keys]), **CLOSE)
    moved = vmap(vmap(lambda key, i: perturb(key, x, 0.3, i), (None, 0)), (0, None))(keys, torch.tensor([4, 0, 1]))
    loop = [torch.stack([perturb(key, x, 0.3, i) for i in (4, 0, 1)]) for key in keys]
    torch.testing.assert_close(moved, torch.stack(loop), **CLOSE)
    weights = torch.linspace(0.2, 1.0, 6, dtype=F64).reshape(2, 3)
    sums = vmap(lambda w, a: accumulate(KEY, w, 5, start=a), in_dims=(1, 0))(weights, torch.tensor([2, 0, 7]))
    loop = [accumulate(KEY, w, 5, start=a) for w, a in zip(weights.T, (2, 0, 7), strict=True)]
    torch.testing.assert_close(sums, torch.stack(loop), **CLOSE)


def test_gradients_are_those_of_the_formulas():
    x = torch.linspace(-1, 2, 7, dtype=F64)
    member = noise(KEY, 7, 4, dtype=F64)[3]
    slope = grad(lambda s: (perturb(KEY, x, s, 3) ** 2).sum())(torch.tensor(0.3, dtype=F64))
    torch.testing.assert_close(slope, (2 * (x + 0.3 * member) * member).sum(), **CLOSE)
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=F64, requires_grad=True)
    (accumulate(KEY, weights, 7) @ x).backward()
    torch.testing.assert_close(weights.grad, noise(KEY, 7, 3, dtype=F64) @ x, **CLOSE)
    args = (torch.linspace(0.2, 1, 7, dtype=F64, requires_grad=True), torch.tensor(0.4, dtype=F64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda x, s: perturb(KEY, x, s, 3), args)
    assert torch.autograd.gradcheck(lambda w: accumulate(KEY, w, 7, start=2), weights)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_functions_agree(backend):
    x = torch.linspace(-1, 2, 7, dtype=F64)

    def all_three(x, weights, i):
        return perturb(KEY, x, 0.3, i), accumulate(KEY, weights, 7, start=i), noise(KEY, 3, 2, start=i, dtype=F64)

    args = x, x[:3], torch.tensor(5)
    compiled = torch.compile(all_three, fullgraph=True, backend=backend)(*args)
    torch.testing.assert_close(compiled, all_three(*args), **CLOSE)


def test_donate_writes_in_place_and_can_be_undone():
    x = torch.linspace(-1, 2, 1001)
    before, version = x.clone(), x._version
    assert perturb(KEY, x, 0.01, 3, donate=True) is x
    assert x._version > version
    torch.testing.assert_close(x, perturb(KEY, before, 0.01, 3), rtol=1e-6, atol=1e-6)
    perturb(KEY, x, -0.02, 3, donate=True)
    perturb(KEY, x, 0.01, 3, donate=True)
    # Three sums, each rounded once.
    torch.testing.assert_close(x, before, rtol=2e-7, atol=2e-7)


def test_donate_refuses_what_it_would_break():
    x = torch.linspace(-1, 2, 5)
    with pytest.raises(ValueError, match="expanded"):
        perturb(KEY, x[:1].expand(5), 0.1, 0, donate=True)
    with pytest.raises(ValueError, match="share no memory"):
        perturb(KEY, x, x, 0, donate=True)
    with pytest.raises(RuntimeError, match="requires grad"):
        perturb(KEY, x.clone().requires_grad_(), 0.1, 0, donate=True)
    with pytest.raises(RuntimeError, match="live transform"):
        vmap(lambda i: perturb(KEY, x, 0.1, i, donate=True))(torch.arange(2))
    leaf = torch.linspace(-1, 2, 5).requires_grad_()
    with torch.no_grad():
        perturb(KEY, leaf, 0.1, 0, donate=True)
    squares = (x * leaf).exp()
    perturb(KEY, x, 0.1, 0, donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.sum().backward()


def test_a_donated_vector_is_perturbed_in_memory_of_a_chunk(monkeypatch):
    monkeypatch.setenv("DIFFOPT_COMPILE", "0")
    monkeypatch.setattr(on_cpu, "CHUNK", 1 << 14)
    x = torch.linspace(-1, 2, 400_000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        perturb(KEY, x, 0.1, 3, donate=True)
        accumulate(KEY, torch.ones(1), len(x))
    sizes = sorted(event.cpu_memory_usage for event in profiler.events())
    # Only the sum itself is of the size of the vector; a chunk of words takes 8 bytes each.
    assert sizes[-1] == x.nbytes
    assert sizes[-3] <= 8 << 14


@pytest.mark.slow
def test_ten_million_numbers_take_no_memory_of_their_own():
    x = torch.linspace(-1, 2, 10_000_000)
    perturb(KEY, x[: 1 << 20], 0.1, 3, donate=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    perturb(KEY, x, 0.1, 3, donate=True)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < x.nbytes / 2


def test_empty_sizes():
    assert noise(KEY, 0, 3).shape == (3, 0)
    assert noise(KEY, 3, 0).shape == (0, 3)
    assert perturb(KEY, torch.ones(0), 0.1, 2).shape == (0,)
    assert torch.equal(accumulate(KEY, torch.ones(0), 3), torch.zeros(3))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda x: perturb(KEY, x, 0.1, 1.5), TypeError, "`member` must be an int"),
        (lambda x: perturb(KEY, x, 0.1, True), TypeError, "`member` must be an int"),
        (lambda x: perturb(KEY, x, 0.1, torch.tensor(1.5)), TypeError, "`member` must be an int or an integer tensor"),
        (lambda x: perturb(KEY, x, 0.1, torch.tensor([1])), ValueError, "`member` must be 0-d.*vmap"),
        (lambda x: perturb(KEY, x, 0.1, -1), ValueError, "`member` must be at least 0; got -1"),
        (lambda x: perturb(KEY, x, 0.1, torch.tensor(-1)), ValueError, "at least 0; got -1"),
        (lambda x: vmap(lambda i: perturb(KEY, x, 0.1, i))(torch.tensor([1, -2])), ValueError, "at least 0; got -2"),
        (lambda x: perturb(KEY, x, 0.1, 1 << 63), ValueError, "must be below"),
        (lambda x: perturb(KEY, x.long(), 0.1, 1), TypeError, "`x` must be a floating-point tensor; got torch.int64"),
        (lambda x: perturb(KEY, x[None], 0.1, 1), ValueError, "`x` must have one dimension"),
        (lambda x: perturb(KEY.float(), x, 0.1, 1), TypeError, "`key` must be an int64 tensor"),
        (lambda x: perturb(KEY[:1], x, 0.1, 1), ValueError, "`key` must have shape"),
        (lambda x: perturb(KEY, x, "0.1", 1), TypeError, "`sigma` must be a number"),
        (lambda x: perturb(KEY, x, x.long(), 1), TypeError, "`sigma` must be a number"),
        (lambda x: perturb(KEY, x, x[:2], 1), ValueError, "`sigma` must have shape"),
        (lambda x: perturb(KEY, x, 0.1, 1, distribution="cauchy"), ValueError, '"normal" or "rademacher"; got'),
        (lambda x: perturb(KEY, x.to("meta"), 0.1, 1), ValueError, "on one device"),
        (lambda x: accumulate(KEY, x[None], 3), ValueError, "`weights` must have one dimension"),
        (lambda x: accumulate(KEY, x.long(), 3), TypeError, "`weights` must be a floating-point tensor"),
        (lambda x: accumulate(KEY, x, 3.0), TypeError, "`size` must be an int"),
        (lambda x: accumulate(KEY, x, 3, start=-2), ValueError, "`start` must be at least 0"),
        (lambda x: accumulate(KEY, x, 3, dtype=torch.int64), TypeError, "`accumulate` needs"),
        (lambda x: noise(KEY, -1, 2), ValueError, "`size` must be at least 0"),
        (lambda x: noise(KEY, 3, 2.0), TypeError, "`members` must be an int"),
        (lambda x: noise(KEY, 3, 2, dtype=torch.int64), TypeError, "`noise` needs"),
    ],
)
def test_bad_input_is_told(call, error, match):
    with pytest.raises(error, match=match):
        call(torch.linspace(-1, 2, 5))


def test_other_devices_take_the_references():
    assert launch._home(KEY.to("meta")) is launch.REFERENCE
    assert launch._home(KEY) is launch.CPU
