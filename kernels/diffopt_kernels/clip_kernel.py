"""The Triton kernels behind `diffopt_kernels.clip`; importing this module imports triton."""
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from diffopt_kernels.multi_tensor_kernel import begin, load, store, store_sums, whole

__all__ = ["dot", "scale"]


@triton.jit
def _dot_block(
    addresses,
    left,
    partials,
    COLUMNS: tl.constexpr,
    DTYPES: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = load(addresses, left, 0, COLUMNS, DTYPES, REAL, BLOCK, WHOLE)
    store_sums(partials, (columns[0] * columns[COLUMNS - 1],), left, BLOCK, WHOLE)


@triton.jit(do_not_specialize=["per_lane", "stride"])
def dot(
    pointers,
    work,
    table,
    partials,
    per_lane,
    stride,
    COLUMNS: tl.constexpr,
    DTYPES: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the products of two columns, or the squares of one."""
    addresses, left, _ = begin(pointers, work, per_lane, DTYPES)
    if whole(addresses, left, BLOCK):
        _dot_block(addresses, left, partials, COLUMNS, DTYPES, REAL, BLOCK, True)
    else:
        _dot_block(addresses, left, partials, COLUMNS, DTYPES, REAL, BLOCK, False)


@triton.jit
def _scale_block(
    addresses,
    left,
    factor,
    DTYPES: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = load(addresses, left, 0, 1, DTYPES, REAL, BLOCK, WHOLE)
    store(addresses, left, (columns[0] * factor,), 1, 1, DTYPES, BLOCK, WHOLE)


@triton.jit(do_not_specialize=["per_lane", "stride"])
def scale(
    pointers,
    work,
    table,
    partials,
    per_lane,
    stride,
    DTYPES: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write column 0 times the lane's factor to column 1."""
    addresses, left, lane = begin(pointers, work, per_lane, DTYPES)
    factor = tl.load(table + lane * stride).to(REAL)
    if whole(addresses, left, BLOCK):
        _scale_block(addresses, left, factor, DTYPES, REAL, BLOCK, True)
    else:
        _scale_block(addresses, left, factor, DTYPES, REAL, BLOCK, False)
