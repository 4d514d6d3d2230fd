"""Make a fused kernel a differentiable operator, so that no kernel needs to know autograd."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt.autodiff.custom_derivative import Rules, Tensors, by_rule, refuse_captures, rules_of

__all__ = ["Launch", "Layout", "fold", "fused_by_rule", "fused_op", "shaped"]

Columns: TypeAlias = Sequence[Sequence[Tensor]]
Forward: TypeAlias = Callable[[Columns, Sequence[Tensor]], Sequence[Sequence[Tensor]]]
Backward: TypeAlias = Callable[..., tuple[Sequence[Sequence[Tensor] | None], Sequence[Tensor] | None]]


def fused_op(
    reference: Callable[..., Tensors], forward: Forward, backward: Backward | None = None
) -> Callable[..., tuple[list[Tensor], ...]]:
    r"""Give a fused launcher, which takes all leaves of a tree at once, the derivatives of its readable reference.

    .. math:: y_i = f(x_i, h), \qquad (\bar x_i, \bar h) = \left(v_i^\top \partial_x f(x_i, h),
        \textstyle\sum_i v_i^\top \partial_h f(x_i, h)\right)

    The columns :math:`x = (x^1, x^2, \ldots)` are lists over the leaves i, such as parameters, gradients and moments;
    all columns of a leaf have one shape, and f is elementwise in them. The scalars h are shared by the leaves. The
    forward launcher computes f and the backward launcher its cotangents; every further derivative (double backward,
    jvp) is that of the plain formula of the reference. `vmap` folds the batch into the launch.

    Args:
        reference: `(*columns of one leaf, *scalars) -> outputs` in plain torch, elementwise, the outputs shaped like
            the leaf. Its scalars broadcast against the columns.
        forward: `(columns, scalars) -> outputs`, lists over the leaves, fused. It sees plain tensors and returns fresh
            ones. Scalars are 0-d, or some are of shape `(lanes,)`: then every leaf has a leading dimension of lanes,
            and lane k takes entry k.
        backward: `(columns, scalars, cotangents, wanted, scalars_wanted) -> (column cotangents, scalar cotangents)`,
            where `wanted` tells which columns need one (None serves the others) and a cotangent may be expanded from
            one 0. That of a scalar has its shape. None takes the plain formula.

    Returns:
        A function `(columns, scalars=()) -> outputs`, lists over the leaves. Under `torch.compile` it is the reference.

    Raises:
        ValueError: when called, if columns differ in length or shape, a scalar has dimensions, or a function captured
            a tensor that carries gradient or a batch dimension.
        TypeError: when called, if a tensor is not floating-point.

    Example:
        >>> def halve(p, g, rate):
        ...     return (p - rate * g / 2,)
        >>> step = fused_op(halve, lambda columns, scalars: ([p - scalars[0] * g / 2 for p, g in zip(*columns)],))
        >>> loss = lambda rate: step([[torch.tensor(3.0)], [torch.tensor(1.0)]], [rate])[0][0] ** 2
        >>> torch.func.grad(loss)(torch.tensor(2.0))
        tensor(-2.)
    """

    op = fused_by_rule(reference, forward, backward)

    def checked(columns: Columns, scalars: Sequence[Tensor] = ()) -> tuple[list[Tensor], ...]:
        _check(columns, scalars)
        firsts = [column[0] for column in columns if column]
        refuse_captures(reference, forward, backward, inputs=(*firsts, *scalars))
        return op(columns, scalars)

    return checked


def fused_by_rule(
    reference: Callable[..., Tensors], forward: Forward, backward: Backward | None = None
) -> Callable[..., tuple[list[Tensor], ...]]:
    """`fused_op` for functions that are known to capture nothing tracked, and arguments that are known to fit."""

    def op(columns: Columns, scalars: Sequence[Tensor] = ()) -> tuple[list[Tensor], ...]:
        leaves = len(columns[0])
        if leaves == 0:
            return tuple(list(column) for column in forward(columns, scalars))
        layout = Layout(leaves, len(columns), len(scalars))
        outputs = _operator(reference, forward, backward, layout)(*_flatten(columns), *scalars)
        return tuple(layout.lists(outputs))

    return op


class Layout(NamedTuple):
    """How flat tensors stand for columns over leaves, one column after the other, and then scalars."""

    leaves: int
    width: int
    scalars: int

    def lists(self, values: Sequence[Tensor]) -> list[list[Tensor]]:
        return [list(values[i : i + self.leaves]) for i in range(0, len(values), self.leaves)]

    def split(self, values: Sequence[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
        end = len(values) - self.scalars
        return self.lists(values[:end]), list(values[end:])


def _operator(
    reference: Callable[..., Tensors], forward: Forward, backward: Backward | None, layout: Layout
) -> Callable[..., Tensors]:
    """The operator of the flat columns and scalars."""

    def plain(*inputs: Tensor) -> Tensors:
        columns, scalars = layout.split(inputs)
        rows = [reference(*row, *scalars) for row in zip(*columns, strict=True)]
        return tuple(row[i] for i in range(len(rows[0])) for row in rows)

    plain_vjp, plain_jvp = rules_of(plain)

    def vjp(inputs, outputs, cotangents, wanted):
        columns_wanted = tuple(any(column) for column in layout.lists(wanted[: layout.leaves * layout.width]))
        scalars_wanted = any(wanted[layout.leaves * layout.width :])
        chosen = [w for w in columns_wanted for _ in range(layout.leaves)] + [scalars_wanted] * layout.scalars

        def formula(*values: Tensor) -> Tensors:
            columns, scalars = layout.split(values)
            primals, seeds = _flatten(columns[: layout.width]), _flatten(columns[layout.width :])
            found = plain_vjp((*primals, *scalars), None, tuple(seeds), chosen)
            return tuple(f for f, c in zip(found, chosen, strict=True) if c)

        own = layout.leaves * layout.width
        values = (*inputs[:own], *cotangents, *inputs[own:])
        primal, batching = formula, "vmap"
        if backward is not None:
            launch = functools.partial(_launch_backward, backward, layout.width, columns_wanted, scalars_wanted)
            primal, batching = Launch(launch, layout, layout.scalars * scalars_wanted), fold
        found = iter(by_rule(Rules(primal, *rules_of(formula), batching, forgets_outputs=True))(*values))
        return tuple(next(found) if c else None for c in chosen)

    def launch(columns: Columns, scalars: Sequence[Tensor]) -> Tensors:
        return tuple(_flatten(forward(columns, scalars)))

    return by_rule(Rules(Launch(launch, layout, 0), vjp, plain_jvp, fold, forgets_outputs=True), plain)


def _launch_backward(
    backward: Backward, width: int, wanted: tuple[bool, ...], scalars_wanted: bool, columns: Columns, scalars: Any
) -> Tensors:
    """The cotangents that are wanted, flat; the columns are those of the operator and then the cotangents."""
    found, sums = backward(columns[:width], scalars, columns[width:], wanted, scalars_wanted)
    kept = [x for column, w in zip(found, wanted, strict=True) if w for x in column or ()]
    return (*kept, *(sums or () if scalars_wanted else ()))


def fold(primal: Any, dims: tuple[int | None, ...], size: int) -> "Launch":
    """The batching rule that puts all lanes into one launch."""
    return primal._replace(levels=((dims, size), *primal.levels))


class Launch(NamedTuple):
    """A launcher of flat inputs over the lanes of any number of vmaps, outermost first.

    Its last `sums` outputs are cotangents of the scalars, one a lane; the others have the shapes of the leaves.
    """

    launcher: Callable[[Columns, Sequence[Tensor]], Tensors]
    layout: Layout
    sums: int
    levels: tuple[tuple[tuple[int | None, ...], int], ...] = ()

    def __call__(self, *inputs: Tensor) -> Tensors:
        if not self.levels:
            return self.launcher(*self.layout.split(inputs))
        sizes = tuple(size for _, size in self.levels)
        columns, scalars = self.layout.split([self._lanes_first(x, i) for i, x in enumerate(inputs)])
        shapes = [x.shape for x in columns[0]]
        first = len(inputs) - self.layout.scalars
        if self.sums or any(dim is not None for dims, _ in self.levels for dim in dims[first:]):
            lanes = math.prod(sizes)
            columns = [[x.reshape(lanes, *x.shape[len(sizes) :]) for x in column] for column in columns]
            scalars = [s.reshape(lanes) for s in scalars]
        else:
            scalars = list(inputs[first:])
        outputs = self.launcher(columns, scalars)
        shapes = shapes * ((len(outputs) - self.sums) // self.layout.leaves) + [sizes] * self.sums
        return tuple(shaped(o, s) for o, s in zip(outputs, shapes, strict=True))

    def _lanes_first(self, x: Tensor, place: int) -> Tensor:
        for k, (dims, size) in enumerate(self.levels):
            dim = dims[place]
            x = x.unsqueeze(k).expand(*x.shape[:k], size, *x.shape[k:]) if dim is None else x.movedim(dim + k, k)
        return x


def shaped(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A fresh tensor in another shape, not marked as a view: autograd restricts views that a Function returns."""
    if tensor.shape == shape and tensor.is_contiguous():
        return tensor
    return torch.ops.aten._unsafe_view.default(tensor.contiguous(), shape)


def _flatten(columns: Columns) -> list[Tensor]:
    return [x for column in columns for x in column]


def _check(columns: Columns, scalars: Sequence[Tensor]) -> None:
    if not columns or any(len(column) != len(columns[0]) for column in columns):
        raise ValueError(f"fused_op needs columns of one length; got {[len(column) for column in columns]}")
    for i, row in enumerate(zip(*columns, strict=True)):
        if any(x.shape != row[0].shape for x in row):
            raise ValueError(f"the columns of leaf {i} differ in shape: {[tuple(x.shape) for x in row]}")
    if any(s.ndim for s in scalars):
        raise ValueError(f"fused_op needs 0-d scalars; got shapes {[tuple(s.shape) for s in scalars]}")
    if not all(x.is_floating_point() for x in (*_flatten(columns), *scalars)):
        raise TypeError("fused_op needs floating-point columns and scalars")
