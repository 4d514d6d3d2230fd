r"""The mathematics of implicit differentiation: derivatives of a root in what its equation depends on.

.. math:: F(x^\star(\theta), \theta) = 0 \;\Rightarrow\; \partial_x F\,\dot x = -\,\partial_\theta F\,\dot\theta,
          \qquad \bar\theta = -\,\partial_\theta F^\top u, \quad \partial_x F^\top u = \bar x

Both rules are differentiable, so derivatives of any order follow.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import check_closed, choose, hoist, jvp, vjp
from diffopt.autodiff.custom_derivative import Partial, Tensors
from diffopt.autodiff.gradients import pullbacks
from diffopt.autodiff.levels import derivative_possible, derivative_wanted, plain_autograd
from diffopt.linalg import CG, Dense, LinearSolver, Tag
from diffopt.linalg.derivatives import flat_jacobian
from diffopt.linalg.operators import FEW, Space
from diffopt.linalg.solve import DENSE_SIZE, report, solve_flat
from diffopt.typing import Tree

__all__ = ["believed_tags", "root_jvp", "root_rules", "root_vjp"]

FlatEquation: TypeAlias = Callable[..., Tensor]


def root_vjp(
    optimality_fun: Callable[..., Tree],
    sol: Tree,
    args: tuple[Tree, ...],
    cotangent: Tree,
    *,
    solve: LinearSolver | None = None,
    symmetric: bool = False,
) -> tuple[Tree, ...]:
    r"""Pull a cotangent of a root back to the arguments of its equation.

    .. math:: \bar\theta = -\,\partial_\theta F(x^\star, \theta)^\top u, \qquad
              \partial_x F(x^\star, \theta)^\top u = \bar x

    Args:
        optimality_fun: `F(x, *args)`, shaped like `x` and zero at the root.
        sol: the root, a tree of floating-point tensors of one dtype.
        args: trees; leaves that are not tensors are static.
        cotangent: a tree like `sol`.
        solve: the linear solver; None takes `Dense` up to 256 unknowns, beyond that `CG` if `symmetric`, else `GMRES`.
        symmetric: whether the Jacobian in `x` is symmetric positive definite, as for the gradient of a convex function.

    Returns:
        One tree for each of `args`, with None at leaves that are not floating-point tensors.

    Raises:
        ValueError: if `optimality_fun` or `cotangent` is not shaped like `sol`.
        TypeError: if dtypes or devices are mixed.

    Example:
        >>> import torch
        >>> root_vjp(lambda x, a: x**2 - a, torch.tensor(3.0), (torch.tensor(9.0),), torch.tensor(1.0))
        (tensor(0.1667),)

    References:
        Blondel et al. (2022), Efficient and modular implicit differentiation, eq. 3.
    """
    tree.check_like(cotangent, sol, name="cotangent", reference_name="sol")
    (rule, _), x, inputs, merge = _prepare(optimality_fun, sol, args, solve, symmetric)
    count = len(tree.partition(args)[0])
    wanted = tuple(i < count and t.is_floating_point() for i, t in enumerate(inputs))
    return merge(rule(inputs, (x,), (tree.ravel(cotangent)[0],), wanted)[:count])


def root_jvp(
    optimality_fun: Callable[..., Tree],
    sol: Tree,
    args: tuple[Tree, ...],
    tangents: tuple[Tree, ...],
    *,
    solve: LinearSolver | None = None,
    symmetric: bool = False,
) -> Tree:
    r"""Push tangents of the arguments of an equation forward to its root.

    .. math:: \partial_x F(x^\star, \theta)\,\dot x = -\,\partial_\theta F(x^\star, \theta)\,\dot\theta

    Args:
        optimality_fun: `F(x, *args)`, shaped like `x` and zero at the root.
        sol: the root, a tree of floating-point tensors of one dtype.
        args: trees; leaves that are not tensors are static.
        tangents: like `args`; leaves of static or integer arguments are ignored.
        solve: as in `root_vjp`.
        symmetric: as in `root_vjp`.

    Returns:
        The tangent of the root, a tree like `sol`.

    Raises:
        ValueError: if `optimality_fun` is not shaped like `sol`, or `tangents` not like `args`.
        TypeError: if dtypes or devices are mixed.

    Example:
        >>> import torch
        >>> root_jvp(lambda x, a: x**2 - a, torch.tensor(3.0), (torch.tensor(9.0),), (torch.tensor(6.0),))
        tensor(1.)

    References:
        Blondel et al. (2022), Efficient and modular implicit differentiation, eq. 2.
    """
    expected, _ = tree.partition(args)
    given, _ = tree.partition(tangents)
    if len(given) == sum(a.is_floating_point() for a in expected):  # integer arguments may have None for a tangent
        moving = iter(given)
        given = [next(moving) if a.is_floating_point() else torch.zeros_like(a) for a in expected]
    if [t.shape for t in given] != [t.shape for t in expected]:
        raise ValueError(
            f"tangents must be like args; got shapes {[tuple(t.shape) for t in given]} for "
            f"{[tuple(t.shape) for t in expected]}"
        )
    (_, rule), x, inputs, _ = _prepare(optimality_fun, sol, args, solve, symmetric)
    floating = (t if a.is_floating_point() else None for t, a in zip(given, expected, strict=True))
    still = (torch.zeros_like(t) if t.is_floating_point() else None for t in inputs[len(given) :])
    _, unravel = tree.ravel(sol)
    x_dot = rule(inputs, (x,), (*floating, *still))[0]
    assert x_dot is not None
    return unravel(x_dot)


def _prepare(optimality_fun, sol, args, solve, symmetric):
    """The rules, and all that they are called with: the root, and the tensors of `args` and of the closure."""
    rebuild, captured, complete = hoist(optimality_fun)
    x, unravel = tree.ravel(sol)
    tensors, merge = tree.partition(args)
    check_equation(optimality_fun(sol, *args), sol)

    def flat(vector, *inputs):
        closed, args = rebuild(*inputs[len(tensors) :]), merge(inputs[: len(tensors)])
        return tree.ravel(closed(unravel(vector), *args))[0]

    inputs = (*tensors, *captured)
    if not complete and derivative_wanted():
        check_closed(flat, (x, *inputs), name="optimality_fun")
    return root_rules(flat, Space.like(sol), solve, symmetric), x, inputs, merge


def root_rules(fn: FlatEquation, space: Space, solve: LinearSolver | None, symmetric: bool):
    """The derivative rules of a root as `custom_derivative` takes them: the first output is the root, a vector.

    Args:
        fn: `(x, *inputs) -> vector`, closed, on flat tensors.
        space: the space of `x`.
        solve: the linear solver, or None.
        symmetric: whether the Jacobian in `x` is symmetric positive definite.

    Returns:
        `(vjp, jvp)`; further outputs carry no gradient.
    """
    tags = believed_tags(symmetric, solve, space.size)

    def jacobian(x, inputs):
        return flat_jacobian(fn, (x, *inputs), space, space, tags)

    def vjp_rule(inputs: Tensors, outputs: Tensors, cotangents: Partial, wanted: tuple[bool, ...]) -> Partial:
        x, weight = outputs[0], cotangents[0]
        assert weight is not None
        small = 0 < space.size <= FEW and isinstance(solve, Dense | None)
        if small and plain_autograd() and not derivative_possible((x, weight, *inputs)):
            return _small_vjp(fn, x, inputs, weight, wanted)
        transposed = jacobian(x, inputs).transpose(trusted=symmetric)
        u = solve_flat(transposed, weight, solve and solve.transposed(), failure="warn")
        part, primals = choose(lambda *values: fn(x, *values), inputs, wanted)
        found = iter(vjp(part, *primals)[1](-u) if primals else ())
        return tuple(next(found) if w else None for w in wanted)

    def jvp_rule(inputs: Tensors, outputs: Tensors, tangents: Partial) -> Partial:
        x = outputs[0]
        moving = tuple(t is not None for t in tangents)
        part, primals = choose(lambda *values: fn(x, *values), inputs, moving)
        _, side = jvp(part, primals, [t for t in tangents if t is not None])
        x_dot = solve_flat(jacobian(x, inputs), -side, solve, failure="warn")
        return (x_dot, *(o.new_zeros(o.shape) for o in outputs[1:]))

    return vjp_rule, jvp_rule


def believed_tags(symmetric: bool, solve: LinearSolver | None, size: int) -> frozenset[Tag]:
    """The tags of an equation's Jacobian; who gives `CG` says that it suits, which its own check then tells.

    A direct solver needs no more than symmetry, which also holds where the iterate is no minimizer yet.
    """
    if symmetric and (isinstance(solve, Dense) or (solve is None and size <= DENSE_SIZE)):
        return frozenset(["symmetric"])
    return frozenset(["positive_definite"] if symmetric or isinstance(solve, CG) else [])


def _small_vjp(fn, x, inputs, weight, wanted):
    """The adjoint of a few unknowns where nothing is tracked: one evaluation, one pass a row."""
    part, primals = choose(fn, (x, *inputs), (True, *wanted))
    to_x, *to_inputs = pullbacks(part, *primals)
    jacobian = torch.stack([to_x(row) for row in _unit_vectors(x.numel(), x.dtype, x.device)])
    u, info = torch.linalg.solve_ex(jacobian.mT, -weight)
    if info.item() != 0 or not math.isfinite(u.sum().item()):
        report(torch.zeros_like(info, dtype=torch.bool), "warn", "Dense")
    found = iter([to(u) for to in to_inputs])
    return tuple(next(found) if w else None for w in wanted)


@functools.lru_cache(maxsize=64)
def _unit_vectors(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return torch.eye(size, dtype=dtype, device=device).unbind()


def check_equation(value: Tree, like: Tree, name: str = "optimality_fun") -> None:
    """Raise unless the value of an equation is shaped like its unknown."""
    try:
        tree.check_like(value, like, name=name, reference_name="the solution")
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{name} must return a tree shaped like the solution, one equation for each unknown. {error} "
            f"For residuals, use their gradient J^T r"
        ) from None
