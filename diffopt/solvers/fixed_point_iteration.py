r"""Fixed-point iteration, damped.

.. math:: x_{k+1} = x_k + \beta\,(T(x_k) - x_k)
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["FixedPointIteration", "FixedPointState", "started"]


class FixedPointState(NamedTuple):
    """The iterate, `T(x) - x`, and whether no step can be made."""

    x: Tensor
    residual: Tensor
    failed: Tensor


@dataclasses.dataclass(frozen=True)
class FixedPointIteration:
    r"""Picard's iteration: linear convergence, at the rate at which the damped map contracts.

    .. math:: x_{k+1} = x_k + \beta\,(T(x_k) - x_k)

    Args:
        damping: :math:`\beta`, 1 for the map itself; a tensor carries gradient under `Unrolled`.

    Example:
        >>> from diffopt.solvers import fixed_point
        >>> fixed_point(torch.cos, torch.tensor(0.5), solver=FixedPointIteration(), atol=1e-6).value
        tensor(0.7391)

    References:
        Banach (1922), Sur les operations dans les ensembles abstraits, theorem 6. Krasnoselskii (1955), Two remarks on
        the method of successive approximations.
    """

    damping: float | Tensor = 1.0

    def init(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> FixedPointState:
        """The state at the start."""
        return started(fn, x)

    def step(self, fn: Callable[[Tensor], Tensor], state: FixedPointState) -> FixedPointState:
        """The state after one step."""
        x = state.x + self.damping * state.residual
        return FixedPointState(x, fn(x) - x, (x == state.x).all())


def started(fn: Callable[[Tensor], Tensor], x: Tensor) -> FixedPointState:
    """The state at the start, of solvers that keep no more than the iterate."""
    return FixedPointState(x, fn(x) - x, torch.zeros((), dtype=torch.bool, device=x.device))
