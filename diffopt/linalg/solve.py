r"""`linear_solve`: the solution of a linear system, differentiable in the operator and the right side.

.. math:: x = A_\theta^{-1} b, \qquad \bar b = A_\theta^{-\top} \bar x, \qquad
          \bar\theta = -\,\partial_\theta (A_\theta x)^\top\, \bar b

The derivative is a rule, so no solver is differentiated through its iterations, and derivatives of any order are
solves of the same kind.
"""

import dataclasses
import warnings
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import any_lane, choose, hoist, jvp, vjp
from diffopt.autodiff.custom_derivative import Rules, by_rule
from diffopt.autodiff.levels import derivative_possible
from diffopt.linalg.dense import Dense
from diffopt.linalg.krylov import CG, GMRES
from diffopt.linalg.operators import Bound, LinearOperator, Tag, matrix_operator
from diffopt.typing import Tree

__all__ = ["ConvergenceWarning", "LinearSolveError", "LinearSolver", "linear_solve", "solve_flat"]

Failure: TypeAlias = Literal["raise", "warn", "ignore"]

_DENSE_SIZE = 256


class LinearSolveError(RuntimeError):
    """A linear solve did not converge, or its operator is singular."""


class ConvergenceWarning(UserWarning):
    """A derivative rests on a linear solve that did not converge, and cannot be trusted."""


class LinearSolver(Protocol):
    """What a linear solver is: a value with these two methods, on flat vectors."""

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Tensor]:
        """The solution of `bound x = b` from the initial guess `x`, and whether it converged."""
        ...

    def transposed(self) -> "LinearSolver":
        """The solver for the transposed system."""
        ...


def linear_solve(
    operator: LinearOperator | Tensor,
    b: Tree,
    solver: LinearSolver | None = None,
    *,
    init: Tree = None,
    throw: bool = True,
) -> Tree:
    r"""Solve a square linear system.

    .. math:: A_\theta\, x = b

    Differentiable to any order, under every transform, in `b` and in all that the operator depends on. Under `vmap`
    each lane stops on its own.

    Args:
        operator: a square operator, or a matrix of shape `(n, n)`.
        b: a tree like the operator's codomain, floating-point.
        solver: `Dense()`, `CG(...)`, `NormalCG(...)` or `GMRES(...)`; None takes `Dense` up to 256 unknowns or for a
            diagonal operator, beyond that `CG` if tagged positive definite, else `GMRES`.
        init: where an iterative solver starts, a tree like `x`; carries no gradient.
        throw: whether a failed solve raises (under `vmap`: in any lane). Without, it returns what it has.

    Returns:
        `x`, a tree like the operator's domain.

    Raises:
        LinearSolveError: if the solve failed and `throw`.
        ValueError: if the operator is not square, a shape does not match, or `CG` meets an operator that is not tagged
            symmetric.
        TypeError: if dtypes or devices do not match.
        RuntimeError: under `torch.compile` with an iterative solver.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> torch.func.jacrev(lambda b: linear_solve(A, b))(torch.ones(2))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    if isinstance(operator, Tensor):
        vector, _ = tree.ravel(b)
        alike = operator.dtype == vector.dtype and operator.device == vector.device
        fits = alike and operator.shape == (vector.numel(), vector.numel())  # else the operator says what is wrong
        operator = matrix_operator(operator, domain=b, codomain=b) if fits else matrix_operator(operator)
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"linear_solve takes a LinearOperator or a matrix; got {type(operator).__name__}")
    check_solver(solver, "solver")
    vector = operator.codomain.check(b, "b")
    start = None if init is None else operator.domain.check(init, "init")
    return operator.domain.unravel(
        solve_flat(operator, vector, solver, init=start, failure="raise" if throw else "ignore")
    )


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
    if b.numel() == 0:
        return b.clone()
    solver = _automatic(operator) if solver is None else solver
    if isinstance(solver, CG):
        if not operator.symmetric:
            raise ValueError(
                "CG needs a symmetric positive definite operator: tag it, as in matrix_operator(A, "
                'tags=["positive_definite"]), or use GMRES or NormalCG'
            )
        if isinstance(solver.damping, Tensor) or solver.damping != 0:
            operator = operator.shifted(solver.damping)
            solver = dataclasses.replace(solver, damping=0.0)
    return _solve(operator, b, _flat_preconditioner(solver, operator), init, failure)


def check_solver(solver: LinearSolver | None, name: str) -> None:
    """Raise unless a linear solver is a value such as `CG()`, or None."""
    if solver is not None and (isinstance(solver, type) or not hasattr(solver, "transposed")):
        raise TypeError(f"{name} must be a linear solver such as Dense() or CG(rtol=1e-6), or None; got {solver!r}")


def _automatic(operator: LinearOperator) -> LinearSolver:
    if operator.shape[0] <= _DENSE_SIZE or "diagonal" in operator.tags:
        return Dense()
    return CG() if "positive_definite" in operator.tags else GMRES()


def _flat_preconditioner(solver, operator):
    """The solver with its preconditioner as a function of flat vectors."""
    M = getattr(solver, "preconditioner", None)
    if M is None or isinstance(M, _FlatProduct):
        return solver
    return dataclasses.replace(solver, preconditioner=_FlatProduct(M, operator.codomain.unravel))


class _FlatProduct:
    """A preconditioner, given as an operator or as a function of trees, as a function of flat vectors."""

    def __init__(self, M, unravel):
        self.M, self.unravel = M, unravel

    def __call__(self, r: Tensor) -> Tensor:
        product = self.M.matvec if isinstance(self.M, LinearOperator) else self.M
        return tree.ravel(product(self.unravel(r)))[0]

    def transpose(self) -> "_FlatProduct | None":
        """The transposed one, for an operator; a function cannot be transposed."""
        return _FlatProduct(self.M.transpose(), self.unravel) if isinstance(self.M, LinearOperator) else None


def _solve(operator: LinearOperator, b: Tensor, solver, init: Tensor | None, failure: Failure) -> Tensor:
    if not torch.compiler.is_compiling() and not derivative_possible((*operator.parameters, b)):
        with torch.no_grad():
            x, converged = solver.solve(operator.bind(*operator.parameters), b, init, operator.tags)
            report(converged, failure, type(solver).__name__)
        return x
    count = len(operator.parameters)
    rebuild, held, _ = hoist(solver)
    extras = [t.detach() for t in ([] if init is None else [init]) + held]  # they do not move the solution

    def at(inputs):
        return dataclasses.replace(operator, parameters=inputs[:count])

    def product(x):
        return lambda *parameters: operator.bind(*parameters).matvec(x)

    def closed(inputs):
        return rebuild(*inputs[len(inputs) - len(held) :])

    def primal(*inputs):
        start = None if init is None else inputs[count + 1]
        x, converged = closed(inputs).solve(operator.bind(*inputs[:count]), inputs[count], start, operator.tags)
        report(converged, failure, type(solver).__name__)
        return (x,)

    def vjp_rule(inputs, outputs, cotangents, wanted):
        b_bar = _solve(at(inputs).transpose(), cotangents[0], closed(inputs).transposed(), None, failure)
        chosen = wanted[:count]
        part, primals = choose(product(outputs[0]), inputs[:count], chosen)
        found = iter(vjp(part, *primals)[1](-b_bar)) if primals else iter(())
        return (*(next(found) if c else None for c in chosen), b_bar, *(None for _ in extras))

    def jvp_rule(inputs, outputs, tangents):
        chosen = tuple(t is not None for t in tangents[:count])
        part, primals = choose(product(outputs[0]), inputs[:count], chosen)
        side = tangents[count]
        if primals:
            side = side - jvp(part, primals, [t for t in tangents[:count] if t is not None])[1]
        return (_solve(at(inputs), side, closed(inputs), None, failure),)

    def traceable(*inputs):
        return (solver.traceable(operator.bind(*inputs[:count]), inputs[count], operator.tags),)

    solve = by_rule(Rules(primal, vjp_rule, jvp_rule, "vmap"), traceable if isinstance(solver, Dense) else None)
    return solve(*operator.parameters, b, *extras)[0]


def report(converged: Tensor, failure: Failure, name: str) -> None:
    if failure == "ignore" or not any_lane(~converged):
        return
    causes = (
        "the matrix is singular, or not symmetric positive definite although it is tagged so, or holds NaN"
        if name == "Dense"
        else "the operator is singular, ill-conditioned or holds NaN; it is not positive definite (for CG); or "
        "max_steps is too small or rtol too tight for its dtype"
    )
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
