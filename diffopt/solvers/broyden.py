r"""Broyden's method for equations: the inverse Jacobian is learned from the steps.

.. math:: x_{k+1} = x_k - H_k F(x_k), \qquad H_{k+1} y_k = s_k
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffopt.solvers.newton import inverse_jacobian

__all__ = ["Broyden", "BroydenState"]


class BroydenState(NamedTuple):
    """The iterate, the equation's value there, whether no step can be made, and the approximate inverse Jacobian."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    inverse: Tensor


@dataclasses.dataclass(frozen=True)
class Broyden:
    r"""Broyden's first ("good") method: one evaluation and two products a step, superlinear convergence.

    .. math:: H_{k+1} = H_k + \frac{(s_k - H_k y_k)\,s_k^\top H_k}{s_k^\top H_k y_k}, \qquad
              s_k = x_{k+1} - x_k, \quad y_k = F(x_{k+1}) - F(x_k)

    Args:
        start: The first :math:`H`: "jacobian", the inverse Jacobian at the start, or "identity", for where derivatives
            are dear: then `scale` times the identity.
        scale: The scale of the identity, about the inverse of the Jacobian's size; a tensor carries gradient under
            `Unrolled`.

    Raises:
        ValueError: If `start` is not one of these.

    Example:
        >>> from diffopt.solvers import root
        >>> root(lambda x, a: x**2 - a, torch.tensor(1.0), (torch.tensor(2.0),), solver=Broyden()).value
        tensor(1.4142)

    References:
        Broyden (1965), A class of methods for solving nonlinear simultaneous equations, eqs. 4.5 and 5.5.
    """

    start: Literal["jacobian", "identity"] = "jacobian"
    scale: float | Tensor = 1.0

    truncatable = False

    def __post_init__(self):
        if self.start not in ("jacobian", "identity"):
            raise ValueError(f'start must be "jacobian" or "identity"; got {self.start!r}')

    def init(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> BroydenState:
        """The state at the start."""
        if self.start == "jacobian":
            value, inverse, regular = inverse_jacobian(fn, x)
            return BroydenState(x, value, ~regular, inverse)
        inverse = self.scale * torch.eye(x.numel(), dtype=x.dtype, device=x.device)
        return BroydenState(x, fn(x), torch.zeros((), dtype=torch.bool, device=x.device), inverse)

    def step(self, fn: Callable[[Tensor], Tensor], state: BroydenState) -> BroydenState:
        """The state after one step."""
        s = -(state.inverse @ state.residual)
        x = state.x + s
        value = fn(x)
        learned = state.inverse @ (value - state.residual)
        along = s @ learned
        sound = along.abs() > torch.finfo(x.dtype).eps * (s @ s)
        change = torch.outer(s - learned, s @ state.inverse) / torch.where(sound, along, torch.ones_like(along))
        inverse = state.inverse + torch.where(sound, change, torch.zeros_like(change))
        return BroydenState(x, value, (x == state.x).all(), inverse)
