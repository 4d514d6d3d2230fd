r"""Anderson acceleration of a fixed-point iteration.

.. math:: x_{k+1} = x_k + \beta f_k - (\Delta X_k + \beta\,\Delta F_k)\,\gamma_k, \qquad
          \gamma_k = \arg\min_\gamma \|f_k - \Delta F_k\,\gamma\|
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.linalg import Dense, matrix_operator
from diffopt.linalg.solve import solve_flat

__all__ = ["Anderson", "AndersonState"]


class AndersonState(NamedTuple):
    """The iterate, `T(x) - x`, whether no step can be made, and the last changes of both, oldest first."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    steps: Tensor
    changes: Tensor


@dataclasses.dataclass(frozen=True)
class Anderson:
    r"""Anderson acceleration, type II: the step that would vanish if the map were affine on the last iterates.

    .. math:: \min_\gamma \|f_k - \Delta F_k\,\gamma\|^2 + \lambda \|\Delta F_k\|^2 \|\gamma\|^2, \qquad f = T(x) - x

    Converges for many maps that do not contract, such as rotations; on affine ones it is GMRES.

    Args:
        memory: The number of changes kept.
        damping: :math:`\beta`, 1 for the map itself; a tensor carries gradient under `Unrolled`.
        ridge: :math:`\lambda`, relative to the squared length of each change; None is :math:`8 \varepsilon`. A tensor
            carries gradient under `Unrolled`.

    Raises:
        ValueError: If `memory` is not a positive int.

    Example:
        >>> from diffopt.solvers import fixed_point
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> a = torch.tensor([1.0, 3.0])
        >>> fixed_point(lambda x, a: turn @ x + a, torch.ones(2), (a,), solver=Anderson()).value
        tensor([-1.0000, 2.0000])

    References:
        Walker and Ni (2011), Anderson acceleration for fixed-point iterations, eq. 2.3.
    """

    memory: int = 5
    damping: float | Tensor = 1.0
    ridge: float | Tensor | None = None

    truncatable = False

    def __post_init__(self):
        if not isinstance(self.memory, int) or self.memory < 1:
            raise ValueError(f"memory must be a positive int; got {self.memory!r}. Use FixedPointIteration for none")

    def init(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> AndersonState:
        """The state at the start."""
        past = x.new_zeros((self.memory, x.numel()))
        return AndersonState(x, fn(x) - x, torch.zeros((), dtype=torch.bool, device=x.device), past, past)

    def step(self, fn: Callable[[Tensor], Tensor], state: AndersonState) -> AndersonState:
        """The state after one step."""
        f = state.residual
        back = self._coefficients(state.changes, f) @ (state.steps + self.damping * state.changes)
        x = state.x + self.damping * f - back
        residual = fn(x) - x
        steps = torch.cat([state.steps[1:], (x - state.x)[None]])
        changes = torch.cat([state.changes[1:], (residual - f)[None]])
        return AndersonState(x, residual, (x == state.x).all(), steps, changes)

    def _coefficients(self, changes: Tensor, f: Tensor) -> Tensor:
        """The combination of changes that is nearest to `f`; empty rows take no part."""
        square = (changes * changes).sum(1)
        empty = square == 0
        length = torch.where(empty, torch.ones_like(square), square).sqrt()
        unit = changes / length[:, None]
        ridge = 8 * torch.finfo(f.dtype).eps if self.ridge is None else self.ridge
        gram = unit @ unit.mT + torch.diag_embed(ridge + empty.to(f.dtype))
        weights = solve_flat(matrix_operator(gram), unit @ f, Dense(), failure="ignore")
        return torch.where(weights.isfinite().all(), weights, torch.zeros_like(weights)) / length
