r"""Preconditioners: cheap approximations of :math:`A^{-1}` for the `preconditioner=` of an iterative solver."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from diffopt import tree
from diffopt.linalg.operators import Bound, LinearOperator, Product
from diffopt.linalg.protocol import check_precision
from diffopt.typing import Tree

__all__ = ["FlatPreconditioner", "Preconditioner", "block_jacobi", "flattened", "jacobi", "product_of", "transposed_of"]

Preconditioner: TypeAlias = LinearOperator | Callable

_COLUMNS = 32  # columns probed at once


def jacobi(operator: LinearOperator) -> LinearOperator:
    r"""The inverse of an operator's diagonal.

    .. math:: M = \operatorname{diag}(A_{11}, \dots, A_{nn})^{-1}

    Args:
        operator: a square operator. The diagonal of a matrix is read; that of other operators costs one product if
            they are tagged diagonal, else n products, 32 at a time.

    Returns:
        The preconditioner, an operator that carries no gradient; zeros of the diagonal are taken for ones.

    Raises:
        ValueError: if the operator is not square.
        TypeError: if it is no operator, or of half precision.

    Example:
        >>> from diffopt.linalg import CG, linear_solve, matrix_operator
        >>> A = matrix_operator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), tags=["positive_definite"])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), CG(preconditioner=jacobi(A)))
        tensor([0.0909, 0.6364])

    References:
        Saad (2003), Iterative methods for sparse linear systems, section 10.2.
    """
    return block_jacobi(operator, 1)


def block_jacobi(operator: LinearOperator, block_size: int) -> LinearOperator:
    r"""The inverses of an operator's diagonal blocks.

    .. math:: M = \operatorname{diag}(A_{[1][1]}, \dots, A_{[k][k]})^{-1}

    Args:
        operator: a square operator. The blocks of a matrix are read; those of other operators cost n products (one,
            if tagged diagonal), 32 at a time, so that memory stays at 32 vectors beside the blocks.
        block_size: rows of a block; the last block may be smaller. Positive definite ones are inverted by Cholesky.

    Returns:
        The preconditioner, an operator that carries no gradient; a singular block is taken for the identity.

    Raises:
        ValueError: if the operator is not square, or `block_size` is not a positive int.
        TypeError: if it is no operator, or of half precision.

    Example:
        >>> from diffopt.linalg import matrix_operator
        >>> A = matrix_operator(torch.tensor([[2.0, 1.0, 0.5], [1.0, 2.0, 0.0], [0.5, 0.0, 4.0]]))
        >>> block_jacobi(A, 2).matvec(torch.tensor([3.0, 3.0, 4.0]))
        tensor([1., 1., 1.])

    References:
        Saad (2003), Iterative methods for sparse linear systems, section 12.2.
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(
            f"a preconditioner needs an operator, such as matrix_operator(A); got {type(operator).__name__}"
        )
    if operator.shape[0] != operator.shape[1]:
        raise ValueError(f"a preconditioner needs a square operator; got shape {operator.shape}")
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive int; got {block_size!r}")
    check_precision(operator.domain.dtype, "a preconditioner of blocks")
    n = operator.shape[0]
    size = max(1, min(block_size, n))
    with torch.no_grad():
        parameters = [p.detach() for p in operator.parameters]
        blocks = _diagonal_blocks(operator, operator.bind(*parameters), size)
        inverse = _inverse_of_blocks(blocks, "positive_definite" in operator.tags).detach()

    def bind(inverse):
        def product(blocks, v):
            padded = torch.nn.functional.pad(v, (0, blocks.shape[0] * size - n))
            return (blocks @ padded.reshape(-1, size, 1)).reshape(-1)[:n]

        def dense():
            return torch.block_diag(*inverse.unbind())[:n, :n]

        return Bound(lambda v: product(inverse, v), lambda u: product(inverse.mT, u), dense)

    tags = operator.tags & {"symmetric", "positive_definite"}
    return LinearOperator(bind, (inverse,), operator.codomain, operator.domain, tags)


def _diagonal_blocks(operator: LinearOperator, bound: Bound, size: int) -> Tensor:
    """The diagonal blocks, shape `(blocks, size, size)`; the last is filled up with the identity."""
    n, space = operator.shape[0], operator.domain
    count = -(-n // size)
    if n == 0:
        return space.zeros().reshape(0, size, size)
    if "diagonal" in operator.tags:
        return torch.diag_embed(_filled(bound.matvec(torch.ones_like(space.zeros())), count * size).reshape(-1, size))
    if bound.held:
        A = bound.dense()
        return torch.stack([_square(A[i : i + size, i : i + size], size) for i in range(0, n, size)])
    columns = torch.cat([_own_block(bound, j, size, count, space.zeros()) for j in range(0, n, _COLUMNS)])
    missing = torch.eye(size, dtype=space.dtype, device=space.device)[n - count * size :] if n % size else columns[:0]
    return torch.cat([columns, missing]).reshape(count, size, size).mT


def _own_block(bound: Bound, first: int, size: int, count: int, zeros: Tensor) -> Tensor:
    """The entries in their own diagonal block of the columns from `first` on, one row a column."""
    where = torch.arange(first, min(first + _COLUMNS, zeros.numel()), device=zeros.device)
    units = (torch.arange(zeros.numel(), device=zeros.device) == where[:, None]).to(zeros.dtype)
    columns = torch.func.vmap(bound.matvec)(units)
    columns = torch.nn.functional.pad(columns, (0, count * size - zeros.numel()))
    return columns.gather(1, (where // size * size)[:, None] + torch.arange(size, device=zeros.device))


def _square(block: Tensor, size: int) -> Tensor:
    missing = size - block.shape[0]
    return torch.block_diag(block, torch.eye(missing, dtype=block.dtype, device=block.device)) if missing else block


def _filled(diagonal: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(diagonal, (0, size - diagonal.numel()), value=1.0)


def _inverse_of_blocks(blocks: Tensor, definite: bool) -> Tensor:
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    sound = blocks.isfinite().flatten(1).all(1)
    safe = torch.where(sound[:, None, None], blocks, eye)
    if definite:
        L, info = torch.linalg.cholesky_ex(safe)
        inverse = torch.cholesky_solve(eye.expand_as(safe), torch.where((info == 0)[:, None, None], L, eye))
    else:
        inverse, info = torch.linalg.inv_ex(safe)
    good = sound & (info == 0) & inverse.isfinite().flatten(1).all(1)
    return torch.where(good[:, None, None], inverse, eye)


class FlatPreconditioner:
    """A preconditioner, given as an operator or as a function of trees, as a function of flat vectors."""

    def __init__(self, M: Preconditioner, unravel: Callable[[Tensor], Tree]):
        self.M, self.unravel = M, unravel

    def product(self) -> Product:
        """The product with a flat vector, the operator bound once."""
        if isinstance(self.M, LinearOperator):
            return self.M.bind(*self.M.parameters).matvec
        function, unravel = self.M, self.unravel
        return lambda r: tree.ravel(function(unravel(r)))[0]

    def transpose(self) -> "FlatPreconditioner | None":
        """The transposed one, for an operator; a function cannot be transposed."""
        return FlatPreconditioner(self.M.transpose(), self.unravel) if isinstance(self.M, LinearOperator) else None


def flattened(solver, operator: LinearOperator):
    """The solver with its preconditioner as a function of flat vectors."""
    M = solver.preconditioner
    if M is None or isinstance(M, FlatPreconditioner):
        return solver
    if not isinstance(M, LinearOperator) and not callable(M):
        raise TypeError(
            f"a preconditioner must be an operator, such as matrix_operator(M), or a function; got {type(M).__name__}"
        )
    if isinstance(M, LinearOperator) and M.shape != operator.shape:
        raise ValueError(f"the preconditioner must have shape {operator.shape}; got {M.shape}")
    return dataclasses.replace(solver, preconditioner=FlatPreconditioner(M, operator.codomain.unravel))


def product_of(solver) -> Product:
    """The product with the solver's preconditioner, the identity where there is none."""
    M = solver.preconditioner
    if M is None:
        return lambda r: r
    return M.product()


def transposed_of(solver):
    """The solver with its preconditioner transposed where it can be, and without one else."""
    transpose = getattr(solver.preconditioner, "transpose", lambda: None)
    return dataclasses.replace(solver, preconditioner=transpose())
