"""The Triton kernels behind `diffopt_kernels.perturb`; importing this module imports triton.

A program works on BLOCK counters, which are 4 BLOCK elements, of one lane.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportPrivateUsage=false

import triton
import triton.language as tl

from diffopt_kernels.philox_kernel import _numbers

__all__ = ["accumulate", "perturb"]


@triton.jit
def _noise(key, member, blocks, counter, DISTRIBUTION: tl.constexpr, DOUBLE: tl.constexpr):
    """Make the four numbers of each counter of a member; NaN for a negative member."""
    place = member * blocks + counter
    low, high = (place & 0xFFFFFFFF).to(tl.uint32), (place >> 32).to(tl.uint32)
    k0, k1 = tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox_impl(low, high, zero, zero, k0, k1)
    bits: tl.constexpr = 32 if DOUBLE else 24
    x0, x1 = _numbers(a, b, DISTRIBUTION, bits, DOUBLE)
    x2, x3 = _numbers(c, d, DISTRIBUTION, bits, DOUBLE)
    bad = member < 0
    nan = float("nan")
    return tl.where(bad, nan, x0), tl.where(bad, nan, x1), tl.where(bad, nan, x2), tl.where(bad, nan, x3)


@triton.jit(do_not_specialize=["size", "blocks", "per_lane"])
def perturb(
    out,
    x,
    sigma,
    keys,
    members,
    size,
    blocks,
    per_lane,
    out_row,
    x_row,
    x_column,
    sigma_row,
    sigma_column,
    key_row,
    member_row,
    DISTRIBUTION: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write x + sigma * noise; each operand has a stride over lanes, x and sigma one over elements as well."""
    program = tl.program_id(0)
    lane = (program // per_lane).to(tl.int64)
    begin = (program % per_lane).to(tl.int64) * BLOCK
    member = tl.load(members + lane * member_row)
    counter = begin + tl.arange(0, BLOCK).to(tl.int64)
    x0, x1, x2, x3 = _noise(keys + lane * key_row, member, blocks, counter, DISTRIBUTION, DOUBLE)
    noise = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    place = 4 * begin + tl.arange(0, 4 * BLOCK).to(tl.int64)
    mask = place < size
    value = tl.load(x + lane * x_row + place * x_column, mask=mask, other=0.0).to(noise.dtype)
    scale = tl.load(sigma + lane * sigma_row + place * sigma_column, mask=mask, other=0.0).to(noise.dtype)
    tl.store(out + lane * out_row + place, (value + scale * noise).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["size", "blocks", "per_lane", "count", "share", "shares"])
def accumulate(
    out,
    weights,
    keys,
    starts,
    size,
    blocks,
    per_lane,
    count,
    share,
    shares,
    weight_row,
    weight_column,
    key_row,
    start_row,
    DISTRIBUTION: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the weighted sum of one share of the members to its row of out, (lanes, shares, size) and contiguous."""
    program = tl.program_id(0)
    row = (program // per_lane).to(tl.int64)
    begin = (program % per_lane).to(tl.int64) * BLOCK
    lane, part = row // shares, row % shares
    counter = begin + tl.arange(0, BLOCK).to(tl.int64)
    start = tl.load(starts + lane * start_row)
    real = tl.float64 if DOUBLE else tl.float32
    s0 = tl.zeros((BLOCK,), real)
    s1 = tl.zeros((BLOCK,), real)
    s2 = tl.zeros((BLOCK,), real)
    s3 = tl.zeros((BLOCK,), real)
    first = part * share
    for i in range(first, tl.minimum(first + share, count)):
        weight = tl.load(weights + lane * weight_row + i * weight_column).to(real)
        x0, x1, x2, x3 = _noise(keys + lane * key_row, start + i, blocks, counter, DISTRIBUTION, DOUBLE)
        s0 += weight * x0
        s1 += weight * x1
        s2 += weight * x2
        s3 += weight * x3
    total = tl.interleave(tl.interleave(s0, s2), tl.interleave(s1, s3))
    place = 4 * begin + tl.arange(0, 4 * BLOCK).to(tl.int64)
    tl.store(out + row * size + place, total.to(out.dtype.element_ty), mask=place < size)
