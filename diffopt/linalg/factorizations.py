r"""Direct solvers by one factorization: `LU`, `Cholesky`, `QR` and `SVD`.

.. math:: P A = L U, \qquad A = L L^\top, \qquad A = Q R, \qquad A = U \Sigma V^\top

They take the dense matrix, which costs as many products as it has rows, and :math:`O(n^3)` operations.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from diffopt.linalg.operators import Bound, LinearOperator, Tag
from diffopt.linalg.protocol import Status, check_precision, solved_directly
from diffopt.linalg.stopping import check_options

__all__ = ["LU", "QR", "SVD", "Cholesky", "Factorized", "by_inverse"]

Factorized: TypeAlias = Callable[[Tensor], tuple[Tensor, Status]]


@dataclasses.dataclass(frozen=True)
class LU:
    r"""Gaussian elimination with row exchanges, for any regular operator.

    .. math:: P A = L U

    Example:
        >>> from diffopt.linalg import linear_solve
        >>> linear_solve(torch.tensor([[0.0, 2.0], [-1.0, 0.0]]), torch.ones(2), LU())
        tensor([-1.0000,  0.5000])

    References:
        Golub and Van Loan (2013), Matrix computations, algorithm 3.4.1.
    """

    causes: ClassVar[str] = "the matrix is singular, or not symmetric although it is tagged so, or holds NaN"

    def factorize(self, bound: Bound, like: Tensor, tags: frozenset[Tag]) -> Factorized:
        """The function that solves for a right side with the factors."""
        A = _matrix(bound, "LU")
        sound = A.isfinite().all()
        if "symmetric" in tags:  # then a transposed system may be given as the system itself
            sound = sound & _even(A)
        # LAPACK gives no pivots for NaN
        factors, pivots, info = torch.linalg.lu_factor_ex(torch.where(sound, A, _eye(A)))
        P, L, U = torch.lu_unpack(factors, pivots)

        def solve(b):
            # not lu_solve, which is wrong where vmap maps over both; and one factorization where it maps over b alone
            y = torch.linalg.solve_triangular(L, P.mT @ b.unsqueeze(1), upper=False, unitriangular=True)
            solution = torch.linalg.solve_triangular(U, y, upper=True).squeeze(1)
            return solved_directly(solution, sound & (info == 0))

        return solve

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b`, and whether the matrix was regular."""
        return self.factorize(bound, b, tags)(b)

    def transposed(self) -> "LU":
        """The solver for the transposed system: itself."""
        return self

    def traceable(self, bound: Bound, b: Tensor, tags: frozenset[Tag]) -> Tensor:
        """The solution in operations that torch differentiates rightly to any order, for `torch.compile`."""
        return by_inverse(bound, b)


@dataclasses.dataclass(frozen=True)
class Cholesky:
    r"""The Cholesky factorization, for symmetric positive definite operators, at half the cost of `LU`.

    .. math:: A = L L^\top

    Example:
        >>> from diffopt.linalg import linear_solve, matrix_operator
        >>> A = matrix_operator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), tags=["positive_definite"])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), Cholesky())
        tensor([0.0909, 0.6364])

    References:
        Golub and Van Loan (2013), Matrix computations, algorithm 4.2.1.
    """

    causes: ClassVar[str] = (
        "the matrix is singular, or not symmetric positive definite although it is tagged so, or holds NaN"
    )

    def prepare(self, operator: LinearOperator) -> tuple[LinearOperator, "Cholesky"]:
        """Refuse an operator that is not tagged symmetric."""
        if not operator.symmetric:
            raise ValueError(
                "Cholesky needs a symmetric positive definite operator: tag it, as in matrix_operator(A, "
                'tags=["positive_definite"]), or use LU'
            )
        return operator, self

    def factorize(self, bound: Bound, like: Tensor, tags: frozenset[Tag]) -> Factorized:
        """The function that solves for a right side with the factor."""
        A = _matrix(bound, "Cholesky")
        L, info = torch.linalg.cholesky_ex(A)
        sound = (info == 0) & _even(A)
        return lambda b: solved_directly(torch.cholesky_solve(b[:, None], L)[:, 0], sound)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b`, and whether the matrix was positive definite."""
        return self.factorize(bound, b, tags)(b)

    def transposed(self) -> "Cholesky":
        """The solver for the transposed system: itself."""
        return self

    def traceable(self, bound: Bound, b: Tensor, tags: frozenset[Tag]) -> Tensor:
        """The solution in operations that torch differentiates rightly to any order, for `torch.compile`."""
        return by_inverse(bound, b)


@dataclasses.dataclass(frozen=True)
class QR:
    r"""Orthogonal factorization, for regular systems, and for least squares of full rank.

    .. math:: A = Q R, \quad x = R^{-1} Q^\top b \qquad\text{or, for a wide one,}\qquad
              A^\top = Q R, \quad x = Q R^{-\top} b

    Twice the cost of `LU`, and backward stable without growth. A column that depends on the ones before it to working
    precision is a failure: use `SVD` or `LSMR` there.

    Example:
        >>> from diffopt.linalg import lstsq
        >>> lstsq(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 3.0, 5.0]), QR())
        tensor([1., 2.])

    References:
        Golub and Van Loan (2013), Matrix computations, sections 5.3.3 and 5.6.2.
    """

    causes: ClassVar[str] = (
        "the matrix does not have full rank to working precision (for least squares, use SVD() or LSMR()), or holds NaN"
    )
    full_rank: ClassVar[bool] = True

    def factorize(self, bound: Bound, like: Tensor, tags: frozenset[Tag]) -> Factorized:
        """The function that solves for a right side with the factors."""
        A = _matrix(bound, "QR")
        wide = A.shape[0] < A.shape[1]
        sound = A.isfinite().all()
        tall = torch.where(sound, A.mT if wide else A, torch.ones_like(A.mT if wide else A))
        Q, R = torch.linalg.qr(tall)
        tiny = torch.finfo(A.dtype).eps * max(A.shape)
        regular = sound & (R.diagonal().abs() > tiny * torch.linalg.vector_norm(tall, dim=0)).all()
        safe = torch.where(regular, R, torch.eye(R.shape[0], dtype=R.dtype, device=R.device))

        def solve(b):
            if wide:
                found = Q @ torch.linalg.solve_triangular(safe.mT, b.unsqueeze(1), upper=False).squeeze(1)
            else:
                found = torch.linalg.solve_triangular(safe, (Q.mT @ b).unsqueeze(1), upper=True).squeeze(1)
            return solved_directly(found, regular)

        return solve

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b`, and whether the matrix was regular."""
        return self.factorize(bound, b, tags)(b)

    def least_squares(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The least-squares solution of least norm, and whether the matrix had full rank."""
        return self.factorize(bound, b, tags)(b)

    def transposed(self) -> "QR":
        """The solver for the transposed system: itself."""
        return self

    def traceable(self, bound: Bound, b: Tensor, tags: frozenset[Tag]) -> Tensor:
        """The solution in operations that torch differentiates rightly to any order, for `torch.compile`."""
        return by_inverse(bound, b)

    def traceable_least_squares(self, bound: Bound, b: Tensor, tags: frozenset[Tag]) -> Tensor:
        """The least-squares solution in operations that torch differentiates rightly, for `torch.compile`."""
        return self.factorize(bound, b, tags)(b)[0]


@dataclasses.dataclass(frozen=True)
class SVD:
    r"""The singular value decomposition, for systems of any rank.

    .. math:: A = U \Sigma V^\top, \qquad x = \sum_{\sigma_i > \text{rcond}\,\sigma_1} \frac{u_i^\top b}{\sigma_i} v_i

    The dearest factorization, about ten times `LU`. In `linear_solve` a cut singular value is a failure; in `lstsq` it
    is what makes the solution of least norm.

    Args:
        rcond: singular values up to this fraction of the largest are taken for zero; None is
            :math:`\varepsilon \max(m, n)`. The derivative holds where no singular value crosses it.

    Raises:
        ValueError: if `rcond` is negative.

    Example:
        >>> from diffopt.linalg import lstsq
        >>> lstsq(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([1.0, 3.0]), SVD())
        tensor([1.0000, 1.0000])

    References:
        Golub and Van Loan (2013), Matrix computations, theorem 5.5.1.
    """

    rcond: float | None = None

    causes: ClassVar[str] = "the matrix is singular to working precision (or to rcond), or holds NaN"
    full_rank: ClassVar[bool] = False

    def __post_init__(self):
        check_options(self)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b`, and whether the matrix was regular."""
        solve, regular = self._decomposed(bound)
        return solved_directly(solve(b), regular)

    def factorize(self, bound: Bound, like: Tensor, tags: frozenset[Tag]) -> Factorized:
        """The function that solves for a right side with the factors."""
        solve, regular = self._decomposed(bound)
        return lambda b: solved_directly(solve(b), regular)

    def least_squares(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The least-squares solution of least norm, and whether it is finite."""
        solution = self._decomposed(bound)[0](b)
        return solved_directly(solution, solution.isfinite().all())

    def transposed(self) -> "SVD":
        """The solver for the transposed system: itself."""
        return self

    def traceable(self, bound: Bound, b: Tensor, tags: frozenset[Tag]) -> Tensor:
        """The solution in operations that torch differentiates rightly to any order, for `torch.compile`."""
        return by_inverse(bound, b)

    def traceable_least_squares(self, bound: Bound, b: Tensor, tags: frozenset[Tag]) -> Tensor:
        """The least-squares solution in operations that torch differentiates rightly, for `torch.compile`."""
        A = bound.dense()
        return torch.linalg.pinv(A, rtol=self._cut(A)) @ b

    def _decomposed(self, bound: Bound) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The product with the pseudo-inverse, and whether no singular value was cut."""
        A = _matrix(bound, "SVD")
        sound = A.isfinite().all()
        U, S, Vh = torch.linalg.svd(torch.where(sound, A, torch.zeros_like(A)), full_matrices=False)
        kept = self._cut(A) * S[0] < S
        inverse = torch.where(kept, 1 / torch.where(kept, S, 1.0), 0.0)
        inverse = torch.where(sound, inverse, torch.nan)
        return lambda b: Vh.mT @ (inverse * (U.mT @ b)), sound & kept.all()

    def _cut(self, A: Tensor) -> float:
        return torch.finfo(A.dtype).eps * max(A.shape) if self.rcond is None else self.rcond


def by_inverse(bound: Bound, b: Tensor) -> Tensor:
    """The solution by the dense inverse, which torch differentiates rightly where it does not a solve."""
    return torch.linalg.inv(bound.dense()) @ b


def _matrix(bound: Bound, name: str) -> Tensor:
    A = bound.dense()
    check_precision(A.dtype, name)
    return A


def _even(A: Tensor) -> Tensor:
    """Whether a matrix is symmetric up to rounding."""
    return (A - A.mT).abs().amax() <= torch.finfo(A.dtype).eps ** 0.5 * A.abs().amax()


def _eye(A: Tensor) -> Tensor:
    return torch.eye(A.shape[0], dtype=A.dtype, device=A.device)
