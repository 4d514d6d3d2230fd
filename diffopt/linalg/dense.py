r"""The direct solution of :math:`A x = b` that the operator's structure allows."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from diffopt.linalg.factorizations import LU, Cholesky, Factorized
from diffopt.linalg.operators import Bound, Tag
from diffopt.linalg.protocol import Status
from diffopt.linalg.structured import Diagonal, Triangular, Tridiagonal

__all__ = ["Dense"]


@dataclasses.dataclass(frozen=True)
class Dense:
    r"""The direct solver that fits the operator's tags.

    .. math:: A = L L^\top \quad\text{or}\quad P A = L U

    `Diagonal`, `Triangular`, `Tridiagonal` or `Cholesky` ("positive_definite") by tag, in this order, else `LU`. All
    but the diagonal and the tridiagonal one materialize the matrix, at n products, and take :math:`O(n^3)` operations
    (triangular: :math:`O(n^2)`); the right choice up to a few hundred unknowns.

    Example:
        >>> import torch
        >>> from diffopt.linalg import linear_solve, matrix_operator
        >>> linear_solve(matrix_operator(torch.tensor([[0.0, 2.0], [-1.0, 0.0]])), torch.ones(2), Dense())
        tensor([-1.0000,  0.5000])
    """

    causes: ClassVar[str] = Cholesky.causes

    def factorize(self, bound: Bound, like: Tensor, tags: frozenset[Tag]) -> Factorized:
        """The function that solves for a right side."""
        return chosen(tags).factorize(bound, like, tags)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b`, and whether the matrix was regular."""
        return self.factorize(bound, b, tags)(b)

    def transposed(self) -> "Dense":
        """The solver for the transposed system: itself."""
        return self

    def traceable(self, bound: Bound, b: Tensor, tags: frozenset[Tag]) -> Tensor:
        """The solution in operations that torch differentiates rightly to any order, for `torch.compile`."""
        return chosen(tags).traceable(bound, b, tags)


def chosen(tags: frozenset[Tag]) -> Diagonal | Triangular | Tridiagonal | Cholesky | LU:
    """The direct solver for an operator of these tags."""
    if "diagonal" in tags:
        return Diagonal()
    if tags & {"lower_triangular", "upper_triangular"}:
        return Triangular()
    if "tridiagonal" in tags:
        return Tridiagonal()
    return Cholesky() if "positive_definite" in tags else LU()
