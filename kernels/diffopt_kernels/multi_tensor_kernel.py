"""The Triton kernels behind `diffopt_kernels.multi_tensor`; importing this module imports triton.

A program works on BLOCK elements of one lane of one leaf. Its row of `work` says which: (leaf, first element, elements
in the lane). `pointers` has a row of addresses for each leaf, one for each of its columns, with dtypes DTYPES.
The tables are made in `diffopt_kernels.launch`.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# ruff: noqa: RET505 -- Triton prunes an untaken elif, but not the code after a return

import triton
import triton.language as tl

__all__ = ["begin", "load", "step", "step_backward", "store", "store_sums", "whole"]


@triton.jit
def begin(pointers, work, per_lane, DTYPES: tl.constexpr):
    """Give the byte address of this program's first element in each column, how many elements are left, the lane."""
    program = tl.program_id(0)
    row = work + 3 * (program % per_lane).to(tl.int64)
    lane = (program // per_lane).to(tl.int64)
    leaf, start, size = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    addresses = ()
    for j in tl.static_range(len(DTYPES)):
        address = tl.load(pointers + leaf * len(DTYPES) + j)
        addresses += (address + (lane * size + start) * (DTYPES[j].primitive_bitwidth // 8),)
    return addresses, size - start, lane


@triton.jit
def whole(addresses, left, BLOCK: tl.constexpr):
    """Say whether the block is full and 16-byte aligned in all columns, so that it needs no mask and moves in fours."""
    bits = addresses[0]
    for j in tl.static_range(1, len(addresses)):
        bits |= addresses[j]
    return (left >= BLOCK) & (bits % 16 == 0)


@triton.jit
def load(
    addresses,
    left,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    DTYPES: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Load columns FIRST, ..., LAST - 1 and cast them to REAL."""
    place = tl.arange(0, BLOCK)
    values = ()
    for j in tl.static_range(FIRST, LAST):
        pointer = addresses[j].to(tl.pointer_type(DTYPES[j]))
        if WHOLE:
            value = tl.load(tl.multiple_of(pointer, 16) + place)
        else:
            value = tl.load(pointer + place, mask=place < left, other=0.0)
        values += (value.to(REAL),)
    return values


@triton.jit
def store(
    addresses,
    left,
    values,
    FIRST: tl.constexpr,
    WANTED: tl.constexpr,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Store value k in column FIRST + k where bit k of WANTED is set."""
    place = tl.arange(0, BLOCK)
    for k in tl.static_range(len(values)):
        if (WANTED >> k) & 1:
            pointer = addresses[FIRST + k].to(tl.pointer_type(DTYPES[FIRST + k]))
            value = values[k].to(DTYPES[FIRST + k])
            if WHOLE:
                tl.store(tl.multiple_of(pointer, 16) + place, value)
            else:
                tl.store(pointer + place, value, mask=place < left)


@triton.jit
def store_sums(partials, terms, left, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Store the sum of each term over the block in this program's row of partials."""
    row = partials + tl.program_id(0).to(tl.int64) * len(terms)
    for k in tl.static_range(len(terms)):
        if WHOLE:
            total = tl.sum(terms[k], axis=0)
        else:
            total = tl.sum(tl.where(tl.arange(0, BLOCK) < left, terms[k], 0.0), axis=0)
        tl.store(row + k, total.to(partials.dtype.element_ty))


@triton.jit
def _scalars_of(table, COUNT: tl.constexpr):
    """Load a lane's scalars, in float64."""
    values = ()
    for k in tl.static_range(COUNT):
        values += (tl.load(table + k),)
    return values


@triton.jit
def _sqrt(x):
    # In float32, tl.sqrt is approximate and takes subnormal numbers for 0.
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def _advance(columns, scalars, RULE: tl.constexpr, REAL: tl.constexpr):
    """Give the new parameter and moments, as the references of `diffopt_kernels.steps` do."""
    p, g, rate = columns[0], columns[1], scalars[0].to(REAL)
    if RULE == "sgd":
        return (p - rate * g,)
    elif RULE == "momentum":
        m = scalars[1].to(REAL) * columns[2] + g
        return p - rate * m, m
    elif RULE == "nesterov":
        decay = scalars[1].to(REAL)
        m = decay * columns[2] + g
        return p - rate * (g + decay * m), m
    elif RULE == "rmsprop":
        nu = scalars[1].to(REAL) * columns[2] + (1 - scalars[1]).to(REAL) * g * g
        u = g / (_sqrt(nu + scalars[3].to(REAL)) + scalars[2].to(REAL))
        return p - rate * u, nu
    elif RULE == "lion":
        u = _sign(scalars[1].to(REAL) * columns[2] + (1 - scalars[1]).to(REAL) * g)
        mu = scalars[2].to(REAL) * columns[2] + (1 - scalars[2]).to(REAL) * g
        return p - rate * (u + scalars[3].to(REAL) * p), mu
    else:
        tl.static_assert(RULE == "adam")
        mu = scalars[1].to(REAL) * columns[2] + (1 - scalars[1]).to(REAL) * g
        nu = scalars[2].to(REAL) * columns[3] + (1 - scalars[2]).to(REAL) * g * g
        size = _sqrt(nu / scalars[7].to(REAL) + scalars[4].to(REAL)) + scalars[3].to(REAL)
        u = mu / scalars[6].to(REAL) / size
        return p - rate * (u + scalars[5].to(REAL) * p), mu, nu


@triton.jit
def _pull_back(columns, cotangents, scalars, RULE: tl.constexpr, REAL: tl.constexpr):
    """Give the cotangents of the columns, and the terms whose sums are the cotangents of the scalars.

    As in torch, the derivative of sign is 0, and that of sqrt at 0 is 1 / 0, so that a cotangent of 0 gives NaN there.
    """
    p, g, rate, cp = columns[0], columns[1], scalars[0].to(REAL), cotangents[0]
    down = -rate * cp
    if RULE == "sgd":
        return (cp, down), (-cp * g,)
    elif RULE == "momentum":
        decay = scalars[1].to(REAL)
        m = decay * columns[2] + g
        total = cotangents[1] + down
        return (cp, total, decay * total), (-cp * m, total * columns[2])
    elif RULE == "nesterov":
        decay = scalars[1].to(REAL)
        m = decay * columns[2] + g
        total = cotangents[1] + decay * down
        return (cp, down + total, decay * total), (-cp * (g + decay * m), down * m + total * columns[2])
    elif RULE == "rmsprop":
        return _pull_back_rmsprop(g, columns[2], cp, cotangents[1], scalars, REAL)
    elif RULE == "lion":
        mu, cmu, b2, weight_decay = columns[2], cotangents[1], scalars[2].to(REAL), scalars[3].to(REAL)
        u = _sign(scalars[1].to(REAL) * mu + (1 - scalars[1]).to(REAL) * g)
        terms = (-cp * (u + weight_decay * p), tl.zeros_like(p), cmu * mu - cmu * g, down * p)
        return (cp + down * weight_decay, (1 - scalars[2]).to(REAL) * cmu, b2 * cmu), terms
    else:
        tl.static_assert(RULE == "adam")
        return _pull_back_adam(columns, cotangents, scalars, REAL)


@triton.jit
def _pull_back_rmsprop(g, nu, cp, cnu, scalars, REAL: tl.constexpr):
    rate, decay, rest = scalars[0].to(REAL), scalars[1].to(REAL), (1 - scalars[1]).to(REAL)
    root = _sqrt(decay * nu + rest * g * g + scalars[3].to(REAL))
    size = root + scalars[2].to(REAL)
    u = g / size
    down = -rate * cp
    csize = -down * (u / size)
    croot = csize / (2.0 * root)
    total = cnu + croot
    grads = (cp, down / size + 2.0 * (total * g * rest), decay * total)
    return grads, (-cp * u, total * nu - total * g * g, csize, croot)


@triton.jit
def _pull_back_adam(columns, cotangents, scalars, REAL: tl.constexpr):
    p, g, mu, nu = columns
    rate, b1, b2 = scalars[0].to(REAL), scalars[1].to(REAL), scalars[2].to(REAL)
    rest1, rest2 = (1 - scalars[1]).to(REAL), (1 - scalars[2]).to(REAL)
    weight_decay, c1, c2 = scalars[5].to(REAL), scalars[6].to(REAL), scalars[7].to(REAL)
    mean = (b1 * mu + rest1 * g) / c1
    square = (b2 * nu + rest2 * g * g) / c2
    root = _sqrt(square + scalars[4].to(REAL))
    size = root + scalars[3].to(REAL)
    u = mean / size
    cp = cotangents[0]
    down = -rate * cp
    cmean, csize = down / size, -down * (u / size)
    croot = csize / (2.0 * root)
    total1, total2 = cotangents[1] + cmean / c1, cotangents[2] + croot / c2
    grads = (cp + down * weight_decay, rest1 * total1 + 2.0 * (total2 * g * rest2), b1 * total1, b2 * total2)
    cb1, cb2 = total1 * mu - total1 * g, total2 * nu - total2 * g * g
    cc1, cc2 = -cmean * (mean / c1), -croot * (square / c2)
    return grads, (-cp * (u + weight_decay * p), cb1, cb2, csize, croot, down * p, cc1, cc2)


@triton.jit
def _step_block(
    addresses,
    left,
    scalars,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPES: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = load(addresses, left, 0, COLUMNS, DTYPES, REAL, BLOCK, WHOLE)
    store(addresses, left, _advance(columns, scalars, RULE, REAL), COLUMNS, -1, DTYPES, BLOCK, WHOLE)


@triton.jit(do_not_specialize=["per_lane", "stride"])
def step(
    pointers,
    work,
    table,
    partials,
    per_lane,
    stride,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALARS: tl.constexpr,
    DTYPES: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step a list of leaves; DTYPES are those of the columns (p, g, moments), then of the new (p, moments)."""
    addresses, left, lane = begin(pointers, work, per_lane, DTYPES)
    scalars = _scalars_of(table + lane * stride, SCALARS)
    if whole(addresses, left, BLOCK):
        _step_block(addresses, left, scalars, RULE, COLUMNS, DTYPES, REAL, BLOCK, True)
    else:
        _step_block(addresses, left, scalars, RULE, COLUMNS, DTYPES, REAL, BLOCK, False)


@triton.jit
def _backward_block(
    addresses,
    left,
    scalars,
    partials,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    WANTED: tl.constexpr,
    SUMS: tl.constexpr,
    DTYPES: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    columns = load(addresses, left, 0, COLUMNS, DTYPES, REAL, BLOCK, WHOLE)
    cotangents = load(addresses, left, COLUMNS, 2 * COLUMNS - 1, DTYPES, REAL, BLOCK, WHOLE)
    grads, terms = _pull_back(columns, cotangents, scalars, RULE, REAL)
    store(addresses, left, grads, 2 * COLUMNS - 1, WANTED, DTYPES, BLOCK, WHOLE)
    if SUMS:
        store_sums(partials, terms, left, BLOCK, WHOLE)


@triton.jit(do_not_specialize=["per_lane", "stride"])
def step_backward(
    pointers,
    work,
    table,
    partials,
    per_lane,
    stride,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALARS: tl.constexpr,
    WANTED: tl.constexpr,
    SUMS: tl.constexpr,
    DTYPES: tl.constexpr,
    REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pull cotangents back through `step`; DTYPES are those of the columns, the cotangents, the columns again."""
    addresses, left, lane = begin(pointers, work, per_lane, DTYPES)
    scalars = _scalars_of(table + lane * stride, SCALARS)
    if whole(addresses, left, BLOCK):
        _backward_block(
            addresses, left, scalars, partials, RULE, COLUMNS, WANTED, SUMS, DTYPES, REAL, BLOCK, WHOLE=True
        )
    else:
        _backward_block(
            addresses, left, scalars, partials, RULE, COLUMNS, WANTED, SUMS, DTYPES, REAL, BLOCK, WHOLE=False
        )
