"""diffopt_kernels.clip: launchers against references by Triton's interpreter, and their backward passes."""

import importlib.util

import pytest
import torch

from diffopt_kernels import clip
from scripts import run_script

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


SCRIPT = """
import itertools, torch
from diffopt_kernels import clip

torch.manual_seed(0)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

def check_sums(leaves, others, lanes=None):
    real = torch.promote_types(leaves[0].dtype, torch.float32)
    elements = sum(leaf.numel() for leaf in leaves)
    # Random roundings of partial sums that are as large as the sum of squares, at the most.
    rtol, atol = 16 * torch.finfo(real).eps, 16 * torch.finfo(real).eps * elements
    for name, lists in (("sum_of_squares", (leaves,)), ("dot", (leaves, others))):
        value = getattr(clip, name)(*lists, lanes=lanes)
        expected = getattr(clip, name + "_reference")(*lists, lanes=lanes)
        assert value.shape == expected.shape and value.dtype == expected.dtype == real
        torch.testing.assert_close(value, expected, rtol=rtol, atol=0 if name == "sum_of_squares" else atol)
        assert torch.equal(value, getattr(clip, name)(*lists, lanes=lanes))

def check_scale(leaves, factor):
    scaled = clip.scale(leaves, factor)
    for value, e in zip(scaled, clip.scale_reference(leaves, factor), strict=True):
        assert value.shape == e.shape and value.dtype == e.dtype
        # One product is rounded once; the interpreter cuts bfloat16 off instead.
        rtol = torch.finfo(e.dtype).eps if e.dtype == torch.bfloat16 else 0
        torch.testing.assert_close(value, e, rtol=rtol, atol=0)

def leaves_of(shapes, dtype):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]

for dtype in FLOATS:
    shapes = [(3, 5), (), (0, 2), (1024,), (7,)]
    leaves, others = leaves_of(shapes, dtype), leaves_of(shapes, dtype)
    check_sums(leaves, others)
    check_sums(leaves, [leaf.float() for leaf in others])
    for factor in (torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.7)):
        check_scale(leaves, factor)
    for lanes in (3, 1, 0):
        shapes = [(lanes, 5), (lanes,), (lanes, 0, 2), (lanes, 2, 8)]
        leaves, others = leaves_of(shapes, dtype), leaves_of(shapes, dtype)
        check_sums(leaves, others, lanes)
        check_scale(leaves, torch.linspace(0.5, 2.0, lanes))

big, other = leaves_of([(140_001,), (5,)], torch.float32), leaves_of([(140_001,), (5,)], torch.float32)
check_sums(big, other)
check_scale(big, torch.tensor(0.3))

leaf, other = leaves_of([(6, 5, 4)] * 2, torch.float32)
for moved in (leaf.transpose(0, 2), leaf[::2, 1:], leaf[:1].expand(6, 5, 4), torch._neg_view(leaf), leaf[0, 0, 0]):
    for with_others in ([other.reshape(-1)[: moved.numel()].reshape(moved.shape)], [moved]):
        check_sums([moved], with_others)
    check_scale([moved], torch.tensor(0.3))
    if moved.ndim:
        check_sums([moved], [moved * 2], lanes=len(moved))
        check_scale([moved], torch.linspace(0.5, 2.0, len(moved)))

for strided in (False, True):
    leaves = leaves_of([(3, 4), (), (0,), (5,)], torch.float32)
    if strided:
        leaves[0] = torch.randn(3, 8)[:, ::2]
    expected, versions = clip.scale_reference(leaves, torch.tensor(0.3)), [leaf._version for leaf in leaves]
    scaled = clip.scale(leaves, torch.tensor(0.3), leaves)
    for value, out, e, version in zip(scaled, leaves, expected, versions, strict=True):
        assert value is out and torch.equal(value, e)
        assert value._version > version or not value.numel()

# Backward: each launcher by the two others, against torch through the references.
leaves, cotangents = leaves_of([(3, 5), (7,)], torch.float64), leaves_of([(3, 5), (7,)], torch.float64)
total, factor = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
(expected,) = torch.func.vjp(clip.sum_of_squares_reference, leaves)[1](total)
torch.testing.assert_close(clip.scale(leaves, 2 * total), expected, rtol=1e-12, atol=0)
expected, expected_factor = torch.func.vjp(clip.scale_reference, leaves, factor)[1](cotangents)
torch.testing.assert_close(clip.scale(cotangents, factor), expected, rtol=1e-12, atol=0)
torch.testing.assert_close(clip.dot(cotangents, leaves), expected_factor, rtol=1e-12, atol=0)
expected, expected_others = torch.func.vjp(clip.dot_reference, leaves, cotangents)[1](total)
torch.testing.assert_close(clip.scale(cotangents, total), expected, rtol=1e-12, atol=0)
torch.testing.assert_close(clip.scale(leaves, total), expected_others, rtol=1e-12, atol=0)
"""


@needs_triton
def test_launchers_agree_with_references(tmp_path):
    run_script(SCRIPT, tmp_path)


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
from diffopt_kernels import clip_kernel

tables = {"pointers": "*i64", "work": "*i64", "table": "*fp64", "partials": "*fp32", "per_lane": "i32", "stride": "i32"}
for dtype in (tl.float32, tl.bfloat16):
    common = {"DTYPES": (dtype, dtype), "REAL": tl.float32, "BLOCK": 4096}
    for name, constants in (("dot", {**common, "COLUMNS": 2}), ("scale", common)):
        signature = {**tables, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(getattr(clip_kernel, name), signature, constants)
        options = {"num_warps": 8, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.asm["cubin"] and "ld.global.v" in compiled.asm["ptx"]
print("compiled")
"""


@needs_triton
def test_kernels_compile_for_a_gpu_and_move_whole_vectors(tmp_path):
    if run_script(COMPILE, tmp_path, interpret=False) == "no backend":
        pytest.skip("triton has no nvidia backend here")


def test_importing_the_launchers_does_not_import_triton(tmp_path):
    run_script("import sys, diffopt_kernels.clip; assert 'triton' not in sys.modules", tmp_path)


def test_references_agree_with_torch():
    leaves = [torch.tensor([[1.0, -2.0], [3.0, 4.0]]), torch.tensor([0.5, 6.0])]
    norms = [torch.linalg.vector_norm(leaf.flatten(1) if leaf.ndim > 1 else leaf[:, None], dim=1) for leaf in leaves]
    torch.testing.assert_close(clip.sum_of_squares_reference(leaves, lanes=2), norms[0] ** 2 + norms[1] ** 2)
    norm = torch.nn.utils.get_total_norm(leaves)
    torch.testing.assert_close(clip.sum_of_squares_reference(leaves).sqrt(), norm)
    scaled = clip.scale_reference(leaves, torch.tensor([2.0, -1.0]))
    assert torch.equal(scaled[0], torch.tensor([[2.0, -4.0], [-3.0, -4.0]]))
    assert torch.equal(scaled[1], torch.tensor([1.0, -6.0]))


def test_empty_lists_need_no_launch():
    assert clip.scale([], torch.tensor(2.0)) == []
    for dot, sums in ((clip.dot, clip.sum_of_squares), (clip.dot_reference, clip.sum_of_squares_reference)):
        assert torch.equal(sums([]), torch.tensor(0.0))
        assert torch.equal(dot([], [], lanes=3), torch.zeros(3))


def test_wrong_arguments_are_refused():
    leaf = torch.ones(3)
    for scale in (clip.scale, clip.scale_reference):
        with pytest.raises(ValueError, match=r"shape \(\) or \(lanes,\)"):
            scale([leaf], torch.ones(1, 1))
        with pytest.raises(TypeError, match="`factor` needs a floating"):
            scale([leaf], torch.tensor(2))
        with pytest.raises(ValueError, match="leading dimension 2"):
            scale([leaf], torch.ones(2))
        with pytest.raises(ValueError, match="move it there"):
            scale([leaf], torch.tensor(1.0, device="meta"))
        with pytest.raises(TypeError, match="dtype of the leaves"):
            scale([leaf], torch.tensor(1.0), [leaf.double()])
        with pytest.raises(ValueError, match="leaf 0 has"):
            scale([leaf], torch.tensor(1.0), [leaf[:2]])
    for dot in (clip.dot, clip.dot_reference):
        with pytest.raises(ValueError, match="leaf 0 has"):
            dot([leaf], [leaf[:2]])
        with pytest.raises(TypeError, match="Group leaves by dtype"):
            dot([leaf, leaf.double()], [leaf, leaf])
        with pytest.raises(ValueError, match="leading dimension 2"):
            dot([leaf], [leaf], lanes=2)
