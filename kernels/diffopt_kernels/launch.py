"""Launches over lists of leaves: how leaves lie in memory, and the tables that tell a kernel.

A list of leaves is given column by column (the parameters, the gradients, ...), `columns[j][i]` being column j of
leaf i. A launch takes two tables to the device: where each column of each leaf lies, made anew in every call and moved
there in one copy, and which piece of which leaf a program works on, which depends on sizes only and is kept. An
elementwise kernel does not care for the order of elements in memory, so leaves that are dense in any order are used as
they lie; others are copied first.

With lanes, every leaf has a leading dimension of that length, and lane k uses entry k of a batched scalar: this is
how `torch.func.vmap` folds into one launch. The kernel's side of the tables is in `multi_tensor_kernel`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["Columns", "Layout", "finish", "launch", "lay_out", "scalar_table"]

Columns: TypeAlias = Sequence[Sequence[Tensor]]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Layout(NamedTuple):
    """How the columns of a list of leaves lie in memory.

    Attributes:
        shapes: The shape of each leaf.
        strides: The strides that all columns of a leaf have; dense, with lanes outermost.
        lanes: The leading dimension of each leaf, or None.
        device: Where the leaves are.
    """

    shapes: tuple[torch.Size, ...]
    strides: tuple[tuple[int, ...], ...]
    lanes: int | None
    device: torch.device

    def fits(self, i: int, leaf: Tensor) -> bool:
        """Say whether a tensor of the shape of leaf i lies in memory as the columns of leaf i do."""
        if leaf.stride() != self.strides[i]:
            steps = zip(leaf.stride(), self.strides[i], self.shapes[i], strict=True)
            if any(a != b and size != 1 for a, b, size in steps):
                return False
        return not leaf.is_neg()

    def fresh(self, dtype: torch.dtype) -> list[Tensor]:
        """Make a column to write to."""
        return [
            torch.empty_strided(shape, strides, dtype=dtype, device=self.device)
            for shape, strides in zip(self.shapes, self.strides, strict=True)
        ]

    def laid(self, column: Sequence[Tensor]) -> list[Tensor]:
        """Give a column in this layout, copying those leaves that lie otherwise."""
        return [
            leaf if self.fits(i, leaf) else leaf.new_empty_strided(self.shapes[i], self.strides[i]).copy_(leaf)
            for i, leaf in enumerate(column)
        ]

    def targets(self, out: Sequence[Tensor] | None, dtype: torch.dtype) -> list[Tensor]:
        """Make a column to write to: the leaves of `out` that lie as they should, fresh ones for the others."""
        if out is None:
            return self.fresh(dtype)
        return [
            leaf if self.fits(i, leaf) else leaf.new_empty_strided(self.shapes[i], self.strides[i])
            for i, leaf in enumerate(out)
        ]


def lay_out(columns: Columns, lanes: int | None, out: Columns | None = None) -> Layout:
    """Check columns, and decide how each leaf is laid out: as its first column lies, if that is dense.

    Args:
        columns: At least one column.
        lanes: The leading dimension of each leaf, or None.
        out: More columns, to be written.

    Returns:
        The layout.

    Raises:
        ValueError: If columns differ in length, a leaf in shape or device, or a leaf has not `lanes` lanes.
        TypeError: If a column is not of one floating dtype.
    """
    written = () if out is None else tuple(out)
    columns = (*columns, *written)
    if len({len(column) for column in columns}) != 1:
        raise ValueError(f"all columns need one entry for each leaf; got lengths {[len(c) for c in columns]}")
    for j, column in enumerate(columns):
        dtypes = {leaf.dtype for leaf in column}
        if len(dtypes) > 1 or not dtypes.issubset(FLOATS):
            raise TypeError(f"a column needs one dtype of {FLOATS}; column {j} has {dtypes}. Group leaves by dtype.")
    shapes = tuple(leaf.shape for leaf in columns[0])
    for column in columns[1:]:
        for i, leaf in enumerate(column):
            if leaf.shape != shapes[i]:
                raise ValueError(f"the columns of a leaf need one shape; leaf {i} has {shapes[i]} and {leaf.shape}")
    if lanes is not None and any(shape[:1] != (lanes,) for shape in shapes):
        raise ValueError(f"leaves need the leading dimension {lanes} of the scalars; got the shapes {shapes}")
    devices = {leaf.device for column in columns for leaf in column}
    if len(devices) > 1:
        raise ValueError(f"all leaves need to be on one device; got {devices}")
    places = [leaf.data_ptr() for column in written for leaf in column if leaf.numel()]
    if len(set(places)) < len(places):
        raise ValueError("`out` names some memory twice, so a tied leaf would be stepped twice; give each leaf once")
    strides = tuple(_strides(leaf, lanes) for leaf in columns[0])
    return Layout(shapes, strides, lanes, devices.pop() if devices else torch.device("cpu"))


def scalar_table(scalars: Sequence[Tensor], lanes: int | None) -> Tensor:
    """Stack scalars on the device: float64, shape (lanes or 1, scalars)."""
    if lanes is None or all(scalar.ndim == 0 for scalar in scalars):
        return torch.stack(list(scalars)).double()[None]
    return torch.stack([scalar.expand(lanes) for scalar in scalars], dim=1).double()


def launch(
    kernel: Any,
    layout: Layout,
    columns: Sequence[Sequence[Tensor] | None],
    dtypes: Sequence[torch.dtype],
    scalars: Tensor,
    *,
    real: torch.dtype,
    width: int,
    sums: int = 0,
    sum_dtype: torch.dtype = torch.float64,
    **constants: Any,
) -> Tensor:
    """Run a kernel once over a list of leaves.

    Args:
        kernel: A kernel with the arguments of `multi_tensor_kernel.step`.
        layout: How all columns lie.
        columns: What the kernel reads and writes; None for a column that it leaves alone.
        dtypes: The dtype of each column.
        scalars: Shape (lanes or 1, n), from `scalar_table`.
        real: The dtype to compute in.
        width: How many elements a program works on, on a GPU.
        sums: How many sums each program makes.
        sum_dtype: Their dtype.
        constants: The kernel's own constants.

    Returns:
        The sums over all leaves, shape (lanes or 1, sums), added up in a fixed order.
    """
    import triton  # costs 0.3 s to import
    import triton.language as tl

    device, lanes = layout.device, 1 if layout.lanes is None else layout.lanes
    sizes = tuple(shape.numel() // max(lanes, 1) for shape in layout.shapes)
    if not any(sizes) or lanes == 0:
        return torch.zeros(lanes, sums, dtype=sum_dtype, device=device)
    on_gpu = device.type == "cuda"
    # On the CPU, where only the interpreter runs, a program costs milliseconds whatever its size.
    block = width if on_gpu else triton.next_power_of_2(min(max(sizes), 1 << 17))
    work = _work_table(sizes, block, device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0)
    partials = torch.empty(lanes, len(work), sums, dtype=sum_dtype, device=device)
    names = tuple(getattr(tl, str(dtype).removeprefix("torch.")) for dtype in (*dtypes, real))
    with torch.cuda.device_of(scalars):
        kernel[(lanes * len(work),)](
            _pointer_table(columns, device),
            work,
            scalars,
            partials,
            len(work),
            0 if len(scalars) == 1 else scalars.shape[1],
            DTYPES=names[:-1],
            REAL=names[-1],
            BLOCK=block,
            num_warps=8,
            enable_fp_fusion=False,  # round as the references do
            **constants,
        )
    return partials.sum(1)


def finish(out: Sequence[Tensor] | None, written: list[Tensor]) -> list[Tensor]:
    """Give `out` the values that were written, and tell autograd that it changed."""
    if out is None:
        return written
    for leaf, value in zip(out, written, strict=True):
        if leaf is value:
            torch.autograd.graph.increment_version(leaf)
        else:
            leaf.copy_(value)
    return list(out)


def _strides(leaf: Tensor, lanes: int | None) -> tuple[int, ...]:
    if leaf.is_contiguous():
        return leaf.stride()
    elements = 1
    for stride, size in sorted(zip(leaf.stride(), leaf.shape, strict=True)):
        dense = size == 1 or stride == elements
        if not dense:
            break
        elements *= size
    else:
        if lanes in (None, 1) or leaf.stride(0) * lanes == leaf.numel():
            return leaf.stride()
    return torch.empty(leaf.shape, device="meta").stride()


@functools.lru_cache(maxsize=64)
def _work_table(sizes: tuple[int, ...], width: int, device: torch.device, stream: int) -> Tensor:
    """List the programs of a lane: leaf, first element, elements in the lane of that leaf; int64, shape (programs, 3).

    The stream is part of the key, since a table is safe to read, and its memory to take back, on its own stream only.
    """
    del stream
    elements = torch.tensor(sizes, device="cpu")
    programs = (elements + width - 1) // width
    leaf = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), programs)
    block = torch.arange(len(leaf), device="cpu") - (programs.cumsum(0) - programs)[leaf]
    return torch.stack((leaf, block * width, elements[leaf]), dim=1).to(device)


def _pointer_table(columns: Sequence[Sequence[Tensor] | None], device: torch.device) -> Tensor:
    leaves = next(len(column) for column in columns if column is not None)
    rows = [[0] * leaves if column is None else [leaf.data_ptr() for leaf in column] for column in columns]
    table = torch.tensor([list(row) for row in zip(*rows, strict=True)], dtype=torch.int64, device="cpu")
    return table.to(device, non_blocking=True)
