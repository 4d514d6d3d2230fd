"""diffopt_kernels.multi_tensor: launchers against references by Triton's interpreter, and a compilation for a GPU."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from diffopt_kernels import multi_tensor, steps
from scripts import run_script

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


PRELUDE = """
import itertools, torch
from diffopt_kernels import multi_tensor, steps

RULES = (steps.SGD, steps.MOMENTUM, steps.NESTEROV, steps.RMSPROP, steps.LION, steps.ADAM)
VALUES = dict(learning_rate=0.1, decay=0.9, b1=0.9, b2=0.99, eps=1e-3, eps_root=1e-4, weight_decay=0.01,
              correction1=0.3, correction2=0.2)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A few roundings of the wide dtype, here against the largest element, for sums that cancel. Half precision is rounded
# once, at the store; the interpreter cuts bfloat16 off, which is another ulp.
WIDE_ULPS, HALF_ULPS = 16, 1
torch.manual_seed(0)

def real_of(dtype):
    return torch.promote_types(dtype, torch.float32)

def column(shapes, dtype, positive=False):
    leaves = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return [(leaf.square() + 0.1 if positive else leaf).to(dtype) for leaf in leaves]

def columns_of(rule, shapes, dtype):
    # The last moment of adam and rmsprop is a mean square.
    moments = [column(shapes, real_of(dtype), rule.name in ("adam", "rmsprop") and j == rule.moments - 1)
               for j in range(rule.moments)]
    return [column(shapes, dtype), column(shapes, dtype), *moments]

def scalars_of(rule, batched=(), lanes=3, **changes):
    spread = torch.linspace(0.9, 1.1, lanes, dtype=torch.float64)
    values = {**VALUES, **changes}
    scalars = [torch.tensor(values[name], dtype=torch.float64) for name in rule.scalars]
    return [s * spread if k in batched else s for k, s in enumerate(scalars)]

def cotangents_of(columns):
    return [column([leaf.shape for leaf in c], c[0].dtype) for j, c in enumerate(columns) if j != 1]

def assert_same(values, expected, real, twice=False):
    assert len(values) == len(expected)
    scale = max([1e-3, *(float(e.abs().nan_to_num(0, 0, 0).max()) for e in expected if e.numel())])
    for value, e in zip(values, expected):
        assert value.shape == e.shape and value.dtype == e.dtype
        ulps = HALF_ULPS if e.dtype.itemsize == 2 else WIDE_ULPS
        atol = (torch.finfo(e.dtype).eps if twice else WIDE_ULPS * torch.finfo(real).eps) * scale
        torch.testing.assert_close(value, e, rtol=ulps * torch.finfo(e.dtype).eps, atol=atol, equal_nan=True)

def check_step(rule, columns, scalars):
    news = multi_tensor.step(rule, columns, scalars)
    for new, expected in zip(news, multi_tensor.step_reference(rule, columns, scalars), strict=True):
        assert_same(new, expected, real_of(columns[-1][0].dtype))

def check_backward(rule, columns, scalars, cotangents, wanted=None, scalars_wanted=True):
    wanted = [True] * len(columns) if wanted is None else wanted
    arguments = (rule, columns, scalars, cotangents, wanted, scalars_wanted)
    grads, scalar_grads = multi_tensor.step_backward(*arguments)
    expected, expected_scalars = multi_tensor.step_backward_reference(*arguments)
    real = real_of(columns[-1][0].dtype)
    for grad, e, want in zip(grads, expected, wanted, strict=True):
        assert (grad is not None) == want
        if want:
            # The reference of nesterov casts g twice, so its cotangent is a sum of two numbers that were rounded.
            assert_same(grad, e, real, twice=rule is steps.NESTEROV)
    assert (scalar_grads is not None) == scalars_wanted
    if scalars_wanted:
        # The reference adds up in the wide dtype, the launcher in float64 but for each block.
        elements = sum(leaf.numel() for leaf in columns[0])
        for grad, e in zip(scalar_grads, expected_scalars, strict=True):
            assert grad.shape == e.shape and grad.dtype == e.dtype == torch.float64
            tolerance = 16 * elements ** 0.5 * torch.finfo(real).eps
            torch.testing.assert_close(grad, e, rtol=tolerance, atol=tolerance * elements ** 0.5, equal_nan=True)
    return scalar_grads
"""

VALUES = """
for rule, dtype in itertools.product(RULES, FLOATS):
    columns = columns_of(rule, [(3, 5), (), (0, 2), (1024,), (7,)], dtype)
    scalars = scalars_of(rule)
    check_step(rule, columns, scalars)
    check_backward(rule, columns, scalars, cotangents_of(columns))
"""

WANTED = """
for rule in RULES:
    columns = columns_of(rule, [(3, 5)], torch.float32)
    cotangents = cotangents_of(columns)
    for wanted in itertools.product((True, False), repeat=len(columns) + 1):
        check_backward(rule, columns, scalars_of(rule), cotangents, wanted[:-1], wanted[-1])
"""

# A leaf of more than one program, a parameter of half precision with another gradient, kinks, empty lists.
EDGES = """
for rule in RULES:
    columns = columns_of(rule, [(140_001,), (3,), (17, 2)], torch.float32)
    columns[0] = [leaf.bfloat16() for leaf in columns[0]]
    check_step(rule, columns, scalars_of(rule))
    cotangents = cotangents_of(columns)
    first = check_backward(rule, columns, scalars_of(rule), cotangents)
    again = check_backward(rule, columns, scalars_of(rule), cotangents)
    assert all(torch.equal(a, b) for a, b in zip(first, again))

    # What lies behind the end of a leaf is 0 in the kernel, where the square root has no derivative.
    rootless = scalars_of(rule, eps_root=0.0)
    columns = columns_of(rule, [(15,)], torch.float64)
    assert all(g.isfinite() for g in check_backward(rule, columns, rootless, cotangents_of(columns)))
    for eps in (0.0, 1e-3):
        columns = [[torch.cat([torch.zeros(2, dtype=torch.float64), leaf]) for leaf in c] for c in columns]
        check_step(rule, columns, scalars_of(rule, eps_root=0.0, eps=eps))
        for cotangents in (cotangents_of(columns), [[leaf * 0 for leaf in c] for c in cotangents_of(columns)]):
            check_backward(rule, columns, scalars_of(rule, eps_root=0.0, eps=eps), cotangents)

    columns = [[torch.empty(0, 3)] for _ in columns]
    check_step(rule, columns, scalars_of(rule))
    check_backward(rule, columns, scalars_of(rule), cotangents_of(columns))
"""

LAYOUTS = """
def lays(leaf):
    wide = torch.zeros(2 * leaf.shape[0], leaf.shape[1], leaf.shape[2] + 1, dtype=leaf.dtype)
    sliced = wide[::2, :, 1:]
    sliced.copy_(leaf)
    yield leaf.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    yield sliced
    yield leaf[:1].expand(leaf.shape)
    yield torch._neg_view(leaf)

for rule, lanes in ((steps.MOMENTUM, None), (steps.ADAM, 3)):
    scalars = scalars_of(rule, () if lanes is None else (0,))
    plain = columns_of(rule, [(3, 5, 4), (3, 2)], torch.float32)
    ways = len(list(lays(plain[0][0])))
    for j, way in itertools.product(range(len(plain) + 1), range(ways)):
        # Column j lies otherwise than the others; in the last round all do.
        moved = [[list(lays(c[0]))[way], c[1].T.contiguous().T] if j in (k, len(plain)) else c
                 for k, c in enumerate(plain)]
        if rule is steps.ADAM and way == 3:
            moved[3] = plain[3]
        check_step(rule, moved, scalars)
        cotangents = [[list(lays(c[0]))[way], torch.zeros(()).expand(c[1].shape)] for c in cotangents_of(plain)]
        check_backward(rule, moved, scalars, cotangents)

dense = torch.randn(4, 5).T
(new,) = multi_tensor.step(steps.SGD, [[dense], [dense]], scalars_of(steps.SGD))
assert new[0].stride() == dense.stride()
"""

LANES = """
for rule in RULES:
    count = len(rule.scalars)
    cases = ((range(count), 3, torch.float64), ((0,), 3, torch.float16), ((count - 1,), 1, torch.float32))
    for batched, lanes, dtype in (*cases, ((0,), 0, torch.float32)):
        columns = columns_of(rule, [(lanes, 5), (lanes,), (lanes, 0, 2), (lanes, 2, 8)], dtype)
        scalars = scalars_of(rule, batched, lanes)
        check_step(rule, columns, scalars)
        check_backward(rule, columns, scalars, cotangents_of(columns))
"""

OUT = """
for rule in RULES:
    for strided in (False, True):
        columns = columns_of(rule, [(3, 5), (), (0,), (4, 4)], torch.float32)
        if strided:
            columns = [[leaf.repeat_interleave(2, 0)[::2] if leaf.ndim == 2 else leaf for leaf in c] for c in columns]
        expected = multi_tensor.step_reference(rule, columns, scalars_of(rule))
        donated = [columns[0], *columns[2:]]
        versions = [leaf._version for leaf in donated[0] if leaf.numel()]
        news = multi_tensor.step(rule, columns, scalars_of(rule), donated)
        for new, out, e in zip(news, donated, expected, strict=True):
            assert all(a is b for a, b in zip(new, out, strict=True))
            assert_same(new, e, torch.float32)
        assert all(leaf._version > v for leaf, v in zip([x for x in donated[0] if x.numel()], versions, strict=True))
"""


@needs_triton
@pytest.mark.parametrize("script", [VALUES + WANTED, EDGES + LANES, LAYOUTS + OUT], ids=["values", "edges", "layouts"])
def test_launchers_agree_with_references(script, tmp_path):
    run_script(PRELUDE + script, tmp_path)


COMPILE = """
import sys
import triton.language as tl
from triton.backends import backends
if "nvidia" not in backends:
    print("no backend")
    sys.exit()
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from diffopt_kernels import multi_tensor_kernel

tables = {"pointers": "*i64", "work": "*i64", "table": "*fp64", "partials": "*fp64", "per_lane": "i32", "stride": "i32"}
for dtype in (tl.float32, tl.bfloat16):
    columns, news = (dtype, dtype, tl.float32, tl.float32), (dtype, tl.float32, tl.float32)
    rule = {"RULE": "adam", "COLUMNS": 4, "SCALARS": 8, "REAL": tl.float32, "BLOCK": 1024}
    backward = {**rule, "DTYPES": columns + news + columns, "WANTED": 15, "SUMS": True}
    for name, constants in (("step", {**rule, "DTYPES": columns + news}), ("step_backward", backward)):
        signature = {**tables, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(getattr(multi_tensor_kernel, name), signature, constants)
        options = {"num_warps": 8, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"] and "ld.global.v" in compiled.asm["ptx"] and "st.global.v" in compiled.asm["ptx"]
print("compiled")
"""


@needs_triton
def test_kernels_compile_for_a_gpu_and_move_whole_vectors(tmp_path):
    if run_script(COMPILE, tmp_path, interpret=False) == "no backend":
        pytest.skip("triton has no nvidia backend here")


def test_importing_the_launchers_does_not_import_triton(tmp_path):
    run_script("import sys, diffopt_kernels.multi_tensor; assert 'triton' not in sys.modules", tmp_path)


def scalar(*shape):
    return torch.full(shape, 0.1, dtype=torch.float64)


@pytest.mark.parametrize("call", [multi_tensor.step, multi_tensor.step_reference])
def test_wrong_arguments_are_refused(call):
    p, g, rate = torch.ones(3), torch.ones(3), scalar()
    with pytest.raises(ValueError, match="needs 2 columns"):
        call(steps.SGD, [[p]], [rate])
    with pytest.raises(ValueError, match="needs the scalars"):
        call(steps.SGD, [[p], [g]], [rate, rate])
    with pytest.raises(TypeError, match="scalars need to be float64"):
        call(steps.SGD, [[p], [g]], [rate.float()])
    with pytest.raises(ValueError, match="one shape"):
        call(steps.SGD, [[p], [g]], [scalar(1, 1)])
    with pytest.raises(TypeError, match="moments need"):
        call(steps.MOMENTUM, [[p], [g], [g.half()]], [rate, rate])
    with pytest.raises(ValueError, match="`out` has 2"):
        call(steps.SGD, [[p], [g]], [rate], [[p], [p]])
    with pytest.raises(ValueError, match="on one device"):
        call(steps.SGD, [[p.to("meta")], [g]], [rate])


def test_leaves_that_do_not_fit_are_refused():
    p, g, rate = torch.ones(3), torch.ones(3), scalar()
    with pytest.raises(ValueError, match="one entry for each leaf"):
        multi_tensor.step(steps.SGD, [[p], [g, g]], [rate])
    with pytest.raises(ValueError, match="leaf 0 has"):
        multi_tensor.step(steps.SGD, [[p], [g[:2]]], [rate])
    with pytest.raises(TypeError, match="Group leaves by dtype"):
        multi_tensor.step(steps.SGD, [[p, p.double()], [g, g]], [rate])
    with pytest.raises(TypeError, match="Group leaves by dtype"):
        multi_tensor.step(steps.SGD, [[p.long()], [g]], [rate])
    with pytest.raises(ValueError, match="leading dimension 2"):
        multi_tensor.step(steps.SGD, [[p], [g]], [scalar(2)])
    with pytest.raises(ValueError, match="on one device"):
        multi_tensor.step(steps.SGD, [[p], [g.to("meta")]], [rate])
    with pytest.raises(ValueError, match="names some memory twice"):
        multi_tensor.step(steps.SGD, [[p, p], [g, g]], [rate], [[p, p]])


def test_wrong_cotangents_are_refused():
    p, g, rate = torch.ones(3), torch.ones(3), scalar()
    with pytest.raises(ValueError, match="`wanted` needs"):
        multi_tensor.step_backward(steps.SGD, [[p], [g]], [rate], [[p]], [True], True)
    with pytest.raises(ValueError, match="1 output columns"):
        multi_tensor.step_backward(steps.SGD, [[p], [g]], [rate], [[p], [p]], [True, True], True)
    with pytest.raises(TypeError, match="dtypes of the outputs"):
        multi_tensor.step_backward(steps.SGD, [[p], [g]], [rate], [[p.half()]], [True, True], True)


def test_empty_lists_need_no_launch():
    assert multi_tensor.step(steps.MOMENTUM, [[], [], []], [scalar(), scalar()]) == ([], [])
    grads, scalars = multi_tensor.step_backward(steps.SGD, [[], []], [scalar(2)], [[]], [True, False], True)
    assert grads == ([], None)
    assert scalars is not None
    assert torch.equal(scalars[0], torch.zeros(2, dtype=torch.float64))


@needs_triton
def test_the_gpu_benchmark_runs_small(tmp_path):
    folder = pathlib.Path(__file__).parents[2] / "benchmarks"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "gpu.py", "--interpret"]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("agree with the chain") == 2
