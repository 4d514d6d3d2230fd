"""Steps on the CPU, block by block: leaves are put together, or taken alone, until a block fills the cache.

A block is one flat vector a column, so a step costs the same number of operations whatever the number of leaves. Its
body is the rule's readable reference, compiled for all lengths at once where the tree is large, else as it stands.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.autodiff import compiled_body, vjp
from diffopt.autodiff.fused_op import shaped
from diffopt_kernels.steps import StepRule

__all__ = ["COMPILE_FROM", "step", "step_backward", "step_in_place"]

COMPILE_FROM = 1 << 18
"""Trees of at least this many entries take a compiled body."""

BLOCK = 1 << 18
"""Leaves are put together up to this many entries."""

PIECE = 1 << 18
"""What is not compiled is done so many entries at a time."""

Columns = Sequence[Sequence[Tensor]]


def step(rule: StepRule, columns: Columns, scalars: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    """Step all leaves; see `StepRule` and `fused_op` for the arguments.

    Args:
        rule: The step.
        columns: Lists of plain parameters, gradients and moments.
        scalars: The rule's scalars, float64, 0-d or one entry a lane.

    Returns:
        The new parameters and moments, fresh.
    """
    out: list[list[Tensor]] = [[] for _ in range(1 + rule.moments)]
    size, lanes = _size(columns), _lanes(scalars)
    for block in _blocks(columns[0]):
        rows = [_gather([column[i] for i in block], lanes) for column in columns]
        found = _run(_forward_body(rule), size, rows, _beside(scalars, lanes))
        for column, new in zip(out, found, strict=True):
            column += _scatter(new, [columns[0][i] for i in block])
    return tuple(out)


def step_in_place(rule: StepRule, columns: Columns, scalars: Sequence[Tensor]) -> None:
    """Step all leaves, writing over the parameters and moments.

    Args:
        rule: The step.
        columns: Lists of plain parameters, gradients and moments.
        scalars: The rule's scalars, float64 and 0-d.
    """
    size, memory = _size(columns), (columns[0], *columns[2:])
    for block in _blocks(columns[0]):
        leaves = [[column[i] for i in block] for column in columns]
        if len(block) == 1 and all(leaf.is_contiguous() for (leaf,) in leaves):
            _run(_in_place_body(rule), size, [leaf.view(-1) for (leaf,) in leaves], scalars)
            continue
        found = _run(_forward_body(rule), size, [_gather(column, None) for column in leaves], scalars)
        for column, new in zip(memory, found, strict=True):
            for i, piece in zip(block, _scatter(new, [columns[0][i] for i in block]), strict=True):
                column[i].copy_(piece)


def step_backward(
    rule: StepRule,
    columns: Columns,
    scalars: Sequence[Tensor],
    cotangents: Columns,
    wanted: tuple[bool, ...],
    scalars_wanted: bool,
) -> tuple[tuple[list[Tensor] | None, ...], list[Tensor] | None]:
    """Give the cotangents of a step's columns and scalars; see `fused_op` for the arguments.

    Args:
        rule: The step.
        columns: Lists of plain parameters, gradients and moments.
        scalars: The rule's scalars, float64, 0-d or one entry a lane.
        cotangents: Those of the new parameters and moments.
        wanted: Which columns need theirs.
        scalars_wanted: Whether the scalars need theirs.

    Returns:
        The columns' cotangents, None where not wanted, and the scalars'.
    """
    out: list[list[Tensor] | None] = [[] if w else None for w in wanted]
    sums = [torch.zeros_like(s) for s in scalars] if scalars_wanted else None
    size, lanes = _size(columns), _lanes(scalars)
    given = tuple(not _are_zero(column) for column in cotangents)
    given = given if any(given) else (True,) * len(given)
    body = _backward_body(rule, wanted, scalars_wanted, given)
    seeds = [column for column, g in zip(cotangents, given, strict=True) if g]
    # Steps are linear in the parameters: only the scalars' cotangents look at their values.
    values = columns if scalars_wanted or not given[0] else columns[1:]
    for block in _blocks(columns[0]):
        rows = [_gather([column[i] for i in block], lanes) for column in (*values, *seeds)]
        if values is not columns:
            rows.insert(0, rows[len(values)])
        found = iter(_run(body, size, rows, _beside(scalars, lanes)))
        for column in out:
            if column is not None:
                column += _scatter(next(found), [columns[0][i] for i in block])
        if sums is not None:
            sums = [total + part.reshape(total.shape) for total, part in zip(sums, found, strict=True)]
    return tuple(out), sums


def _run(body: Callable[..., Any], size: int, rows: Sequence[Tensor], scalars: Sequence[Tensor]) -> Any:
    """Run a body on rows of a block: compiled where the tree is large, else piece by piece, to stay in cache."""
    if size >= COMPILE_FROM and rows[0].is_cpu:
        found = compiled_body.run(body, *rows, *scalars, dynamic=True)
        if found is not None:
            return found
    if rows[0].ndim > 1 or len(rows[0]) <= PIECE:
        return body(*rows, *scalars)
    whole: list[Tensor] = []
    for k, pieces in enumerate(zip(*(row.split(PIECE) for row in rows), strict=True)):
        found = body(*pieces, *scalars)
        if found is True:
            continue
        if k == 0:
            whole = [x.new_empty(len(rows[0])) if x.ndim else torch.zeros_like(x) for x in found]
        for out, x in zip(whole, found, strict=True):
            if x.ndim:
                out[k * PIECE : k * PIECE + len(x)] = x
            else:
                out += x
    return whole


@functools.cache
def _forward_body(rule: StepRule) -> Callable[..., tuple[Tensor, ...]]:
    def forward(*values: Tensor) -> tuple[Tensor, ...]:
        return rule.reference(*values)

    return forward


@functools.cache
def _in_place_body(rule: StepRule) -> Callable[..., bool]:
    def in_place(*values: Tensor) -> bool:
        p, *new = rule.reference(*values)
        values[0].copy_(p)
        for old, moment in zip(values[2 : 2 + rule.moments], new, strict=True):
            old.copy_(moment)
        return True

    return in_place


@functools.cache
def _backward_body(
    rule: StepRule, wanted: tuple[bool, ...], scalars_wanted: bool, given: tuple[bool, ...]
) -> Callable[..., tuple[Tensor, ...]]:
    width, seeds = 2 + rule.moments, sum(given)
    chosen = (*wanted, *(scalars_wanted,) * len(rule.scalars))

    def by_hand(*values: Tensor) -> tuple[Tensor, ...]:
        seeds_given = iter(values[width : width + seeds])
        cotangents = [next(seeds_given) if g else None for g in given]
        found = rule.backward(*values[1:width], *values[width + seeds :], *cotangents)  # pyright: ignore
        return tuple(x for x, w in zip(found, wanted, strict=True) if w)

    if rule.backward is not None and given[0] and not scalars_wanted:
        return by_hand

    def backward(*values: Tensor) -> tuple[Tensor, ...]:
        inputs, cotangents = (*values[:width], *values[width + seeds :]), iter(values[width : width + seeds])

        def part(*primals: Tensor) -> tuple[Tensor, ...]:
            primal = iter(primals)
            outputs = rule.reference(*(next(primal) if c else x for x, c in zip(inputs, chosen, strict=True)))
            return tuple(o for o, g in zip(outputs, given, strict=True) if g)

        return vjp(part, *(x for x, c in zip(inputs, chosen, strict=True) if c))[1](*cotangents)

    return backward


def _size(columns: Columns) -> int:
    return sum(map(Tensor.numel, columns[0]))


def _lanes(scalars: Sequence[Tensor]) -> int | None:
    return next((s.shape[0] for s in scalars if s.ndim), None)


def _beside(scalars: Sequence[Tensor], lanes: int | None) -> Sequence[Tensor]:
    """The scalars, shaped to broadcast against flat blocks."""
    return scalars if lanes is None else [s.unsqueeze(-1) if s.ndim else s for s in scalars]


def _blocks(leaves: Sequence[Tensor]) -> Iterator[list[int]]:
    """Runs of leaves, each as long as it may be for its entries to stay below the size of a block."""
    block: list[int] = []
    entries = 0
    for i, leaf in enumerate(leaves):
        if block and entries + leaf.numel() > BLOCK:
            yield block
            block, entries = [], 0
        block.append(i)
        entries += leaf.numel()
    if block:
        yield block


def _gather(leaves: Sequence[Tensor], lanes: int | None) -> Tensor:
    shape = (-1,) if lanes is None else (lanes, -1)
    rows = [leaf.reshape(*shape[:-1], leaf.numel() // (lanes or 1)) for leaf in leaves]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)


def _scatter(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    if len(like) == 1:
        return [shaped(flat, like[0].shape)]
    sizes = [leaf.numel() // (flat.shape[0] if flat.ndim > 1 else 1) for leaf in like]
    return [shaped(x, leaf.shape) for x, leaf in zip(torch.unsafe_split_with_sizes(flat, sizes, -1), like, strict=True)]


def _are_zero(cotangents: Sequence[Tensor]) -> bool:
    """Whether all cotangents are one 0, expanded: what autograd gives for outputs that nobody used."""
    if any(any(x.stride()) for x in cotangents):
        return False
    heads = {x.data_ptr(): x for x in cotangents if x.numel()}
    return all(not x.flatten()[0] for x in heads.values())
