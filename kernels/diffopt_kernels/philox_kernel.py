"""The Triton kernel behind `diffopt_kernels.philox`; importing this module imports triton."""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# ruff: noqa: RET505 -- Triton prunes an untaken elif, but not the code after a return

import triton
import triton.language as tl

__all__ = ["draw"]


@triton.jit
def _numbers(a, b, DISTRIBUTION: tl.constexpr, BITS: tl.constexpr, DOUBLE: tl.constexpr):
    """Turn two uint32 words into two numbers, as the ``*_pair`` functions of the reference do."""
    real = tl.float64 if DOUBLE else tl.float32
    if DISTRIBUTION == "bits":
        return a, b
    elif DISTRIBUTION == "rademacher":
        return 1.0 - 2.0 * (a >> 31).to(real), 1.0 - 2.0 * (b >> 31).to(real)
    elif DISTRIBUTION == "uniform":
        shift: tl.constexpr = 32 - BITS
        scale: tl.constexpr = 1.0 / (1 << BITS)
        return (a >> shift).to(real) * scale, (b >> shift).to(real) * scale
    elif DISTRIBUTION == "normal":
        u = (a.to(tl.int64) + 1).to(real) * (1.0 / 4294967296.0)
        # A fast logarithm may come out above 0 near u = 1.
        radius = tl.sqrt(tl.maximum(-2.0 * tl.log(u), 0.0))
        shift: tl.constexpr = 0 if DOUBLE else 8
        scale: tl.constexpr = 6.283185307179586 / (4294967296.0 if DOUBLE else 16777216.0)
        angle = (b >> shift).to(real) * scale
        return radius * tl.cos(angle), radius * tl.sin(angle)
    else:
        tl.static_assert(DISTRIBUTION == "gumbel")
        return _gumbel(a, real), _gumbel(b, real)


@triton.jit
def _gumbel(word, real: tl.constexpr):
    u = (2 * word.to(tl.int64) + 1).to(real) * (1.0 / 8589934592.0)
    u = tl.minimum(u, 1.0 - 1.0 / 16777216.0)
    # -log(1 - u) by its series where 1 - u would round; Triton has no log1p.
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * (0.25 + u * (0.2 + u * (1.0 / 6.0))))))
    bound: tl.constexpr = 0.001 if real == tl.float64 else 0.03125
    return -tl.log(tl.where(u < bound, series, -tl.log(1.0 - u)))


@triton.jit(do_not_specialize=["first", "offset", "size"])
def draw(out, key, first, offset, size, DISTRIBUTION: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Write numbers [0, size) of a draw whose number 0 is lane ``offset`` of counter ``first``."""
    block = tl.program_id(0).to(tl.int64) * BLOCK
    counter = first + block + tl.arange(0, BLOCK).to(tl.int64)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    k0, k1 = tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox_impl(low, high, zero, zero, k0, k1)
    double: tl.constexpr = out.dtype.element_ty == tl.float64
    x0, x1 = _numbers(a, b, DISTRIBUTION, BITS, double)
    x2, x3 = _numbers(c, d, DISTRIBUTION, BITS, double)
    numbers = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    place = 4 * block + tl.arange(0, 4 * BLOCK).to(tl.int64) - offset
    if out.dtype.element_ty == tl.int32:
        numbers = numbers.to(tl.int32, bitcast=True)
    tl.store(out + place, numbers.to(out.dtype.element_ty), mask=(place >= 0) & (place < size))
