"""Large draws equal eager ones, compile once, and fall back with a warning."""

import shutil

import pytest
import torch

from diffopt import random
from diffopt.autodiff import compiled_body
from diffopt.random import dispatch

KEY = random.key(11)
LARGE = dispatch.COMPILE_FROM

# The compiled body uses other vector code for log, sin and cos: measured 3 relative ulps at most.
ULPS = 8

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@needs_compiler
def test_large_draws_equal_eager_ones(monkeypatch):
    large = random.normal(KEY, (LARGE + 5,), start=3)
    monkeypatch.setenv("DIFFOPT_COMPILE", "0")
    eager = random.normal(KEY, (LARGE + 5,), start=3)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(large, eager, rtol=ULPS * eps, atol=ULPS * eps)
    assert not compiled_body.available()


@needs_compiler
def test_integer_draws_are_equal_and_length_and_start_compile_nothing(monkeypatch):
    large = random.uniform(KEY, (LARGE,))
    # To compile anew would warn that it failed, and warnings are errors.
    with torch.compiler.set_stance("fail_on_recompile"):
        with torch.no_grad():
            longer = random.uniform(KEY, (2 * LARGE + 1,), start=5)
        later = random.uniform(random.key(1), (LARGE + 100,), start=1 << 40)
    assert torch.equal(longer[: LARGE - 5], large[5:])
    monkeypatch.setenv("DIFFOPT_COMPILE", "0")
    assert torch.equal(later, random.uniform(random.key(1), (LARGE + 100,), start=1 << 40))


def test_a_missing_compiler_is_said_once(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiled_body._has_compiler.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler was found: .* DIFFOPT_COMPILE=0"):
            values = random.rademacher(KEY, (LARGE,))
        assert torch.equal(values[:100], random.rademacher(KEY, (100,)))
        random.rademacher(KEY, (LARGE,))
    finally:
        compiled_body._has_compiler.cache_clear()


def test_a_failing_compiler_is_said_once(monkeypatch):
    def broken(body, dynamic):
        raise RuntimeError("no such header")

    monkeypatch.setattr(compiled_body, "_compiled", broken)
    monkeypatch.setattr(compiled_body, "_has_compiler", lambda: True)
    monkeypatch.setattr(compiled_body, "_broken", set())
    with pytest.warns(RuntimeWarning, match=r"compiling rademacher_chunk failed \(no such header\)"):
        values = random.rademacher(KEY, (LARGE,))
    assert torch.equal(values[:100], random.rademacher(KEY, (100,)))
    random.rademacher(KEY, (LARGE,))
