"""PyTorch's own fused optimizer functions: lists of leaves on the CPU in one call. The one file that calls them.

Their names are private, but `torch.optim` with ``fused=True`` is made of them; tests/transforms/fusion fails when one
changes. They write in place without raising version counters, and take numbers, not tensors, so they serve only where
no derivative can be asked for.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, _fused_adamw_, _fused_sgd_

from diffopt.typing import Numeric
from diffopt_kernels.steps import ADAM, MOMENTUM, NESTEROV, SGD, StepRule

__all__ = ["serves", "step_in_place", "writer"]


def serves(rule: StepRule, columns: Sequence[Sequence[Tensor]], scalars: Mapping[str, Numeric]) -> bool:
    """Tell whether torch has a fused function for a step.

    Args:
        rule: The step.
        columns: Lists of parameters, gradients and moments, each of one dtype.
        scalars: The rule's scalars by name; numbers or 0-d tensors.

    Returns:
        A bool: for SGD (momentum 0 it takes for none) and Adam without `eps_root`, all columns of one dtype, float32 or
        float64.

    Example:
        >>> columns = [[torch.ones(2)], [torch.ones(2)]]
        >>> serves(SGD, columns, {"learning_rate": 0.1})
        True
    """
    dtypes = {column[0].dtype for column in columns}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        return False
    if rule in (MOMENTUM, NESTEROV):
        return _number(scalars["decay"]) != 0
    return rule is SGD or (rule is ADAM and _number(scalars["eps_root"]) == 0)


def step_in_place(
    rule: StepRule, columns: Sequence[Sequence[Tensor]], scalars: Mapping[str, Numeric], count: Tensor | None
) -> None:
    """Step contiguous leaves in place: the parameters and the moments are written.

    Args:
        rule: A step that torch serves.
        columns: Lists of contiguous parameters, gradients and moments.
        scalars: The rule's scalars by name.
        count: Adam's count of steps, this one included, 0-d.

    Example:
        >>> p = torch.ones(2)
        >>> step_in_place(SGD, [[p], [torch.ones(2)]], {"learning_rate": 0.5}, None)
        >>> p
        tensor([0.5000, 0.5000])
    """
    write = writer(rule, {name: _number(value) for name, value in scalars.items()})
    try:
        write(columns, count)
    except RuntimeError:  # torch refuses lazily negated views, before it writes; to look for them first costs more
        if not any(x.is_neg() for column in columns for x in column):
            raise
        ready = [[x.resolve_neg() for x in column] for column in columns]
        write(ready, count)
        for column, stepped in zip((columns[0], *columns[2:]), (ready[0], *ready[2:]), strict=True):
            for x, y in zip(column, stepped, strict=True):
                if x is not y:
                    x.detach().copy_(y)


def writer(rule: StepRule, numbers: Mapping[str, float]) -> Callable[[Sequence[Sequence[Tensor]], Tensor | None], None]:
    """The function that takes a step in place, `(columns, count) -> None`; it refuses lazily negated views.

    Args:
        rule: A step that torch serves.
        numbers: The rule's scalars by name.

    Returns:
        The function, whose arguments are as in `step_in_place`.
    """
    learning_rate = numbers["learning_rate"]

    @torch.no_grad()
    def adam(columns: Sequence[Sequence[Tensor]], count: Tensor | None) -> None:
        assert count is not None
        params, grads, mus, nus = map(list, columns)
        _fused_adamw_(
            params,
            grads,
            mus,
            nus,
            [],
            [count.to(torch.float32)] * len(params),
            lr=learning_rate,
            beta1=numbers["b1"],
            beta2=numbers["b2"],
            weight_decay=numbers["weight_decay"],
            eps=numbers["eps"],
            amsgrad=False,
            maximize=False,
        )

    @torch.no_grad()
    def descent(columns: Sequence[Sequence[Tensor]], count: Tensor | None) -> None:
        params, grads, *moments = map(list, columns)
        _fused_sgd_(
            params,
            grads,
            *(moments or [[]]),
            weight_decay=0.0,
            momentum=numbers.get("decay", 0.0),
            lr=learning_rate,
            dampening=0.0,
            nesterov=rule is NESTEROV,
            maximize=False,
            is_first_step=False,
        )

    return adam if rule is ADAM else descent


def _number(value: Numeric) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
