"""Whole optimizer steps on lists of leaves, forward and backward: one launch for a list, whatever its length.

Column 0 of the leaves holds the parameters, column 1 the gradients, the others the moments. The backward pass takes
the inputs of the step alone: it makes the new moments again, which costs less than to read them from memory.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from diffopt_kernels.launch import Columns, finish, launch, lay_out, scalar_table
from diffopt_kernels.steps import StepRule

__all__ = ["step", "step_backward", "step_backward_reference", "step_reference"]

Pullback: TypeAlias = tuple[tuple[list[Tensor] | None, ...], list[Tensor] | None]

# Elements a program works on, with 256 threads: 77 and 110 registers a thread for adam in float32, without spills.
FORWARD_WIDTH = 2048
BACKWARD_WIDTH = 1024


def step_reference(
    rule: StepRule, columns: Columns, scalars: Sequence[Tensor], out: Columns | None = None
) -> tuple[list[Tensor], ...]:
    """Reference of `step`.

    Example:
        >>> from diffopt_kernels.steps import SGD
        >>> p, g = [torch.tensor([1.0, 2.0])], [torch.tensor([0.5, -1.0])]
        >>> step_reference(SGD, [p, g], [torch.tensor(0.1, dtype=torch.float64)])
        ([tensor([0.9500, 2.1000])],)
    """
    _check(rule, columns, scalars, out)
    leaves = [rule.reference(*leaf, *_against(scalars, leaf[0])) for leaf in zip(*columns, strict=True)]
    news = tuple([leaf[k] for leaf in leaves] for k in range(rule.moments + 1))
    if out is None:
        return news
    return tuple([o.copy_(new) for o, new in zip(*pair, strict=True)] for pair in zip(out, news, strict=True))


def step(
    rule: StepRule, columns: Columns, scalars: Sequence[Tensor], out: Columns | None = None
) -> tuple[list[Tensor], ...]:
    """Step a whole list of leaves in one launch.

    Args:
        rule: The step, of `diffopt_kernels.steps`.
        columns: Parameters, gradients, then each moment: a list of tensors each, of the same shapes and of one dtype.
            Moments are float32 or float64, all alike. Any strides.
        scalars: The rule's scalars: float64 and on the device of the leaves, each of shape () or (lanes,).
        out: Where to write the new parameters and moments, or None. May be the very inputs, which are then donated.

    Returns:
        The new parameters, then each new moment: fresh tensors, or those of `out`.

    Raises:
        ValueError: If columns or scalars are not as many as the rule's, or do not fit together.
        TypeError: If a dtype is none of those above.
    """
    lanes = _check(rule, columns, scalars, out)
    layout = lay_out(columns, lanes, out)
    kept = [column for j, column in enumerate(columns) if j != 1]
    if not kept[0]:
        return tuple([] for _ in kept)
    outs = [None] * len(kept) if out is None else list(out)
    written = [layout.targets(o, column[0].dtype) for o, column in zip(outs, kept, strict=True)]
    from diffopt_kernels import multi_tensor_kernel

    launch(
        multi_tensor_kernel.step,
        layout,
        [*(layout.laid(column) for column in columns), *written],
        [column[0].dtype for column in (*columns, *kept)],
        scalar_table(scalars, lanes),
        real=_real(columns),
        width=FORWARD_WIDTH,
        RULE=rule.name,
        COLUMNS=len(columns),
        SCALARS=len(scalars),
    )
    return tuple(finish(o, column) for o, column in zip(outs, written, strict=True))


def step_backward_reference(
    rule: StepRule,
    columns: Columns,
    scalars: Sequence[Tensor],
    cotangents: Columns,
    wanted: Sequence[bool],
    scalars_wanted: bool,
) -> Pullback:
    """Reference of `step_backward`: torch differentiates `step_reference`."""
    _check_backward(rule, columns, scalars, cotangents, wanted)

    def flat(columns: Columns, scalars: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        return step_reference(rule, columns, scalars)

    pull_back = torch.func.vjp(flat, [list(column) for column in columns], list(scalars))[1]
    grads, scalar_grads = pull_back(tuple(list(column) for column in cotangents))
    kept = tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return kept, scalar_grads if scalars_wanted else None


def step_backward(
    rule: StepRule,
    columns: Columns,
    scalars: Sequence[Tensor],
    cotangents: Columns,
    wanted: Sequence[bool],
    scalars_wanted: bool,
) -> Pullback:
    """Pull cotangents back through `step` in one launch, from its inputs alone.

    Args:
        rule: As for `step`.
        columns: As for `step`.
        scalars: As for `step`.
        cotangents: One column for each of the outputs of `step`, of its shapes and dtypes.
        wanted: For each column, whether its cotangent is wanted.
        scalars_wanted: Whether those of the scalars are.

    Returns:
        For each column its cotangent, or None where unwanted; and those of the scalars, each in float64 and of the
        shape of the scalar, or None. Sums run in a fixed order, so that equal calls give equal bits.

    Raises:
        ValueError: As for `step`.
        TypeError: As for `step`.
    """
    lanes = _check_backward(rule, columns, scalars, cotangents, wanted)
    layout = lay_out((*columns, *cotangents), lanes)
    dtypes = [column[0].dtype if column else torch.float32 for column in (*columns, *cotangents, *columns)]
    grads = [layout.fresh(dtype) if want else None for dtype, want in zip(dtypes, wanted, strict=False)]
    sums = len(scalars) if scalars_wanted else 0
    if not columns[0] or not (sums or any(wanted)):
        totals = torch.zeros(1 if lanes is None else lanes, sums, dtype=torch.float64, device=scalars[0].device)
    else:
        from diffopt_kernels import multi_tensor_kernel

        totals = launch(
            multi_tensor_kernel.step_backward,
            layout,
            [*(layout.laid(column) for column in (*columns, *cotangents)), *grads],
            dtypes,
            scalar_table(scalars, lanes),
            real=_real(columns),
            width=BACKWARD_WIDTH,
            sums=sums,
            RULE=rule.name,
            COLUMNS=len(columns),
            SCALARS=len(scalars),
            WANTED=sum(bool(want) << j for j, want in enumerate(wanted)),
            SUMS=scalars_wanted,
        )
    if not scalars_wanted:
        return tuple(grads), None
    return tuple(grads), [totals[:, k] if s.ndim else totals[:, k].sum() for k, s in enumerate(scalars)]


def _against(scalars: Sequence[Tensor], leaf: Tensor) -> list[Tensor]:
    return [scalar.reshape(scalar.shape + (1,) * (leaf.ndim - 1)) if scalar.ndim else scalar for scalar in scalars]


def _real(columns: Columns) -> torch.dtype:
    return columns[2][0].dtype if len(columns) > 2 else torch.promote_types(columns[0][0].dtype, torch.float32)


def _check(rule: StepRule, columns: Columns, scalars: Sequence[Tensor], out: Columns | None) -> int | None:
    if len(columns) != rule.moments + 2:
        raise ValueError(
            f"{rule.name} needs {rule.moments + 2} columns (parameters, gradients, moments); got {len(columns)}"
        )
    if out is not None and len(out) != rule.moments + 1:
        raise ValueError(f"{rule.name} writes {rule.moments + 1} columns (parameters, moments); `out` has {len(out)}")
    moments = {leaf.dtype for column in columns[2:] for leaf in column}
    if len(moments) > 1 or not moments.issubset((torch.float32, torch.float64)):
        raise TypeError(f"moments need to be float32 or float64, all alike; got {moments}")
    if len(scalars) != len(rule.scalars):
        raise ValueError(f"{rule.name} needs the scalars {rule.scalars}; got {len(scalars)}")
    if any(scalar.dtype != torch.float64 for scalar in scalars):
        raise TypeError(f"scalars need to be float64; got {[scalar.dtype for scalar in scalars]}")
    devices = {scalar.device for scalar in scalars} | {leaf.device for leaf in columns[0]}
    if len(devices) > 1:
        raise ValueError(f"scalars and leaves need to be on one device; got {devices}. Move the scalars there once.")
    shapes = {tuple(scalar.shape) for scalar in scalars} - {()}
    if len(shapes) > 1 or any(len(shape) > 1 for shape in shapes):
        raise ValueError(f"scalars need shape () or one shape (lanes,); got {[tuple(s.shape) for s in scalars]}")
    return shapes.pop()[0] if shapes else None


def _check_backward(
    rule: StepRule, columns: Columns, scalars: Sequence[Tensor], cotangents: Columns, wanted: Sequence[bool]
) -> int | None:
    lanes = _check(rule, columns, scalars, None)
    if len(wanted) != len(columns):
        raise ValueError(f"`wanted` needs one entry for each of {len(columns)} columns; got {len(wanted)}")
    if len(cotangents) != rule.moments + 1:
        raise ValueError(f"{rule.name} has {rule.moments + 1} output columns; got cotangents of {len(cotangents)}")
    for j, (column, primals) in enumerate(zip(cotangents, (columns[0], *columns[2:]), strict=True)):
        dtypes = {leaf.dtype for leaf in column}, {leaf.dtype for leaf in primals}
        if dtypes[0] != dtypes[1]:
            raise TypeError(f"cotangents need the dtypes of the outputs; column {j} has {dtypes[0]} for {dtypes[1]}")
    return lanes
