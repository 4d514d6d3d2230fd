r"""Direct solution of :math:`A x = b` by the factorization that the operator's structure allows."""

import dataclasses

import torch
from torch import Tensor

from diffopt.linalg.operators import Bound, Tag

__all__ = ["Dense"]


@dataclasses.dataclass(frozen=True)
class Dense:
    r"""Materialize the matrix and factorize it, by tag: diagonal, triangular, Cholesky, else LU.

    .. math:: A = L L^\top \quad\text{or}\quad P A = L U

    Costs :math:`n` products and :math:`O(n^3)`; the right choice up to a few hundred unknowns.

    Example:
        >>> from diffopt.linalg import linear_solve, matrix_operator
        >>> linear_solve(matrix_operator(torch.tensor([[0.0, 2.0], [-1.0, 0.0]])), torch.ones(2), Dense())
        tensor([-1.0000,  0.5000])
    """

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Tensor]:
        """The solution of `bound x = b`, and whether the matrix was regular."""
        if "diagonal" in tags:
            diagonal = bound.matvec(torch.ones_like(b))
            return _finite(b / diagonal, (diagonal != 0).all())
        A = bound.dense()
        if "lower_triangular" in tags or "upper_triangular" in tags:
            solution = torch.linalg.solve_triangular(A, b[:, None], upper="upper_triangular" in tags)[:, 0]
            return _finite(solution, (A.diagonal() != 0).all())
        if "positive_definite" in tags:
            L, info = torch.linalg.cholesky_ex(A)
            even = (A - A.mT).abs().amax() <= torch.finfo(A.dtype).eps ** 0.5 * A.abs().amax()
            return _finite(torch.cholesky_solve(b[:, None], L)[:, 0], (info == 0) & even)
        return _lu_solve(A, b)

    def transposed(self) -> "Dense":
        """The solver for the transposed system: itself."""
        return self

    def traceable(self, bound: Bound, b: Tensor, tags: frozenset[Tag]) -> Tensor:
        """The solution in operations that torch differentiates rightly to any order, for `torch.compile`."""
        if "diagonal" in tags:
            return b / bound.matvec(torch.ones_like(b))
        return torch.linalg.inv(bound.dense()) @ b


def _finite(solution: Tensor, regular: Tensor) -> tuple[Tensor, Tensor]:
    solution = torch.where(regular, solution, torch.nan)
    return solution, solution.isfinite().all()


def _lu_solve(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The solution by one factorization, also where `vmap` maps over `b` alone: `linalg.solve` would repeat it."""
    sound = A.isfinite().all()
    eye = torch.eye(b.numel(), dtype=b.dtype, device=b.device)
    LU, pivots, info = torch.linalg.lu_factor_ex(torch.where(sound, A, eye))  # LAPACK gives no pivots for NaN
    P, L, U = torch.lu_unpack(LU, pivots)
    y = torch.linalg.solve_triangular(L, P.mT @ b.unsqueeze(1), upper=False, unitriangular=True)
    solution = torch.linalg.solve_triangular(U, y, upper=True).squeeze(1)
    return _finite(solution, sound & (info == 0))
