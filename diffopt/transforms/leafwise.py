"""A transformation from a rule for one leaf: how most of them are written."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.leaves import as_dtype, flatten_floating, flatten_like, precise_dtype, zero_count
from diffopt.typing import Numeric, Tree

__all__ = ["bias_correction", "leafwise", "need_params"]


def leafwise(
    state_type: Callable[..., Any],
    rule: Callable[..., tuple[Tensor, ...]],
    scalars: Callable[[Any], tuple[Numeric, ...]],
    *,
    initial: Numeric = 0.0,
    takes_params: str = "",
) -> GradientTransformation:
    """Make a transformation whose state is, but for a count, trees like the parameters.

    Args:
        state_type: A NamedTuple of trees; if its first field is ``count``, steps are counted there.
        rule: ``rule(g, *slots, *scalars) -> (update, *slots)`` on tensors of one leaf, in its precise dtype; with
            `takes_params`, the parameter comes after g.
        scalars: From the count (None without one) to what the rule takes last, cast to the leaf's dtype.
        initial: The value with which the last slot is filled; the others with 0.
        takes_params: The name by which the error calls the transformation where update gets no params.

    Returns:
        The transformation.

    Example:
        >>> from diffopt.transforms.trace import TraceState
        >>> decay = leafwise(TraceState, lambda g, m, gamma: (gamma * m + g,) * 2, lambda count: (0.5,))
        >>> decay.update(torch.ones(1), decay.init(torch.ones(1)))
        (tensor([1.]), TraceState(trace=tensor([1.])))
    """
    fields: tuple[str, ...] = getattr(state_type, "_fields", ())
    counted = fields[:1] == ("count",)
    slots = fields[counted:]

    def init(params: Tree) -> Any:
        leaves, treespec = flatten_floating(params, "params")
        trees = []
        for i in range(len(slots)):
            new = [torch.zeros_like(leaf, dtype=precise_dtype(leaf.dtype)) for leaf in leaves]
            if i == len(slots) - 1:
                new = [leaf + as_dtype(initial, leaf.dtype) for leaf in new]
            trees.append(tree.unflatten(treespec, new))
        return state_type(*[zero_count(leaves)] * counted, *trees)

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> tuple[Tree, Any]:
        grads, treespec = flatten_floating(updates, "updates")
        columns = [flatten_like(getattr(state, name), grads, treespec, name=f"state.{name}") for name in slots]
        dtypes = [x.dtype for x in columns[0]] if columns else [precise_dtype(g.dtype) for g in grads]
        if takes_params:
            columns.insert(0, flatten_like(need_params(params, takes_params), grads, treespec, name="params"))
        count = state.count + 1 if counted else None
        values = scalars(count)
        cast = {dtype: tuple(as_dtype(value, dtype) for value in values) for dtype in dtypes}
        rows = []
        for dtype, g, *memory in zip(dtypes, grads, *columns, strict=True):
            out, *memory = rule(g.to(dtype), *(m.to(dtype) for m in memory), *cast[dtype])
            rows.append((out.to(g.dtype), *memory))
        new = [tree.unflatten(treespec, [row[i] for row in rows]) for i in range(len(slots) + 1)]
        return new[0], state_type(*[count] * counted, *new[1:])

    return GradientTransformation(init, update)


def bias_correction(decay: Numeric, count: Tensor) -> Tensor:
    """Give 1 - decay^count, in float64: in float32, 1 - 0.999 is already wrong in the fifth digit."""
    return 1 - as_dtype(decay, torch.float64) ** count.to(torch.float64)


def need_params(params: Tree | None, name: str) -> Tree:
    """Give the parameters, or raise where update got none."""
    if params is None:
        raise ValueError(f"`{name}` needs the parameters: call update(grads, state, params), or `step`.")
    return params
