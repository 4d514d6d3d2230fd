r"""`minimize`: minimize a function, with constraints or a non-smooth part, and differentiate the minimizer.

.. math:: x^\star(\theta) \in \arg\min_x f(x, \theta)
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.implicit.adjoints import Implicit, OneStep
from diffopt.implicit.optimality import KKT
from diffopt.implicit.protocol import Adjoint, Equation
from diffopt.solvers.augmented_lagrangian import AugmentedLagrangian
from diffopt.solvers.bounds import check_bounds, crossed_bounds, flat_bounds
from diffopt.solvers.iterate import Norm, Solver, options
from diffopt.solvers.lbfgs import LBFGS
from diffopt.solvers.lbfgsb import LBFGSB
from diffopt.solvers.objective import Objective, Structure
from diffopt.solvers.proximal_gradient import ProximalGradient
from diffopt.solvers.solution import Solution
from diffopt.solvers.verb import solve
from diffopt.typing import Tree

__all__ = ["minimize"]


def minimize(
    fn: Callable[..., Tensor],
    init: Tree,
    args: tuple = (),
    *,
    solver: Solver | None = None,
    bounds: tuple[Tree, Tree] | None = None,
    prox: Callable[[Tree, Any], Tree] | None = None,
    projection: Callable[[Tree], Tree] | None = None,
    equality: Callable[..., Tree] | None = None,
    inequality: Callable[..., Tree] | None = None,
    adjoint: Adjoint | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    norm: Norm = "max",
    max_steps: int = 1000,
    throw: bool | None = None,
    callback: Callable[[Any], None] | None = None,
    history: bool = False,
) -> Solution:
    r"""Minimize :math:`f(x, \theta)` in `x`, smooth, with at most one further structure.

    .. math:: \min_x f(x), \quad \min_x f(x) + g(x), \quad \min_{x \in C} f(x), \quad \min_{l \le x \le u} f(x),
              \quad \min_{h(x) = 0,\, c(x) \le 0} f(x)

    Composes with every transform. Under `vmap` each lane stops on its own. It ends where the residual, which is the
    gradient for a smooth problem, the step of a projected or proximal gradient step of size 1, or the conditions of
    Karush, Kuhn and Tucker, is at most `atol + rtol` times that at the start.

    Args:
        fn: `f(x, *args)`, a scalar, differentiable.
        init: Where to start, a tree of floating-point tensors of one dtype; it carries no gradient.
        args: Further arguments, trees; these, and what the functions capture, are differentiated.
        solver: By default `LBFGS()`; with bounds `LBFGSB()`; with `prox` or `projection` `ProximalGradient()`; with
            constraints `AugmentedLagrangian()`.
        bounds: `(lower, upper)`, each a tree like `init`, a tensor, a number, or None.
        prox: `(x, scaling) -> argmin_y |x - y|^2 / 2 + scaling g(y)`, such as `lambda x, s: prox_lasso(x, l1, s)`.
        projection: `x -> ` the nearest point of a convex set, such as `projection_simplex`.
        equality: `h(x, *args)`, a tree that is to vanish.
        inequality: `c(x, *args)`, a tree that is to be at most 0.
        adjoint: How the solution is differentiated; `Implicit()` by default.
        rtol: Relative tolerance; None is :math:`\varepsilon^{2/3}` of the dtype.
        atol: Absolute tolerance; None is :math:`\varepsilon^{1/2}`.
        norm: "max", "rms", "l2", or a function of the residual.
        max_steps: The most steps.
        throw: Whether to raise where a lane fails; by default in eager code. Without, the best iterate is returned.
        callback: Called with the solver's state after every step.
        history: Whether to record the norm of every step, in `stats.history`.

    Returns:
        The solution; with constraints, `dual` is the pair of trees of multipliers, differentiable too.

    Raises:
        SolverError: If a lane did not converge, and `throw` is not False.
        ValueError: If `fn` is not scalar, structures are combined, or the solver or the adjoint is not for this
            structure.

    Example:
        >>> import torch
        >>> loss = lambda x, a: ((x - a) ** 2).sum() + (x**4).sum()
        >>> solution = minimize(loss, torch.zeros(2), (torch.tensor([1.0, 3.0]),))
        >>> solution.value
        tensor([0.5898, 1.0000])

    References:
        Nocedal and Wright (2006), Numerical Optimization, chapters 6, 7 and 17. Parikh and Boyd (2014), Proximal
        algorithms, section 4.2.
    """
    settings = options(rtol, atol, norm, max_steps, callback, history)
    constrained = equality is not None or inequality is not None
    given = {"bounds": bounds, "prox": prox, "projection": projection, "equality or inequality": constrained or None}
    found = [name for name, value in given.items() if value is not None]
    if len(found) > 1:
        raise ValueError(f"minimize takes one structure; got {' and '.join(found)}. Write one as a constraint")
    check_bounds(bounds)
    tree.check_tensors(init, name="init")
    if projection is not None:
        prox = lambda x, scaling: projection(x)  # noqa: E731
    start = _with_multipliers(init, args, equality, inequality) if constrained else init
    structure = (
        "constraints" if constrained else "bounds" if bounds is not None else "prox" if prox is not None else None
    )
    edges = getattr(solver, "interval", None) if bounds is None else bounds
    problem = functools.partial(_objective, fn, prox, edges, equality, inequality, tree.map(torch.detach, init))

    def optimality(y: Tree, *args: Tree) -> Tree:
        if structure is None and getattr(solver, "hides_set", False):
            raise ValueError(
                f"the set of {type(solver).__name__} is hidden from minimize: give projection= onto the same set, by "
                "which its solution is differentiated, or use adjoint=Unrolled() or Detached()"
            )
        vector, unravel = tree.ravel(y)
        return unravel(problem(unravel, args).optimality(vector))

    solver = _DEFAULTS[structure] if solver is None else solver
    if structure is not None and structure not in getattr(solver, "handles", ()):
        raise ValueError(f"{type(solver).__name__} cannot handle {found[0]}; {_ADVICE[structure]}")
    if constrained and isinstance(adjoint, OneStep):
        raise ValueError(
            "OneStep is no derivative of a constrained minimizer, as its equation is no contraction; use "
            "Implicit() or Unrolled()"
        )
    solution = solve(
        "minimize", solver, problem, Equation(optimality, symmetric=structure is None), start, args,
        adjoint=Implicit() if adjoint is None else adjoint, settings=settings, throw=throw,
        refused=crossed_bounds(bounds, init),
    )  # fmt: skip
    if not constrained:
        return solution
    point = solution.value
    return solution._replace(value=point.primal, dual=(point.equality, point.inequality))


_ADVICE = {
    "bounds": "use LBFGSB() or ProximalGradient()",
    "prox": "use ProximalGradient(), ADMM() or BlockCoordinateDescent()",
    "constraints": "use AugmentedLagrangian()",
}


# made here, as torch.compile does not trace the making of solvers that hold others
_DEFAULTS: dict[Structure | None, Any] = {
    None: LBFGS(),
    "bounds": LBFGSB(),
    "prox": ProximalGradient(),
    "constraints": AugmentedLagrangian(),
}


def _with_multipliers(init: Tree, args: tuple, equality, inequality) -> KKT:
    """The start with a multiplier of 0 for each constraint."""
    given = ("equality", equality), ("inequality", inequality)
    return KKT(init, *(() if c is None else _zeros(c(init, *args), name, init) for name, c in given))


def _zeros(value: Tree, name: str, init: Tree) -> Tree:
    """A zero for each value of a constraint, which must be numbers of the unknowns' dtype."""
    tree.check_tensors(value, name=f"the value of {name}")
    dtype = tree.leaves(init)[0].dtype
    found = [v.dtype for v in tree.leaves(value)]
    if not found:
        raise ValueError(f"{name} must return at least one tensor; got {value!r}")
    if any(d != dtype for d in found):
        raise TypeError(f"{name} must return tensors of the dtype of init, {dtype}; got {found}")
    return tree.map(lambda v: torch.zeros_like(v.detach()), value)


def _objective(fn, prox, bounds, equality, inequality, init: Tree, unravel: Callable, args: tuple) -> Objective:
    """The problem on flat vectors; `unravel` gives the tree of the unknowns, or a `KKT` point."""
    example, unravel = tree.ravel(init)

    def value(x):
        out = fn(unravel(x), *args)
        if not isinstance(out, Tensor) or out.ndim != 0:
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"minimize needs a function of a scalar value, a 0-d tensor; got {found}. Sum it first")
        if not (out.is_floating_point() or out.is_complex()):
            raise TypeError(f"minimize needs a differentiable function, of a floating-point value; got {out.dtype}")
        return out

    def on_vectors(x, scaling):
        moved = prox(unravel(x), scaling)
        tree.check_like(moved, init, name="the value of prox or projection", reference_name="init")
        return tree.ravel(moved)[0]

    if equality is None and inequality is None:
        return Objective(value, None if prox is None else on_vectors, *flat_bounds(bounds, init), unravel=unravel)
    h, c = (None if g is None else lambda x, g=g: tree.ravel(g(unravel(x), *args))[0] for g in (equality, inequality))
    equations, inequalities = (0 if g is None else g(example.detach()).numel() for g in (h, c))
    sizes = example.numel(), equations, inequalities
    return Objective(value, equality=h, inequality=c, sizes=sizes, unravel=unravel)
