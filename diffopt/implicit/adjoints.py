r"""Adjoints as values: how the derivative of a solution :math:`x^\star(\theta)` is taken.

Let :math:`F(x, \theta) = 0` be the equation of a problem and :math:`x_{k+1} = s(x_k, \theta)` the steps that solve it.

- `Implicit`: :math:`\partial x^\star = -(\partial_x F)^{-1}\,\partial_\theta F`, exact where the solution is;
- `Unrolled`: the derivative of the steps taken, or of the last of them;
- `OneStep`: :math:`-\eta\,\partial_\theta F`, no solve at all;
- `Detached`: none.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import grad, hoist, unroll
from diffopt.autodiff.levels import unwrap_lanes
from diffopt.implicit.decorators import custom_root
from diffopt.implicit.protocol import Batching, Info, Response, unsolved
from diffopt.implicit.root import believed_tags
from diffopt.linalg import LinearSolver, jacobian_operator, linear_solve
from diffopt.linalg.solve import check_solver
from diffopt.typing import Tree

__all__ = ["Detached", "Implicit", "OneStep", "Unrolled", "pulled"]


@dataclasses.dataclass(frozen=True)
class Implicit:
    r"""The derivative by the implicit function theorem, whatever the solver did.

    .. math:: \partial x^\star = -\,(\partial_x F)^{-1}\,\partial_\theta F

    Exact to any order at a solution, in memory that does not grow with the steps; the error of an inexact solution
    enters (see `diagnose`).

    Args:
        linear_solver: For the adjoint system; None takes `Dense` up to 256 unknowns, beyond that `CG` for minimizers of
            smooth functions and `GMRES` for all else.

    Raises:
        TypeError: If `linear_solver` is not a linear solver.

    References:
        Blondel et al. (2022), Efficient and modular implicit differentiation, eq. 2.
    """

    linear_solver: LinearSolver | None = None

    retraces: ClassVar[bool] = False
    moves: ClassVar[bool] = False

    def __post_init__(self):
        check_solver(self.linear_solver, "linear_solver")

    def solve(self, run, equation, init, args, *, batching: Batching = "vmap"):
        """See `Adjoint`."""
        decorate = custom_root(
            equation.residual,
            solve=self.linear_solver,
            symmetric=equation.symmetric,
            has_aux=True,
            batching=batching,
        )
        return decorate(run)(init, *args)

    def begin(self, x, key):
        """The adjoint, where the next solve starts."""
        return tree.zeros_like(x)

    def pull(self, response, cotangent, state):
        """See `Adjoint`."""
        solver, x, equation = self.linear_solver, response.x, response.equation
        tags = believed_tags(equation.symmetric, solver, sum(leaf.numel() for leaf in tree.leaves(x)))
        jacobian = jacobian_operator(equation.residual, x, *response.args, tags=tags, codomain=x)
        jacobian = jacobian.transpose(trusted=equation.symmetric)
        start = None if getattr(solver, "truncated", False) else state
        u, stats = linear_solve(
            jacobian, cotangent, solver and solver.transposed(), init=start, throw=False, has_aux=True
        )
        # of a cotangent with NaN an iterative solver keeps its start: not what is to be told, nor where to start again
        lost, worse = stats.residual.isnan(), stats.residual > 1  # worse than none: no place to start from either
        later = tree.map(lambda new, old: torch.where(lost, old, torch.where(worse, 0.0, new.detach())), u, state)
        u = tree.map(lambda u: torch.where(lost, torch.nan, u), u)
        return pulled(response, u), later, Info(stats.residual, stats.steps)

    def respond(self, response, state):
        """See `Adjoint`."""
        return self.solve(_held, response.equation, response.x, response.args)[0]


@dataclasses.dataclass(frozen=True)
class Unrolled:
    r"""The derivative of the steps themselves.

    .. math:: \partial x_{k+1} = \partial_x s\,\partial x_k + \partial_\theta s

    Right also where the solver did not converge; without `truncate`, the start carries gradient, too. Choices that the
    steps make (step sizes found by halving, when to stop) are constants. It is the derivative of the steps taken and no
    more: where the start already is a solution, that is none. So start away from it, or take `truncate` or `Implicit`.
    Derivatives of steps may grow while the iterates converge: through many steps of `LBFGS`, `NonlinearCG` or `Aitken`
    they are often of no use, where those of `NewtonCG` or `GradientDescent` are.

    Args:
        checkpoint: None stores every step; "sqrt", "log" or an int store fewer carries and compute steps again, as in
            `unroll`. The solve then runs twice: first to count its steps.
        truncate: k solves without derivative, then takes k more steps and differentiates those alone. Solvers that
            learn the curvature from their steps, or adapt a radius, a damping or a penalty by them, refuse: at a
            solution those steps are rounding errors.

    Raises:
        ValueError: If an option is none of these; when used, if the solver's steps have no such derivative.

    References:
        Domke (2012), Generic methods for optimization-based modeling. Shaban et al. (2019), Truncated back-propagation
        for bilevel optimization, eq. 8.
    """

    checkpoint: Literal["sqrt", "log"] | int | None = None
    truncate: int | None = None

    retraces: ClassVar[bool] = True
    moves: ClassVar[bool] = False

    def __post_init__(self):
        if self.truncate is not None and not _positive_int(self.truncate):
            raise ValueError(f"truncate must be None or a positive int; got {self.truncate!r}")
        if self.checkpoint not in (None, "sqrt", "log") and not _positive_int(self.checkpoint):
            raise ValueError(f'checkpoint must be None, "sqrt", "log" or a positive int; got {self.checkpoint!r}')

    def solve(self, run, equation, init, args, *, batching: Batching = "vmap"):
        """See `Adjoint`."""
        if batching == "sequential":
            raise ValueError("this solver's steps are not torch operations and cannot be unrolled: use Implicit()")
        if not run.unrollable:
            raise ValueError("this solver compares values, and its steps have no derivative: use Implicit()")
        if self.truncate is not None and not run.truncatable:
            raise ValueError(
                "this solver learns the curvature from its steps, or searches anew in each, which at a solution is all "
                "rounding errors, so the last steps alone have no meaningful derivative: use Implicit(), or Unrolled() "
                "without truncate"
            )
        carry = run.start(init, *args)
        if self.checkpoint is None and self.truncate is None:
            return _without_aux_gradient(run.finish(run.run(carry, init, *args), init))
        frozen_run, frozen_init, frozen_args = _frozen(run, init, args)
        end = frozen_run.run(frozen_run.start(frozen_init, *frozen_args), frozen_init, *frozen_args)
        if self.truncate is not None:
            carry, length = end, self.truncate
            step = lambda carry, _: (run.step(carry, init, *args), None)  # noqa: E731
        else:
            length = int(unwrap_lanes(end.steps).max()) if end.steps.numel() else 0
            step = lambda carry, _: (run.run(carry, init, *args, max_steps=1), None)  # noqa: E731
        carry, _ = unroll(step, carry, length=length, checkpoint=self.checkpoint)
        return _without_aux_gradient(run.finish(carry, init))

    def begin(self, x, key):
        """Nothing."""
        return ()

    def pull(self, response, cotangent, state):
        """See `Adjoint`."""
        along = lambda *args: tree.vdot(cotangent, response.retrace(self.truncate, self.checkpoint, *args))  # noqa: E731
        return _gradients(along, response.args), state, unsolved(response.x)

    def respond(self, response, state):
        """See `Adjoint`."""
        return response.retrace(self.truncate, self.checkpoint, *response.args)


@dataclasses.dataclass(frozen=True)
class OneStep:
    r"""The derivative of one step of the equation's own iteration, at the solution.

    .. math:: x^\star - \eta\,F(x^\star, \theta), \qquad \partial x^\star \approx -\,\eta\,\partial_\theta F

    Of a fixed point, and with :math:`\eta = 1`, that is the derivative of :math:`T(x^\star, \theta)`. No system is
    solved; the relative error is the rate :math:`|I - \eta\,\partial_x F|` at which that iteration contracts.

    Args:
        step_size: :math:`\eta`. The default is for fixed points, and for projections and proximal operators with a
            smooth part of curvature about 1. Of `root` and `minimize` the equation is as you scaled it: give
            :math:`1 / L` for a minimizer of curvature up to `L`, or :math:`2 / (L + m)` for one between `m` and `L`,
            or the error is no smaller than the derivative. Not for `equality` and `inequality`: a step of their
            equation does not contract, and the derivative of the unknowns in a parameter of a constraint is 0.

    Raises:
        TypeError: If `step_size` is not a number or a tensor.

    References:
        Bolte, Pauwels and Vaiter (2023), One-step differentiation of iterative algorithms, eq. 4.
    """

    step_size: float | Tensor = 1.0

    retraces: ClassVar[bool] = False
    moves: ClassVar[bool] = False

    def __post_init__(self):
        if not isinstance(self.step_size, (int, float, Tensor)):
            raise TypeError(f"step_size must be a number or a tensor; got {self.step_size!r}")

    def solve(self, run, equation, init, args, *, batching: Batching = "vmap"):
        """See `Adjoint`."""
        x, aux = Detached().solve(run, equation, init, args, batching=batching)
        residual = equation.residual(x, *args)
        # the value stays the solver's: what is left of the residual there is no part of it
        return tree.map(lambda x, r: x - self.step_size * (r - r.detach()), x, residual), aux

    def begin(self, x, key):
        """Nothing."""
        return ()

    def pull(self, response, cotangent, state):
        """See `Adjoint`."""
        u = tree.map(lambda v: self.step_size * v, cotangent)
        return pulled(response, u), state, unsolved(response.x)

    def respond(self, response, state):
        """See `Adjoint`."""
        return self.solve(_held, response.equation, response.x, response.args)[0]


@dataclasses.dataclass(frozen=True)
class Detached:
    """No derivative: the solution is a constant."""

    retraces: ClassVar[bool] = False
    moves: ClassVar[bool] = False

    def solve(self, run, equation, init, args, *, batching: Batching = "vmap"):
        """See `Adjoint`."""
        run, init, args = _frozen(run, init, args)
        decorate = custom_root(_no_equation, has_aux=True, batching=batching)
        x, aux = decorate(run)(init, *args)
        return tree.map(torch.detach, x), aux

    def begin(self, x, key):
        """Nothing."""
        return ()

    def pull(self, response, cotangent, state):
        """See `Adjoint`."""
        return tuple(map(tree.zeros_like, response.args)), state, unsolved(response.x)

    def respond(self, response, state):
        """See `Adjoint`."""
        return tree.map(torch.detach, response.x)


def pulled(response: Response, u: Tree) -> tuple[Tree, ...]:
    r"""The cotangents :math:`-\,\partial_\theta F^\top u` of a response's arguments."""
    along = lambda *args: -tree.vdot(u, response.equation.residual(response.x, *args))  # noqa: E731
    return _gradients(along, response.args)


def _gradients(fn: Callable[..., Tensor], args: tuple) -> tuple[Tree, ...]:
    return grad(fn, argnums=tuple(range(len(args))))(*args) if args else ()


def _held(init: Tree, *args: Tree) -> tuple[Tree, Any]:
    """A solver that is at its solution already."""
    return init, ()


def _positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _no_equation(x: Tree, *args: Any, **kwargs: Any) -> Tree:
    return x


def _frozen(run: Any, init: Tree, args: tuple) -> tuple[Any, Tree, tuple]:
    """The same solve, with every tensor that it depends on detached."""
    rebuild, captured, _ = hoist(run)
    tensors, merge = tree.partition((init, args))
    init, args = merge([t.detach() for t in tensors])
    return rebuild(*(t.detach() for t in captured)), init, args


def _without_aux_gradient(found: tuple[Tree, Any]) -> tuple[Tree, Any]:
    x, aux = found
    tensors, merge = tree.partition(aux)
    return x, merge([t.detach() for t in tensors])
