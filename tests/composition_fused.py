"""Rows of the composition matrix: the fused steps, as functions of all their columns and scalars."""

import torch

from diffopt.transforms.fusion import launch
from diffopt_kernels import steps

__all__ = ["FUSED_ROWS", "SCALARS", "columns_of", "fused_row"]

RULES = {rule.name: rule for rule in (steps.SGD, steps.MOMENTUM, steps.NESTEROV, steps.RMSPROP, steps.LION, steps.ADAM)}
SCALARS = {
    "learning_rate": 0.1,
    "decay": 0.8,
    "b1": 0.8,
    "b2": 0.9,
    "eps": 1e-2,
    "eps_root": 1e-3,
    "weight_decay": 0.05,
    "correction1": 0.36,
    "correction2": 0.19,
}


def columns_of(rule):
    """Parameters, gradients and moments of a vector and a scalar leaf; moments are positive."""
    columns = [[0.5, -0.4], [0.3, 0.7], [0.2, 0.6], [0.4, 0.1]][: 2 + rule.moments]
    return [[torch.tensor(c, dtype=torch.float64), torch.tensor(c[0] + 0.2, dtype=torch.float64)] for c in columns]


def fused_row(rule, step):
    """A step by `step(rule, columns, scalars)` against the rule's reference."""
    scalars = {name: torch.tensor(SCALARS[name], dtype=torch.float64) for name in rule.scalars}

    def operator(columns, scalars):
        return step(rule, columns, scalars)

    def reference(columns, scalars):
        return [rule.reference(*row, *(scalars[name] for name in rule.scalars)) for row in zip(*columns, strict=True)]

    def transposed(columns, scalars):
        rows = reference(columns, scalars)
        return tuple([row[k] for row in rows] for k in range(1 + rule.moments))

    return operator, (columns_of(rule), scalars), transposed, None


def by_dispatch(rule, columns, scalars):
    return launch.differentiable_step(rule, columns, scalars, None)


FUSED_ROWS = {f"fused step, {name}": (lambda rule=rule: fused_row(rule, by_dispatch)) for name, rule in RULES.items()}
