r"""`linear_solve`: the solution of a linear system, differentiable in the operator and the right side.

.. math:: x = A_\theta^{-1} b, \qquad \bar b = A_\theta^{-\top} \bar x, \qquad
          \bar\theta = -\,\partial_\theta (A_\theta x)^\top\, \bar b

The derivative is a rule, so no solver is differentiated through its iterations, and derivatives of any order are
solves of the same kind.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import any_lane
from diffopt.autodiff.levels import derivative_possible, plain_autograd
from diffopt.linalg.dense import Dense
from diffopt.linalg.gmres import GMRES
from diffopt.linalg.krylov import CG
from diffopt.linalg.operators import Bound, LinearOperator, Space, matrix_operator
from diffopt.linalg.protocol import LinearSolver, Status, nothing_to_solve, prepared
from diffopt.linalg.rules import Again, Alarm, Moved, Pairs, Problem, Solved, solve_by_rule
from diffopt.linalg.stopping import CAUSES as ITERATIVE_CAUSES
from diffopt.linalg.stopping import norm
from diffopt.typing import Tree

__all__ = ["ConvergenceWarning", "LinearSolveError", "LinearStats", "linear_solve", "solve_flat"]

Failure: TypeAlias = Literal["raise", "warn", "ignore"]

DENSE_SIZE = 256


class LinearSolveError(RuntimeError):
    """A linear solve did not converge, or its operator is singular."""


class ConvergenceWarning(UserWarning):
    """A derivative rests on a linear solve that did not converge, and cannot be trusted."""


class LinearStats(NamedTuple):
    r"""How a solve ended; carries no gradient. With several right sides, one entry for each.

    Attributes:
        converged: bool, what `throw=True` would have raised on.
        residual: the relative residual :math:`\|b - A x\| / \|b\|`.
        steps: int, the steps of an iterative solver, 0 for a direct one.
    """

    converged: Tensor
    residual: Tensor
    steps: Tensor


def linear_solve(
    operator: LinearOperator | Tensor,
    b: Tree,
    solver: LinearSolver | None = None,
    *,
    init: Tree = None,
    throw: bool = True,
    has_aux: bool = False,
) -> Any:
    r"""Solve a square linear system.

    .. math:: A_\theta\, x = b

    Differentiable to any order, under every transform, in `b` and in all that the operator depends on. Under `vmap`
    each lane stops on its own.

    Args:
        operator: a square operator, or a matrix of shape `(n, n)`.
        b: a tree like the operator's codomain, floating-point. For a matrix, or an operator on vectors, also several
            right sides as the columns of a tensor of shape `(n, k)`: there is one factorization, and an iterative
            solver stops on each column on its own.
        solver: `Dense()`, `CG(...)`, `GMRES(...)` or another solver of `diffopt.linalg`. None takes `Dense` up to 256
            unknowns or for a diagonal or tridiagonal operator, beyond that `CG` if tagged positive definite, else
            `GMRES`.
        init: where an iterative solver starts, a tree like `x`; carries no gradient.
        throw: whether a failed solve raises (under `vmap`: in any lane). Without, it returns what it has.
        has_aux: whether to return `(x, LinearStats)`, at the cost of one product.

    Returns:
        `x`, a tree like the operator's domain, or of shape `(n, k)`; with `has_aux` a pair of it and its statistics.

    Raises:
        LinearSolveError: if the solve failed and `throw`.
        ValueError: if the operator is not square, a shape does not match, or the solver needs a tag that the operator
            does not have.
        TypeError: if dtypes or devices do not match.
        RuntimeError: under `torch.compile` with an iterative solver.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> torch.func.jacrev(lambda b: linear_solve(A, b))(torch.ones(2))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
        >>> linear_solve(A, torch.eye(2))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    if isinstance(operator, Tensor):
        vector, _ = tree.ravel(b)
        alike = operator.dtype == vector.dtype and operator.device == vector.device
        fits = alike and operator.shape == (vector.numel(), vector.numel())  # else the operator says what is wrong
        whole = fits and not is_columns(b, vector.numel())
        operator = matrix_operator(operator, domain=b, codomain=b) if whole else matrix_operator(operator)
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"linear_solve takes a LinearOperator or a matrix; got {type(operator).__name__}")
    check_solver(solver, "solver")
    if operator.shape[0] != operator.shape[1]:
        raise ValueError(f"linear_solve needs a square operator; got shape {operator.shape}. Use lstsq for others")
    failure: Failure = "raise" if throw else "ignore"
    if has_aux:
        operator = _bound_once(operator)

    def one(b, start=None):
        return _solve(operator, b, solver, start, failure)

    return solve_columns(one, operator, b, init, has_aux)


def solve_flat(
    operator: LinearOperator,
    b: Tensor,
    solver: LinearSolver | None = None,
    *,
    init: Tensor | None = None,
    failure: Failure = "raise",
) -> Tensor:
    """`linear_solve` on flat vectors, with the choice of what a failure does."""
    if operator.shape[0] != operator.shape[1]:
        raise ValueError(f"linear_solve needs a square operator; got shape {operator.shape}")
    return _solve(operator, b, solver, init, failure)[0]


def check_solver(solver: LinearSolver | None, name: str) -> None:
    """Raise unless a linear solver is a value such as `CG()`, or None."""
    if solver is not None and (isinstance(solver, type) or not hasattr(solver, "transposed")):
        raise TypeError(f"{name} must be a linear solver such as Dense() or CG(rtol=1e-6), or None; got {solver!r}")


def report(converged: Tensor, failure: Failure, name: str, causes: str = Dense.causes) -> None:
    """Raise or warn, as asked, where a solve did not converge in some lane."""
    if failure == "ignore" or torch.compiler.is_compiling() or not any_lane(~converged):
        return
    if failure == "warn":
        warnings.warn(
            f"the linear solve of a derivative did not converge ({name}), so that derivative cannot be trusted. "
            f"Likely causes: {causes}",
            ConvergenceWarning,
            stacklevel=2,
        )
        return
    raise LinearSolveError(
        f"{name} did not solve the linear system in every lane. Likely causes: {causes}. Pass throw=False to take the "
        f"result as it is"
    )


def alarm_for(failure: Failure) -> Alarm:
    """What to do with the flag of a solve."""
    return lambda converged, solver: report(
        converged, failure, type(solver).__name__, getattr(solver, "causes", ITERATIVE_CAUSES)
    )


def is_columns(b: Tree, size: int) -> bool:
    """Whether `b` is several vectors of this size, the columns of a matrix."""
    return isinstance(b, Tensor) and b.dim() == 2 and b.shape[0] == size


def solve_columns(
    one: Callable[..., tuple[Tensor, Status]], operator: LinearOperator, b: Tree, init: Tree, has_aux: bool
) -> Any:
    """Solve for one right side, or for each column of several, where the operator acts on vectors."""

    def run(b: Tensor, *start: Tensor) -> Any:
        x, status = one(b, *start)
        return (x, _statistics(operator, b, x, status)) if has_aux else x

    if not (is_columns(b, operator.codomain.size) and _on_vectors(operator.domain) and _on_vectors(operator.codomain)):
        start = () if init is None else (operator.domain.check(init, "init"),)
        found = run(operator.codomain.check(b, "b"), *start)
        return (operator.domain.unravel(found[0]), found[1]) if has_aux else operator.domain.unravel(found)
    operator.codomain.check_kind(b, "b")
    shape = (operator.domain.size, b.shape[1])
    if init is not None and (not isinstance(init, Tensor) or init.shape != shape):
        raise ValueError(f"init must have shape {shape}, a column for each right side")
    if not b.shape[1]:  # torch maps over none only what is elementwise
        none = b.new_zeros(0)
        return (b.new_zeros(shape), LinearStats(none > 0, none, none.long())) if has_aux else b.new_zeros(shape)
    found = torch.func.vmap(run, in_dims=1)(b, *(() if init is None else (init,)))
    return (found[0].mT, found[1]) if has_aux else found.mT


def _bound_once(operator: LinearOperator) -> LinearOperator:
    """The operator, with one binding for the solve and its statistics where no derivative can be asked for."""
    if not _at_rest(operator):
        return operator
    bound = operator.bind(*operator.parameters)

    def bind(*parameters: Tensor) -> Bound:
        same = all(a is b for a, b in zip(parameters, operator.parameters, strict=True))
        return bound if same else operator.bind(*parameters)

    return dataclasses.replace(operator, bind=bind)


def _at_rest(operator: LinearOperator) -> bool:
    """Whether no derivative of the operator can be asked for, and no transform is live."""
    return plain_autograd() and not derivative_possible(operator.parameters)


def _statistics(operator: LinearOperator, b: Tensor, x: Tensor, status: Status) -> LinearStats:
    with torch.no_grad():
        resting = _at_rest(operator)
        bound = operator.bind(*(p if resting else p.detach() for p in operator.parameters))
        b, size = b.detach(), norm(b.detach())
        residual = norm(b - bound.matvec(x.detach())) / torch.where(size > 0, size, 1.0)
    return LinearStats(status.converged, residual, status.steps)


def _on_vectors(space: Space) -> bool:
    example = space.unravel(space.zeros())
    return isinstance(example, Tensor) and example.dim() == 1


def _automatic(operator: LinearOperator) -> LinearSolver:
    if operator.shape[0] <= DENSE_SIZE or operator.tags & {"diagonal", "tridiagonal"}:
        return Dense()
    return CG() if "positive_definite" in operator.tags else GMRES()


def _solve(
    operator: LinearOperator, b: Tensor, solver: LinearSolver | None, init: Tensor | None, failure: Failure
) -> tuple[Tensor, Status]:
    if b.numel() == 0:
        return b.clone(), nothing_to_solve(b)
    operator, solver = prepared(_automatic(operator) if solver is None else solver, operator)
    return solve_by_rule(_SYSTEM, operator, b, solver, init, alarm_for(failure))


def _adjoint(again: Again, solved: Solved, x_bar: Tensor) -> tuple[Tensor, Callable[[], Pairs]]:
    b_bar = again(solved.operator.transpose(), x_bar, solved.solver.transposed())
    return b_bar, lambda: [(-b_bar, solved.x)]


def _tangent(again: Again, solved: Solved, b_dot: Tensor, moved: Moved | None) -> Tensor:
    side = b_dot if moved is None else b_dot - moved(lambda bound: (bound.matvec(solved.x),))[0]
    return again(solved.operator, side, solved.solver)


_SYSTEM = Problem(
    run=lambda solver, bound, b, x, tags: solver.solve(bound, b, x, tags),
    adjoint=_adjoint,
    tangent=_tangent,
    traceable=lambda solver: getattr(solver, "traceable", None),
)
