r"""`lstsq`: the least-squares solution of least norm, differentiable in the operator and the right side.

.. math:: x = A_\theta^+ b

The derivative is that of the pseudo-inverse where the rank is constant, made of more such solutions,

.. math:: \dot x = A^+ (\dot b - \dot A x) + A^+ A^{+\top} \dot A^\top (b - A x)
          + (I - A^+ A)\, \dot A^\top A^{+\top} x

The second part vanishes for full row rank, the third for full column rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt.autodiff import any_lane
from diffopt.linalg.factorizations import QR
from diffopt.linalg.lsmr import LSMR
from diffopt.linalg.operators import Bound, LinearOperator, Space, matrix_operator
from diffopt.linalg.protocol import LinearSolver, nothing_to_solve
from diffopt.linalg.rules import Again, Moved, Pairs, Problem, Solved, solve_by_rule
from diffopt.linalg.solve import alarm_for, check_solver, solve_columns
from diffopt.typing import Tree

__all__ = ["lstsq"]

_DENSE_SIZE = 256


def lstsq(
    operator: LinearOperator | Tensor,
    b: Tree,
    solver: LinearSolver | None = None,
    *,
    damping: float | Tensor = 0.0,
    init: Tree = None,
    throw: bool = True,
    has_aux: bool = False,
) -> Any:
    r"""Solve a linear system of any shape in the sense of least squares.

    .. math:: x = A_\theta^+ b = \arg\min_x \|x\| \text{ among } \arg\min_x \|A_\theta x - b\|^2 + \lambda \|x\|^2

    Differentiable to any order, under every transform, in `b`, in the damping and in all that the operator depends on,
    where the rank is constant nearby.

    Args:
        operator: an operator, or a matrix of shape `(m, n)`: tall, wide or square.
        b: a tree like the operator's codomain, floating-point. For a matrix, or an operator on vectors, also several
            right sides as the columns of a tensor of shape `(m, k)`, solved by one factorization.
        solver: `QR()` for full rank, `SVD(rcond)` for any rank, `LSMR(...)` for any rank by products alone. None takes
            `QR` if m or n is at most 256, or the operator is a matrix, else `LSMR`.
        damping: :math:`\lambda \ge 0`; a tensor must be positive, and carries gradient.
        init: where `LSMR` starts, a tree like `x`; carries no gradient. The operator must be tall and have full rank,
            or be damped: else the solution of least norm is not what is found from there.
        throw: whether a failed solve raises (under `vmap`: in any lane). Without, it returns what it has.
        has_aux: whether to return `(x, LinearStats)`, at the cost of one product. Its residual is that of the system,
            which is not small where no x solves it.

    Returns:
        `x`, a tree like the operator's domain, or of shape `(n, k)`; with `has_aux` a pair of it and its statistics.

    Raises:
        LinearSolveError: if the solve failed and `throw`; for `QR`, also if the rank is not full.
        ValueError: if a shape does not match, the damping is not positive, or `init` is given for a wide operator.
        TypeError: if dtypes or devices do not match, or the solver is not one for least squares.
        RuntimeError: under `torch.compile` with `LSMR`.

    Example:
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
        >>> lstsq(A, torch.tensor([1.0, 2.0, 4.0]))
        tensor([0.8333, 1.5000])
        >>> lstsq(A.T, torch.tensor([3.0, 3.0]))
        tensor([1.0000, 1.0000, 1.0000])

    References:
        Golub and Pereyra (1973), The differentiation of pseudo-inverses, eq. 4.12.
    """
    if isinstance(operator, Tensor):
        operator = matrix_operator(operator)
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"lstsq takes a LinearOperator or a matrix; got {type(operator).__name__}")
    check_solver(solver, "solver")
    solver = _automatic(operator) if solver is None else solver
    if not hasattr(solver, "least_squares"):
        raise TypeError(f"lstsq takes QR(), SVD() or LSMR(); got {solver!r}. For square systems use linear_solve")
    damped = _check_damping(damping)
    if init is not None and operator.shape[0] < operator.shape[1] and not damped:
        raise ValueError("init needs a tall or damped operator: from a guess, a wide one has not the least norm")
    full = damped or solver.full_rank  # pyright: ignore[reportAttributeAccessIssue]
    problem = _FULL_RANK if full else _ANY_RANK
    stacked = _stacked(operator, damping) if damped else operator

    def one(b, start=None):
        if 0 in operator.shape:
            return b.new_zeros(operator.shape[1]) + 0 * b.sum(), nothing_to_solve(b)
        side = torch.cat([b, b.new_zeros(operator.shape[1])]) if damped else b
        return solve_by_rule(problem, stacked, side, solver, start, alarm_for("raise" if throw else "ignore"))

    return solve_columns(one, operator, b, init, has_aux)


def _automatic(operator: LinearOperator) -> LinearSolver:
    small = min(operator.shape) <= _DENSE_SIZE or operator.bind(*operator.parameters).held
    return QR() if small else LSMR()


def _check_damping(damping: float | Tensor) -> bool:
    """Whether there is damping, once it is known to be a non-negative number or a positive tensor."""
    if not isinstance(damping, (int, float, Tensor)) or (isinstance(damping, Tensor) and damping.dim() > 0):
        raise TypeError(f"damping must be a number or a 0-d tensor; got {damping!r}")
    if not isinstance(damping, Tensor):
        if not damping >= 0:
            raise ValueError(f"damping must not be negative; got {damping!r}")
        return damping > 0
    if not torch.compiler.is_compiling() and any_lane(damping <= 0):
        raise ValueError("a tensor damping must be positive; pass 0.0 for none")
    return True


def _stacked(operator: LinearOperator, damping: float | Tensor) -> LinearOperator:
    r"""The operator above :math:`\sqrt\lambda I`, whose least squares are the damped ones."""
    space, (m, n) = operator.domain, operator.shape
    root = torch.as_tensor(damping, dtype=space.dtype, device=space.device).sqrt()

    def bind(*parameters):
        *inner, root = parameters
        bound = operator.bind(*inner)
        return Bound(
            lambda v: torch.cat([bound.matvec(v), root * v]),
            lambda u: bound.rmatvec(u[:m]) + root * u[m:],
            lambda: torch.cat([bound.dense(), root * torch.eye(n, dtype=space.dtype, device=space.device)]),
            bound.held,
        )

    codomain = Space(m + n, space.dtype, space.device, lambda v: v)
    return LinearOperator(bind, (*operator.parameters, root), operator.domain, codomain)


def _problem(full_rank: bool) -> Problem:
    def parts(operator):
        """Whether the second and the third part of the derivative may be other than zero."""
        m, n = operator.shape
        return not full_rank or m > n, not full_rank or m < n

    def adjoint(again: Again, solved: Solved, x_bar: Tensor) -> tuple[Tensor, Callable[[], Pairs]]:
        operator, solver, b, x = solved
        flipped, turned = operator.transpose(), solver.transposed()
        residual, null = parts(operator)
        b_bar = again(flipped, x_bar, turned)

        def pairs():
            found = [(-b_bar, x)]
            product = operator.bind(*operator.parameters).matvec
            if residual:
                found.append((b - product(x), again(operator, b_bar, solver)))
            if null:
                found.append((again(flipped, x, turned), x_bar - again(operator, product(x_bar), solver)))
            return found

        return b_bar, pairs

    def tangent(again: Again, solved: Solved, b_dot: Tensor, moved: Moved | None) -> Tensor:
        operator, solver, b, x = solved
        if moved is None:
            return again(operator, b_dot, solver)
        flipped, turned = operator.transpose(), solver.transposed()
        residual, null = parts(operator)
        product = operator.bind(*operator.parameters).matvec
        r = b - product(x) if residual else None
        y = again(flipped, x, turned) if null else None
        of_x, *of_transpose = moved(
            lambda bound: (bound.matvec(x), *(bound.rmatvec(u) for u in (r, y) if u is not None))
        )
        side = b_dot - of_x
        if residual:
            side = side + again(flipped, of_transpose[0], turned)
        if not null:
            return again(operator, side, solver)
        return again(operator, side - product(of_transpose[-1]), solver) + of_transpose[-1]

    return Problem(
        run=lambda solver, bound, b, x, tags: solver.least_squares(bound, b, x, tags),  # pyright: ignore
        adjoint=adjoint,
        tangent=tangent,
        traceable=lambda solver: getattr(solver, "traceable_least_squares", None),
    )


_FULL_RANK, _ANY_RANK = _problem(True), _problem(False)
