r"""Solutions as differentiable functions of an operator's parameters and of the right side, by a rule of their own.

A problem says how it is solved, and how its derivatives are made of more solves of its kind. All else is the same for
linear systems and for least squares: the parameters' cotangent is that of a sum of products,

.. math:: \bar\theta = \partial_\theta \sum_i u_i^\top A_\theta v_i
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt.autodiff import choose, hoist, jvp, vjp
from diffopt.autodiff.custom_derivative import Rules, by_rule
from diffopt.autodiff.levels import batched_at_most
from diffopt.linalg.operators import Bound, LinearOperator, Tag
from diffopt.linalg.protocol import LinearSolver, Status

__all__ = ["Again", "Alarm", "Moved", "Pairs", "Problem", "Solved", "solve_by_rule"]

Again: TypeAlias = Callable[[LinearOperator, Tensor, LinearSolver], Tensor]
Alarm: TypeAlias = Callable[[Tensor, LinearSolver], None]
Moved: TypeAlias = Callable[[Callable[[Bound], tuple[Tensor, ...]]], tuple[Tensor, ...]]
Pairs: TypeAlias = list[tuple[Tensor, Tensor]]


class Solved(NamedTuple):
    """A solved problem, as its derivatives see it."""

    operator: LinearOperator
    solver: LinearSolver
    b: Tensor
    x: Tensor


class Problem(NamedTuple):
    """A kind of problem.

    Args:
        run: `(solver, bound, b, x, tags) -> (x, status)`.
        adjoint: `(again, solved, x_bar) -> (b_bar, pairs)`, where `pairs()` gives the `(u, v)` of the products.
        tangent: `(again, solved, b_dot, moved) -> x_dot`, where `moved` differentiates a function of the bound operator
            in its parameters; None where they do not move.
        traceable: `(solver, bound, b, tags) -> x` in plain differentiable operations, or None if the solver has none.
    """

    run: Callable[[LinearSolver, Bound, Tensor, Tensor | None, frozenset[Tag]], tuple[Tensor, Status | Tensor]]
    adjoint: Callable[[Again, Solved, Tensor], tuple[Tensor, Callable[[], Pairs]]]
    tangent: Callable[[Again, Solved, Tensor, Moved | None], Tensor]
    traceable: Callable[[LinearSolver], Callable[[Bound, Tensor, frozenset[Tag]], Tensor] | None]


def solve_by_rule(
    problem: Problem, operator: LinearOperator, b: Tensor, solver: LinearSolver, init: Tensor | None, alarm: Alarm
) -> tuple[Tensor, Status]:
    """The solution of a problem on flat vectors, differentiable by its rule.

    Args:
        problem: the kind.
        operator: the operator, accepted by the solver.
        b: the right side.
        solver: the solver.
        init: the initial guess or None; carries no gradient.
        alarm: called with the flag of each solve, here and in derivatives, and its solver.

    Returns:
        The solution, and its status, which carries no gradient.
    """
    if getattr(solver, "truncated", False):  # a finite sum, to be differentiated as what it is
        start = None if init is None else init.detach()
        return _run(problem, solver, operator.bind(*operator.parameters), b, start, operator.tags, alarm)
    # compiled code has no iterative solver with a rule, but no rule is needed where no derivative can be asked for
    compiled_alone = torch.compiler.is_compiling() and not torch.is_grad_enabled() and problem.traceable(solver) is None
    if compiled_alone or batched_at_most((*operator.parameters, b)):
        with torch.no_grad():
            return _run(problem, solver, operator.bind_values(*operator.parameters), b, init, operator.tags, alarm)
    count = len(operator.parameters)
    rebuild, held, _ = hoist(solver)
    extras = [t.detach() for t in ([] if init is None else [init]) + held]  # they do not move the solution

    def again(operator, b, solver):
        return solve_by_rule(problem, operator, b, solver, None, alarm)[0]

    def closed(inputs):
        return rebuild(*inputs[len(inputs) - len(held) :])

    def solved(inputs, x):
        return Solved(dataclasses.replace(operator, parameters=inputs[:count]), closed(inputs), inputs[count], x)

    def primal(*inputs):
        start = None if init is None else inputs[count + 1]
        bound = operator.bind_values(*inputs[:count])
        x, status = _run(problem, closed(inputs), bound, inputs[count], start, operator.tags, alarm)
        return x, *status

    def vjp_rule(inputs, outputs, cotangents, wanted):
        b_bar, pairs = problem.adjoint(again, solved(inputs, outputs[0]), cotangents[0])
        chosen = wanted[:count]
        found = iter(_pull(operator.bind, inputs[:count], chosen, pairs()) if any(chosen) else ())
        return (*(next(found) if c else None for c in chosen), b_bar, *(None for _ in extras))

    def jvp_rule(inputs, outputs, tangents):
        moved = _push(operator.bind, inputs[:count], tangents[:count])
        return problem.tangent(again, solved(inputs, outputs[0]), tangents[count], moved), None, None

    plain = problem.traceable(solver)

    def traceable(*inputs):
        assert plain is not None
        x = plain(operator.bind(*inputs[:count]), inputs[count], operator.tags)
        return x, x.isfinite().all(), torch.zeros((), dtype=torch.int64, device=x.device)

    solve = by_rule(Rules(primal, vjp_rule, jvp_rule, "vmap"), None if plain is None else traceable)
    x, converged, steps = solve(*operator.parameters, b, *extras)
    return x, Status(converged.detach(), steps.detach())


def _run(problem, solver, bound, b, x, tags, alarm):
    x, status = problem.run(solver, bound, b, x, tags)
    if isinstance(status, Tensor):
        status = Status(status, torch.zeros((), dtype=torch.int64, device=x.device))
    alarm(status.converged, solver)
    return x, status


def _pull(bind, parameters, chosen, pairs: Pairs) -> tuple[Tensor, ...]:
    """The cotangents of the chosen parameters, of the sum of `u^T A v` over the pairs."""

    def products(*parameters):
        bound = bind(*parameters)
        return tuple(bound.matvec(v) for _, v in pairs)

    part, primals = choose(products, parameters, chosen)
    return vjp(part, *primals)[1](*(u for u, _ in pairs))


def _push(bind, parameters, tangents) -> Moved | None:
    chosen = tuple(t is not None for t in tangents)
    if not any(chosen):
        return None

    def moved(products):
        part, primals = choose(lambda *parameters: products(bind(*parameters)), parameters, chosen)
        return jvp(part, primals, [t for t in tangents if t is not None])[1]

    return moved
