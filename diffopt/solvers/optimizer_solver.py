r"""Any optimizer as a solver.

.. math:: (x_{k+1}, s_{k+1}) = \text{step}(\nabla f(x_k), s_k, x_k)
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import grad
from diffopt.solvers.objective import Objective
from diffopt.transforms import GradientTransformation, step
from diffopt.transforms.base import check_optimizer

__all__ = ["FromOptimizer", "FromOptimizerState"]


class FromOptimizerState(NamedTuple):
    """The iterate, its gradient, no failure, the value, and the optimizer's state."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class FromOptimizer:
    r"""An optimizer, such as `adam(1e-2)`, stepped until the gradient vanishes.

    .. math:: (x_{k+1}, s_{k+1}) = \text{step}(\nabla f(x_k), s_k, x_k)

    Its hyperparameters carry gradient under `Unrolled()`. It is given the whole of the unknowns as one vector.

    Args:
        optimizer: A gradient transformation.

    Raises:
        TypeError: If `optimizer` is not a gradient transformation.

    Example:
        >>> from diffopt import sgd
        >>> from diffopt.solvers import minimize
        >>> minimize(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2), solver=FromOptimizer(sgd(0.5))).value
        tensor([3., 3.])

    References:
        DeepMind, "The DeepMind JAX Ecosystem", 2020, for the grammar of optimizers.
    """

    optimizer: GradientTransformation

    def __post_init__(self):
        check_optimizer(self.optimizer)

    def init(self, fn: Any, x: Tensor) -> FromOptimizerState:
        """The state at the start."""
        value, slope = Objective.of(fn).value_and_grad(x)
        failed = torch.zeros_like(value, dtype=torch.bool)
        return FromOptimizerState(x, slope, failed, value, self.optimizer.init(x))

    def step(self, fn: Any, state: FromOptimizerState) -> FromOptimizerState:
        """The state after one step."""
        objective = Objective.of(fn)
        extra = {"value": state.value, "grad_fn": grad(objective.fn)}
        x, inner = step(self.optimizer, state.residual, state.optimizer, state.x, **extra)
        value, slope = objective.value_and_grad(x)
        return FromOptimizerState(x, slope, state.failed, value, inner)
