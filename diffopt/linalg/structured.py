r"""Direct solvers for operators of a simple structure: `Diagonal`, `Triangular` and `Tridiagonal`.

.. math:: a_{ij} = 0 \text{ for } i \ne j, \qquad i < j \text{ (or } i > j\text{)}, \qquad |i - j| > 1
"""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import any_lane
from diffopt.linalg.factorizations import LU, Factorized, by_inverse
from diffopt.linalg.operators import Bound, LinearOperator, Tag
from diffopt.linalg.protocol import Status, check_precision, solved_directly
from diffopt.linalg.stopping import nonzero

__all__ = ["Diagonal", "Triangular", "Tridiagonal"]

_MOST_DENSE = 2048  # unknowns of a tridiagonal system that is given to LU when it needs pivoting


@dataclasses.dataclass(frozen=True)
class Diagonal:
    r"""Division by the diagonal, for operators tagged "diagonal": one product, no matrix.

    .. math:: x_i = b_i / a_{ii}

    Example:
        >>> from diffopt.linalg import function_operator, linear_solve
        >>> A = function_operator(lambda d, v: d * v, torch.tensor([2.0, 4.0]), torch.ones(2), tags=["diagonal"])
        >>> linear_solve(A, torch.ones(2), Diagonal())
        tensor([0.5000, 0.2500])
    """

    causes: ClassVar[str] = "the diagonal holds a zero or NaN"

    def prepare(self, operator: LinearOperator) -> tuple[LinearOperator, "Diagonal"]:
        """Refuse an operator that is not tagged diagonal."""
        _check_tag("Diagonal", operator, "diagonal")
        return operator, self

    def factorize(self, bound: Bound, like: Tensor, tags: frozenset[Tag]) -> Factorized:
        """The function that solves for a right side with the diagonal."""
        diagonal = bound.matvec(torch.ones_like(like))
        regular = (diagonal != 0).all()
        return lambda b: solved_directly(b / diagonal, regular)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b`, and whether the diagonal has no zero."""
        return self.factorize(bound, b, tags)(b)

    def transposed(self) -> "Diagonal":
        """The solver for the transposed system: itself."""
        return self

    def traceable(self, bound: Bound, b: Tensor, tags: frozenset[Tag]) -> Tensor:
        """The solution in operations that torch differentiates rightly to any order, for `torch.compile`."""
        return b / bound.matvec(torch.ones_like(b))


@dataclasses.dataclass(frozen=True)
class Triangular:
    r"""Substitution, for operators tagged "lower_triangular" or "upper_triangular".

    .. math:: x_i = \Big(b_i - \sum_{j < i} a_{ij} x_j\Big) / a_{ii}

    Takes the dense matrix, and then :math:`O(n^2)` operations.

    Example:
        >>> from diffopt.linalg import linear_solve, matrix_operator
        >>> A = matrix_operator(torch.tensor([[2.0, 0.0], [1.0, 4.0]]), tags=["lower_triangular"])
        >>> linear_solve(A, torch.tensor([2.0, 5.0]), Triangular())
        tensor([1., 1.])

    References:
        Golub and Van Loan (2013), Matrix computations, algorithm 3.1.1.
    """

    causes: ClassVar[str] = "the diagonal holds a zero, or the matrix NaN"

    def prepare(self, operator: LinearOperator) -> tuple[LinearOperator, "Triangular"]:
        """Refuse an operator that is not tagged triangular."""
        _check_tag("Triangular", operator, "lower_triangular", "upper_triangular")
        return operator, self

    def factorize(self, bound: Bound, like: Tensor, tags: frozenset[Tag]) -> Factorized:
        """The function that solves for a right side with the matrix."""
        A, upper = bound.dense(), "upper_triangular" in tags
        check_precision(A.dtype, "Triangular")
        regular = (A.diagonal() != 0).all()

        def solve(b):
            return solved_directly(torch.linalg.solve_triangular(A, b[:, None], upper=upper)[:, 0], regular)

        return solve

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b`, and whether the diagonal has no zero."""
        return self.factorize(bound, b, tags)(b)

    def transposed(self) -> "Triangular":
        """The solver for the transposed system: itself; the operator's tag tells which triangle."""
        return self

    def traceable(self, bound: Bound, b: Tensor, tags: frozenset[Tag]) -> Tensor:
        """The solution in operations that torch differentiates rightly to any order, for `torch.compile`."""
        return by_inverse(bound, b)


class _Bands(NamedTuple):
    """Three diagonals, each of shape `(n,)`: row i of the matrix holds `lower[i], middle[i], upper[i]`."""

    lower: Tensor
    middle: Tensor
    upper: Tensor

    def product(self, x: Tensor) -> Tensor:
        return self.lower * _shift(x, 1) + self.middle * x + self.upper * _shift(x, -1)

    def dense(self) -> Tensor:
        below, above = torch.diag_embed(self.lower[1:], offset=-1), torch.diag_embed(self.upper[:-1], offset=1)
        return torch.diag_embed(self.middle) + below + above


@dataclasses.dataclass(frozen=True)
class Tridiagonal:
    r"""Parallel cyclic reduction, for operators tagged "tridiagonal", in :math:`O(n \log n)` operations.

    .. math:: l_i x_{i-1} + d_i x_i + u_i x_{i+1} = b_i

    Row i minus multiples of rows :math:`i \pm s` couples :math:`x_i` with :math:`x_{i \pm 2 s}`; after
    :math:`\log_2 n` halvings every row stands alone. All rows move at once, so a step is a few operations on vectors.
    The three diagonals come from three products, with vectors of every third unknown; no matrix is made.

    There is no pivoting: the method suits positive definite and diagonally dominant operators. Where the result has no
    small residual after one refinement, `LU` takes over, up to 2048 unknowns; beyond that the solve fails. Compiled,
    where nothing can be refined or raised, the result is NaN there.

    Example:
        >>> from diffopt.linalg import linear_solve, matrix_operator
        >>> A = matrix_operator(torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 2.0]]), tags=["tridiagonal"])
        >>> linear_solve(A, torch.tensor([3.0, 5.0, 3.0]), Tridiagonal())
        tensor([1., 1., 1.])

    References:
        Hockney and Jesshope (1981), Parallel computers, section 5.4.
    """

    causes: ClassVar[str] = "the matrix is singular, or large and needs pivoting (use LU() or GMRES()), or holds NaN"

    def prepare(self, operator: LinearOperator) -> tuple[LinearOperator, "Tridiagonal"]:
        """Refuse an operator that is not tagged tridiagonal."""
        _check_tag("Tridiagonal", operator, "tridiagonal", "diagonal")
        return operator, self

    def factorize(self, bound: Bound, like: Tensor, tags: frozenset[Tag]) -> Factorized:
        """The function that solves for a right side with the diagonals."""
        bands = _bands(bound, like)
        return lambda b: _solve_bands(bands, b)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b`, and whether its residual is small."""
        return self.factorize(bound, b, tags)(b)

    def transposed(self) -> "Tridiagonal":
        """The solver for the transposed system: itself."""
        return self

    def traceable(self, bound: Bound, b: Tensor, tags: frozenset[Tag]) -> Tensor:
        """The solution in operations that torch differentiates rightly to any order, for `torch.compile`."""
        bands = _bands(bound, b)
        x = _reduce(bands, b)
        return torch.where(_accurate(bands, x, b), x, torch.nan)


def _check_tag(name: str, operator: LinearOperator, *needed: Tag) -> None:
    if not operator.tags & set(needed):
        tags = " or ".join(f'"{tag}"' for tag in needed)
        raise ValueError(
            f"{name} needs an operator tagged {tags}, as in matrix_operator(A, tags=[{needed[0]!r}]); this one has the "
            f"tags {sorted(operator.tags)}. Dense() chooses by tags"
        )


def _bands(bound: Bound, like: Tensor) -> _Bands:
    """The three diagonals by three products: in row i the colours i - 1, i, i + 1 (modulo 3) do not meet."""
    colour = torch.arange(like.numel(), device=like.device) % 3
    found = torch.stack([bound.matvec((colour == c).to(like.dtype)) for c in range(3)])
    lower, middle, upper = (found.gather(0, ((colour + k) % 3)[None])[0] for k in (-1, 0, 1))
    inside = torch.arange(like.numel(), device=like.device)
    return _Bands(torch.where(inside > 0, lower, 0.0), middle, torch.where(inside < like.numel() - 1, upper, 0.0))


def _solve_bands(bands: _Bands, b: Tensor) -> tuple[Tensor, Status]:
    x = _reduce(bands, b)
    x = x + _reduce(bands, b - bands.product(x))
    good = _accurate(bands, x, b)
    if b.numel() > _MOST_DENSE or not any_lane(~good):
        return solved_directly(x, good)
    matrix = bands.dense()
    bound = Bound(lambda v: matrix @ v, lambda u: matrix.mT @ u, lambda: matrix, held=True)
    pivoted, _ = LU().solve(bound, b, None, frozenset())
    x = torch.where(good, x, pivoted)
    return solved_directly(x, x.isfinite().all())


def _reduce(bands: _Bands, b: Tensor) -> Tensor:
    """Parallel cyclic reduction; a zero on the way leaves a large residual, or NaN, behind."""
    lower, middle, upper = bands
    stride = 1
    while stride < b.numel():
        before = -lower / nonzero(_shift(middle, stride, 1.0))
        after = -upper / nonzero(_shift(middle, -stride, 1.0))
        b = b + before * _shift(b, stride) + after * _shift(b, -stride)
        middle = middle + before * _shift(upper, stride) + after * _shift(lower, -stride)
        lower, upper = before * _shift(lower, stride), after * _shift(upper, -stride)
        stride *= 2
    return b / nonzero(middle)


def _accurate(bands: _Bands, x: Tensor, b: Tensor) -> Tensor:
    """Whether the residual is small against the terms that it is the difference of."""
    size = _Bands(bands.lower.abs(), bands.middle.abs(), bands.upper.abs()).product(x.abs()).amax() + b.abs().amax()
    return (b - bands.product(x)).abs().amax() <= 100 * torch.finfo(b.dtype).eps * size


def _shift(v: Tensor, by: int, fill: float = 0.0) -> Tensor:
    """The vector whose entry i is `v[i - by]`, filled up at the ends."""
    edge = v.new_full((min(abs(by), v.shape[0]),), fill)
    return torch.cat([edge, v[:-by]]) if by > 0 else torch.cat([v[-by:], edge])
