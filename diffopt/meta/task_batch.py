r"""`task_batch`: one function over all tasks of a batch, in memory that chunks bound.

.. math:: \frac1T \sum_{i=1}^T f(\theta, \mathcal T_i)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from diffopt import tree
from diffopt.autodiff import checkpoint
from diffopt.schedules.hyperparameters import check_count
from diffopt.typing import Tree

__all__ = ["check_pair", "count_tasks", "task_batch", "task_mean"]


def task_mean(values: Tree) -> Tree:
    """Take the mean over tasks.

    Args:
        values: A tree of tensors, each with the tasks as its first dimension.

    Returns:
        A tree of their means; leaves that are not floating-point, such as counts, give their maximum.

    Example:
        >>> task_mean({"loss": torch.tensor([1.0, 3.0]), "count": torch.tensor([2, 2])})
        {'loss': tensor(2.), 'count': tensor(2)}
    """
    leaves, treespec = tree.flatten(values)
    exact = [leaf.mean(0) if leaf.is_floating_point() or leaf.is_complex() else leaf.amax(0) for leaf in leaves]
    return tree.unflatten(treespec, exact)


def task_batch(
    fn: Callable[..., Tree],
    *,
    in_dims: int | Sequence[int | None] = 0,
    chunk_size: int | None = None,
    reduce: Callable[[Tree], Tree] | None = task_mean,
) -> Callable[..., Tree]:
    r"""Make a function of one task a function of a batch of tasks.

    .. math:: \text{reduce}\big(f(\theta, \mathcal T_1), \dots, f(\theta, \mathcal T_T)\big)

    All tasks run at once, under `torch.func.vmap`. With `chunk_size`, so many at a time, and each chunk is computed
    again in the backward pass: memory is that of one chunk, under `diffopt.grad` and `.backward()` (see `checkpoint`).
    In compiled code chunks bound nothing that the compiler does not.

    Args:
        fn: A function of trees that returns a tree of tensors; leaves of arguments that are not tensors are shared.
        in_dims: For each argument the dimension of its tensors over which tasks run, or None if all tasks share it: as
            `(None, 0)` for `fn(params, task)` with shared initial parameters, `(0, 0)` for parameters of each task.
        chunk_size: The most tasks at a time; None runs all at once.
        reduce: From the results of all tasks, stacked in the first dimension, to what is returned; None returns them as
            they are. Where tasks are spread over ranks, whose gradients are then summed: `lambda v: v.sum() / total`.

    Returns:
        A function of the arguments of `fn`.

    Raises:
        TypeError: If `fn` returns a leaf that is not a tensor, or `reduce` is no function.
        ValueError: If `in_dims` does not fit, there are no tasks, or tensors differ in their number; the message names
            the leaf.

    Example:
        >>> loss = lambda w, task: ((w - task["target"]) ** 2).sum()
        >>> tasks = {"target": torch.tensor([[1.0, 2.0], [3.0, 2.0]])}
        >>> task_batch(loss, in_dims=(None, 0))(torch.zeros(2), tasks)
        tensor(9.)
    """
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if reduce is not None and not callable(reduce):
        raise TypeError(f"`reduce` must be a function of the stacked results, or None; got {type(reduce).__name__}.")

    @functools.wraps(fn)
    def batched(*args: Any) -> Tree:
        dims = _dims(in_dims, len(args))
        size = count_tasks(args, "args", dims)
        flat, merge = tree.partition(args)
        flat_dims = [d for arg, d in zip(args, dims, strict=True) for _ in tree.partition(arg)[0]]
        if chunk_size is None or size <= chunk_size:
            out, spec = _run(fn, merge, flat_dims, flat)
        else:
            out, spec = _chunked(fn, merge, flat_dims, flat, size, chunk_size)
        results = tree.unflatten(spec, out)
        return results if reduce is None else reduce(results)

    return batched


def _run(fn, merge, dims, flat):
    """The leaves of all results, stacked, and their structure."""
    spec = None

    def lane(*flat):
        nonlocal spec
        leaves, spec = tree.flatten(fn(*merge(flat)))
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"a function of a task must return tensors; found {type(leaf).__name__}.")
        return tuple(leaves)

    try:
        out = vmap(lane, in_dims=tuple(dims))(*flat)
    except RuntimeError as error:
        if "called random operation" not in str(error):
            raise
        raise RuntimeError(
            "a function of a task draws from torch's global generator, as nn.Dropout does, and all tasks run at once: "
            "draw from a key instead, by diffopt.random"
        ) from error
    assert spec is not None
    return list(out), spec


def _chunked(fn, merge, dims, flat, size, chunk_size):
    spec = None

    def chunk(*flat):
        nonlocal spec
        out, spec = _run(fn, merge, dims, flat)
        return tuple(out)

    parts = []
    for start in range(0, size, chunk_size):
        length = min(chunk_size, size - start)
        rows = [t if d is None else t.narrow(d, start, length) for t, d in zip(flat, dims, strict=True)]
        parts.append(checkpoint(chunk)(*rows))
    assert spec is not None
    return [torch.cat(column) for column in zip(*parts, strict=True)], spec


def count_tasks(args: Sequence[Any], name: str, dims: Sequence[int | None]) -> int:
    """Count the tasks of arguments, and check that all their tensors agree."""
    mapped = [(i, dim) for i, dim in enumerate(dims) if dim is not None]
    found = [(i, j, dim, leaf) for i, dim in mapped for j, leaf in enumerate(tree.partition(args[i])[0])]
    if not found:
        raise ValueError(f"no tensor of `{name}` runs over tasks: give it tensors, and `in_dims` that names one.")
    for i, j, dim, leaf in found:
        if not -leaf.ndim <= dim < leaf.ndim:
            path = _path(name, args, i, j)
            raise ValueError(f"`{path}` must have tasks in dimension {dim}; got shape {tuple(leaf.shape)}.")
    first, other, dim, leaf = found[0]
    size = leaf.shape[dim]
    for i, j, dim, leaf in found:
        if leaf.shape[dim] != size:
            raise ValueError(
                f"all tensors must hold as many tasks: `{_path(name, args, first, other)}` has {size}, "
                f"`{_path(name, args, i, j)}` has {leaf.shape[dim]} in dimension {dim}."
            )
    if size == 0:
        raise ValueError(f"the batch of tasks is empty: `{_path(name, args, first, other)}` has none.")
    return size


def check_pair(in_dims: Any) -> None:
    """Check the `in_dims` of what is a function of (params, tasks)."""
    if not isinstance(in_dims, (tuple, list)) or len(in_dims) != 2:
        raise ValueError(
            "`in_dims` must be a pair, the dimensions of (params, tasks) over which tasks run, such as (None, 0) or "
            f"(0, 0); got {in_dims!r:.60}."
        )
    _dims(in_dims, 2)


def _path(name: str, args: Sequence[Any], index: int, leaf: int) -> str:
    """The expression of one tensor among the leaves of an argument."""
    arg = args[index]
    places = [path for path, value in zip(tree.paths(arg), tree.leaves(arg), strict=True) if isinstance(value, Tensor)]
    return f"{name}{f'[{index}]' if len(args) > 1 else ''}{places[leaf]}"


def _dims(in_dims: int | Sequence[int | None], count: int) -> list[int | None]:
    dims: list[int | None] = [in_dims] * count if isinstance(in_dims, int) else list(in_dims)
    if len(dims) != count:
        raise ValueError(f"`in_dims` must have an entry for each of {count} arguments; got {in_dims!r}.")
    if any(d is not None and (not isinstance(d, int) or isinstance(d, bool)) for d in dims):
        raise ValueError(f"`in_dims` must hold ints and None; got {in_dims!r}.")
    return dims
