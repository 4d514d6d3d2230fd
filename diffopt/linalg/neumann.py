r"""The truncated Neumann series for :math:`A^{-1} b`: `Neumann`."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from diffopt.linalg.operators import Bound, Tag
from diffopt.linalg.protocol import Status
from diffopt.linalg.stopping import check_options

__all__ = ["Neumann"]


@dataclasses.dataclass(frozen=True)
class Neumann:
    r"""The first terms of the Neumann series, which are as many steps of Richardson's iteration.

    .. math:: x = \alpha \sum_{k=0}^{n} (I - \alpha A)^k\, b

    Approximates the solution where the eigenvalues of :math:`I - \alpha A` lie inside the unit circle. A truncated
    series by definition: it converges unless it is not finite, and its derivative is that of the series, in
    :math:`\alpha`, too.

    Args:
        n: the last power, also the number of products (one more from an initial guess).
        alpha: the step; a tensor carries gradient.

    Raises:
        ValueError: if `n` is not a non-negative int.
        TypeError: if `alpha` is not a number or a 0-d tensor.

    Example:
        >>> from diffopt.linalg import linear_solve
        >>> linear_solve(torch.tensor([[0.5, 0.0], [0.0, 1.0]]), torch.ones(2), Neumann(2))
        tensor([1.7500, 1.0000])

    References:
        Lorraine, Vicol and Duvenaud (2020), Optimizing millions of hyperparameters by implicit differentiation,
        algorithm 3.
    """

    n: int
    alpha: float | Tensor = 1.0

    causes: ClassVar[str] = "the series diverges (alpha is too large for the operator), or the operator holds NaN"
    truncated: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(self.n, int) or self.n < 0:
            raise ValueError(f"n must be a non-negative int; got {self.n!r}")
        check_options(self)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The series, or as many steps from the initial guess `x`, and whether it is finite."""
        x = self.alpha * b if x is None else x + self.alpha * (b - bound.matvec(x))
        for _ in range(self.n):
            x = x + self.alpha * (b - bound.matvec(x))
        return x, Status(x.isfinite().all(), torch.full((), self.n, device=b.device))

    def transposed(self) -> "Neumann":
        """The solver for the transposed system: itself."""
        return self
