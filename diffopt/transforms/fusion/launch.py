"""Where a fused step runs: the one place that decides.

CUDA tensors take one launch of the Triton kernel. On the CPU, torch's own fused functions take lists of leaves where
they have the rule and no derivative is asked for; everything else runs block by block, compiled where the tree is
large. Each way gives the same numbers to rounding.
"""

import functools
import importlib.util
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffopt.autodiff import compiled_body
from diffopt.autodiff.fused_op import fused_by_rule
from diffopt.autodiff.levels import transforms_active
from diffopt.transforms.fusion import blocks, torch_fused
from diffopt.transforms.leafwise import bias_correction
from diffopt.typing import Numeric
from diffopt_kernels import multi_tensor
from diffopt_kernels.steps import StepRule

__all__ = ["by_torch", "differentiable_step", "plain_step"]

Columns = Sequence[Sequence[Tensor]]


def plain_step(
    rule: StepRule, columns: Columns, scalars: Mapping[str, Numeric], count: Tensor | None, *, donate: bool
) -> Sequence[Sequence[Tensor]]:
    """Step all leaves where no derivative can be asked for.

    Args:
        rule: The step.
        columns: Lists of plain parameters, gradients and moments, each of one dtype and device.
        scalars: The rule's scalars by name; Adam's corrections follow from the count.
        count: The count of steps, this one included, where the rule has one.
        donate: Whether to write over the parameters and moments.

    Returns:
        The new parameters and moments; with donate, the same tensors.
    """
    written = (columns[0], *columns[2:])
    if by_kernel(columns[0]):
        out = written if donate else None
        return multi_tensor.step(rule, columns, _tensors(rule, scalars, count, columns), out)
    if by_torch(rule, columns, scalars):
        return (_by_torch_in_place if donate else _by_torch)(rule, columns, scalars, count)
    if not donate:
        return blocks.step(rule, columns, _tensors(rule, scalars, count, columns))
    blocks.step_in_place(rule, columns, _tensors(rule, scalars, count, columns))
    return written


def by_torch(rule: StepRule, columns: Columns, scalars: Mapping[str, Numeric]) -> bool:
    """Tell whether a step without derivative goes to torch's own fused function.

    Args:
        rule: The step.
        columns: Lists of plain parameters, gradients and moments, each of one dtype and device.
        scalars: The rule's scalars by name.

    Returns:
        A bool: on the CPU and where torch has the rule, but for a large flat vector, which takes a compiled body.
    """
    first = columns[0][0]
    flat = len(columns[0]) == 1 and first.numel() >= blocks.COMPILE_FROM and compiled_body.available()
    return first.is_cpu and not flat and torch_fused.serves(rule, columns, scalars)


def differentiable_step(
    rule: StepRule, columns: Columns, scalars: Mapping[str, Numeric], count: Tensor | None
) -> tuple[list[Tensor], ...]:
    """Step all leaves, differentiably in the columns and the scalars, under any transform.

    Args:
        rule: The step.
        columns: Lists of parameters, gradients and moments, each of one dtype and device.
        scalars: The rule's scalars by name; Adam's corrections follow from the count.
        count: The count of steps, this one included, where the rule has one.

    Returns:
        The new parameters and moments.
    """
    forward = functools.partial(_forward, rule)
    # Large leaves are blocks of their own, and what compiles for the backward pass then makes fewer passes than torch.
    large = sum(map(Tensor.numel, columns[0])) >= blocks.PIECE * len(columns[0]) and compiled_body.available()
    if not large and not transforms_active() and by_torch(rule, columns, scalars):
        forward = lambda columns, _: _by_torch(rule, columns, scalars, count)  # noqa: E731
    step = fused_by_rule(rule.reference, forward, functools.partial(_backward, rule))
    return step(columns, _tensors(rule, scalars, count, columns))


def by_kernel(leaves: Sequence[Tensor]) -> bool:
    """Tell whether leaves go to a Triton kernel.

    Args:
        leaves: The leaves.

    Returns:
        A bool: where there are any, on one CUDA device and of one dtype, Triton is installed, and nothing is compiled.
    """
    if torch.compiler.is_compiling() or not leaves or not leaves[0].is_cuda or not _has_triton():
        return False
    return len({(x.device, x.dtype) for x in leaves}) == 1


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _forward(rule: StepRule, columns: Columns, scalars: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    home = multi_tensor if by_kernel(columns[0]) else blocks
    return home.step(rule, columns, scalars)


def _backward(
    rule: StepRule,
    columns: Columns,
    scalars: Sequence[Tensor],
    cotangents: Columns,
    wanted: tuple[bool, ...],
    scalars_wanted: bool,
) -> tuple[tuple[list[Tensor] | None, ...], list[Tensor] | None]:
    home = multi_tensor if by_kernel(columns[0]) else blocks
    return home.step_backward(rule, columns, scalars, cotangents, wanted, scalars_wanted)


def _tensors(rule: StepRule, scalars: Mapping[str, Numeric], count: Tensor | None, columns: Columns) -> list[Tensor]:
    """The scalars in the rule's order, float64 and 0-d, on the device of the leaves; Adam's corrections are made."""
    device = columns[0][0].device
    if count is not None:
        corrections = {f"correction{k}": bias_correction(scalars[f"b{k}"], count) for k in (1, 2)}
        scalars = {**corrections, **scalars}
    values = [scalars[name] for name in rule.scalars]
    numbers = iter(torch.tensor([v for v in values if not isinstance(v, Tensor)], dtype=torch.float64, device=device))
    return [v.to(device, torch.float64) if isinstance(v, Tensor) else next(numbers) for v in values]


def _by_torch(
    rule: StepRule, columns: Columns, scalars: Mapping[str, Numeric], count: Tensor | None
) -> list[list[Tensor]]:
    """Step copies of the leaves by torch's own function, which writes in place."""
    params, *moments = ([x.clone(memory_format=torch.contiguous_format) for x in c] for c in (columns[0], *columns[2:]))
    grads = list(map(Tensor.contiguous, columns[1]))
    torch_fused.step_in_place(rule, (params, grads, *moments), scalars, count)
    return [params, *moments]


def _by_torch_in_place(
    rule: StepRule, columns: Columns, scalars: Mapping[str, Numeric], count: Tensor | None
) -> list[Sequence[Tensor]]:
    """Step the leaves themselves; those of other strides by way of contiguous copies."""
    ready = [list(map(Tensor.contiguous, column)) for column in columns]
    torch_fused.step_in_place(rule, ready, scalars, count)
    for column, stepped in zip((columns[0], *columns[2:]), (ready[0], *ready[2:]), strict=True):
        for x, y in zip(column, stepped, strict=True):
            if x is not y:
                x.copy_(y)
    return [columns[0], *columns[2:]]
