r"""Decorators that give a solver the derivative of what it solves, whatever it does inside.

.. math:: F(x^\star(\theta), \theta) = 0 \quad\text{or}\quad x^\star(\theta) = T(x^\star(\theta), \theta)
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optree
import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import check_closed, hoist
from diffopt.autodiff.custom_derivative import Rules, by_rule
from diffopt.autodiff.levels import derivative_possible, derivative_wanted, unwrap_lanes
from diffopt.implicit.root import check_equation, root_rules
from diffopt.linalg import Dense, LinearSolver
from diffopt.linalg.operators import Space
from diffopt.linalg.solve import check_solver
from diffopt.typing import Tree

__all__ = ["custom_fixed_point", "custom_root"]

_MOST_COMPILED = 256
_MOST_CHECKED = 1024


class _Options(NamedTuple):
    solve: LinearSolver | None
    symmetric: bool
    has_aux: bool
    batching: Literal["vmap", "sequential"]


def custom_root(
    optimality_fun: Callable[..., Tree],
    *,
    solve: LinearSolver | None = None,
    symmetric: bool = False,
    has_aux: bool = False,
    batching: Literal["vmap", "sequential"] = "vmap",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    r"""Decorate a solver of :math:`F(x, \theta) = 0` with implicit differentiation.

    .. math:: F(x^\star(\theta), \theta) = 0 \;\Rightarrow\;
              \partial x^\star = -\,(\partial_x F)^{-1}\,\partial_\theta F

    The solver may do anything: its work is not differentiated. The decorated function composes with every transform at
    any nesting. Tensors that the two functions captured are found and differentiated as if they were arguments.
    The equation must be pure: what it stores for later (a cache of its own, `functools.singledispatch`) is stored
    without gradient. Under `torch.compile` the derivative is that of two Newton steps at the solution, which is right
    up to the third order.

    Args:
        optimality_fun: `F(x, *args, **kwargs)`, in torch operations, shaped like `x` and zero at the solution. It
            takes the solver's arguments; keyword arguments that it does not name must hold no tensors.
        solve: the linear solver of the adjoint; None takes `Dense` up to 256 unknowns, beyond that `CG` if
            `symmetric`, else `GMRES`.
        symmetric: whether the Jacobian in `x` is symmetric positive definite, as for the gradient of a convex function.
        has_aux: whether the solver returns `(x, aux)`; aux is returned detached and carries no gradient.
        batching: how `vmap` runs the solver: "vmap" maps it, "sequential" calls it once a lane, for solvers with
            `.item()`, NumPy or SciPy inside.

    Returns:
        A decorator of `solver(init, *args, **kwargs) -> x`, where `x` is a tree like `init`, whose tensors are of one
        floating-point dtype. `init` carries no gradient and may be None. Arguments are trees; leaves that are not
        tensors are static.

    Raises:
        ValueError: when called, if `x` is not like `init`, if `optimality_fun` is not shaped like `x`, or if a captured
            tensor cannot be found to be differentiated.
        TypeError: when called, if dtypes are mixed or not floating-point, or `optimality_fun` lacks an argument.

    Example:
        >>> import torch
        >>> @custom_root(lambda x, a: x**2 - a)
        ... def sqrt(init, a):
        ...     x = init
        ...     for _ in range(20):
        ...         x = (x + a / x) / 2
        ...     return x
        >>> torch.func.grad(sqrt, argnums=1)(torch.tensor(1.0), torch.tensor(4.0))
        tensor(0.2500)

    References:
        Blondel et al. (2022), Efficient and modular implicit differentiation, eqs. 1 to 3.
    """
    options = _checked(optimality_fun, _Options(solve, symmetric, has_aux, batching))
    return functools.partial(_decorate, optimality_fun, options, "optimality_fun")


def custom_fixed_point(
    fixed_point_fun: Callable[..., Tree],
    *,
    solve: LinearSolver | None = None,
    symmetric: bool = False,
    has_aux: bool = False,
    batching: Literal["vmap", "sequential"] = "vmap",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    r"""Decorate a solver of :math:`x = T(x, \theta)` with implicit differentiation.

    .. math:: (I - \partial_x T)\,\partial x^\star = \partial_\theta T

    Args:
        fixed_point_fun: `T(x, *args, **kwargs)`, shaped like `x`; otherwise as `optimality_fun` in `custom_root`.
        solve: as in `custom_root`.
        symmetric: whether :math:`I - \partial_x T` is symmetric positive definite, as for a gradient step.
        has_aux: as in `custom_root`.
        batching: as in `custom_root`.

    Returns:
        A decorator of `solver(init, *args, **kwargs) -> x`, as in `custom_root`.

    Raises:
        ValueError: as in `custom_root`.
        TypeError: as in `custom_root`.

    Example:
        >>> import torch
        >>> @custom_fixed_point(lambda x, a: torch.cos(x) + a)
        ... def iterate(init, a):
        ...     x = init
        ...     for _ in range(100):
        ...         x = torch.cos(x) + a
        ...     return x
        >>> torch.func.grad(iterate, argnums=1)(torch.tensor(0.7), torch.tensor(0.0))
        tensor(0.5975)

    References:
        Blondel et al. (2022), Efficient and modular implicit differentiation, section 2.2.
    """

    def residual(x: Tree, *args: Any, **kwargs: Any) -> Tree:
        moved = fixed_point_fun(x, *args, **kwargs)
        check_equation(moved, x, "fixed_point_fun")
        return tree.sub(x, moved)

    options = _checked(fixed_point_fun, _Options(solve, symmetric, has_aux, batching))
    residual.__signature__ = inspect.signature(fixed_point_fun)  # pyright: ignore[reportFunctionMemberAccess]
    return functools.partial(_decorate, residual, options, "fixed_point_fun")


def _checked(equation, options: _Options) -> _Options:
    if not callable(equation):
        raise TypeError(f"expected a function of the solution and the arguments; got {type(equation).__name__}")
    if options.batching not in ("vmap", "sequential"):
        raise ValueError(f'batching must be "vmap" or "sequential"; got {options.batching!r}')
    check_solver(options.solve, "solve")
    return options


def _decorate(equation, options: _Options, name: str, solver):
    if not callable(solver):
        raise TypeError(f"the decorator takes a solver function; got {type(solver).__name__}")
    accepted = _keywords(equation)
    checked: set = set()  # the shapes that the equation was checked with

    @functools.wraps(solver)
    def solution(init: Tree, *args: Any, **kwargs: Any) -> Any:
        shared = _shared(kwargs, accepted, name) if kwargs else ()
        return _Call(equation, solver, options, name, (init, args, kwargs), shared).run(checked)

    return solution


def _keywords(equation) -> frozenset[str] | None:
    """The keyword arguments that an equation takes, or None if it takes any (dynamo cannot ask)."""
    if torch.compiler.is_compiling():
        return None
    try:
        parameters = inspect.signature(equation).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def _shared(kwargs, accepted, name) -> tuple[str, ...]:
    if accepted is None:
        return tuple(kwargs)
    for key in kwargs.keys() - accepted:
        if tree.partition(kwargs[key])[0]:
            raise TypeError(
                f"the solver was given {key}=, which holds tensors, but {name} takes no argument of that name, so its "
                f"gradient would be lost; add it to {name}"
            )
    return tuple(key for key in kwargs if key in accepted)


class _Call:
    """One call of a decorated solver, on flat tensors: those of init, of the arguments, and captured ones."""

    def __init__(self, equation, solver, options: _Options, name: str, arguments: tuple, shared: tuple[str, ...]):
        self.options, self.name, self.shared = options, name, shared
        self.init, args, kwargs = arguments
        starts, self.merge_init = tree.partition((self.init,))
        tensors, self.merge_args = tree.partition(args)
        named, self.merge_named = tree.partition(tuple(kwargs.values())) if kwargs else ((), tuple)
        self.keys = tuple(kwargs)
        first = len(starts)
        second = first + len(tensors)
        self.ends = first, second, second + len(named)
        values = tuple(kwargs.values())
        self.static = _has_static_leaves(args, values, len(tensors) + len(named))
        # functions and modules among the arguments may hold tensors, too
        holders = (self.merge_args([None] * len(tensors)), self.merge_named([None] * len(named))) if self.static else ()
        self.rebuild, captured, self.complete = hoist(equation, solver, options.solve, holders)
        self.inputs = (*[s.detach() for s in starts], *tensors, *named, *captured)
        self.unravel: Callable[[Tensor], Tree]
        self.merge_aux: Callable[[list[Tensor]], Any] | None = None

    def run(self, checked: set):
        checking = not torch.compiler.is_compiling() and (
            derivative_possible(self.inputs) or (not self.complete and derivative_wanted())
        )
        if checking and self.init is not None:
            self.check(self.init, checked)
        solve = by_rule(Rules(self.primal, self.vjp, self.jvp, self.options.batching), self.traceable)
        x, *held = solve(*self.inputs)
        solution = self.unravel(x)
        if checking and self.init is None:
            self.check(solution, checked)
        if self.merge_aux is None:
            return solution
        return solution, self.merge_aux([t.detach() for t in held])

    def split(self, inputs):
        """`(equation, solver, linear solver), init, args, kwargs`, made of flat inputs."""
        first, second, third = self.ends
        *functions, holders = self.rebuild(*inputs[third:])
        (init,) = self.merge_init(inputs[:first])
        args, named = self.merge_args(inputs[first:second]), self.merge_named(inputs[second:third])
        if self.static:
            args, named = _with_static_leaves((args, named), holders)
        return functions, init, args, dict(zip(self.keys, named, strict=True))

    def primal(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        plain = [x.detach() for x in inputs]
        (_, solver, _), init, args, kwargs = self.split(plain)
        with torch.enable_grad():  # a solver may call autograd on its own
            out = solver(init, *args, **kwargs)
        x, aux = _with_aux(out) if self.options.has_aux else (out, None)
        if init is not None:
            tree.check_like(x, init, name="the solver's output", reference_name="init")
        vector, self.unravel = tree.ravel(x)
        if not vector.is_floating_point():
            Space.of(vector, self.unravel)  # raises, and says what to do
        if not torch.compiler.is_compiling() and _shares_memory(vector, plain):
            vector = vector.clone()  # a result that shared an argument's memory could be overwritten with it
        if not self.options.has_aux:
            return (vector.detach(),)
        held, merge_aux = tree.partition(aux)
        self.merge_aux = _same_statics(self.merge_aux, merge_aux, len(held))
        return tuple(t.detach() for t in (vector, *held))

    def equation(self, x: Tree, inputs) -> Tree:
        (equation, _, _), _, args, kwargs = self.split(inputs)
        return equation(x, *args, **{key: kwargs[key] for key in self.shared})

    def flat_equation(self, x: Tensor, *inputs: Tensor) -> Tensor:
        return tree.ravel(self.equation(self.unravel(x), inputs))[0]

    def rules(self, inputs, x: Tensor):
        _, _, solve, _ = self.rebuild(*inputs[self.ends[-1] :])
        return root_rules(self.flat_equation, Space.of(x, self.unravel), solve, self.options.symmetric)

    def vjp(self, inputs, outputs, cotangents, wanted):
        return self.rules(inputs, outputs[0])[0](inputs, outputs, cotangents, wanted)

    def jvp(self, inputs, outputs, tangents):
        return self.rules(inputs, outputs[0])[1](inputs, outputs, tangents)

    def traceable(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Two Newton steps from the solution: plain operations whose derivatives up to the third are the root's."""
        if self.options.batching == "sequential":
            raise RuntimeError('a solver with batching="sequential" cannot be compiled: compile the code around it')
        x, *held = self.primal(*inputs)
        if x.numel() > _MOST_COMPILED or not isinstance(self.options.solve, Dense | None):
            adjoint = type(self.options.solve or Dense()).__name__
            raise RuntimeError(
                f"an implicit derivative can be compiled with a Dense adjoint of at most {_MOST_COMPILED} unknowns, "
                f"not with {adjoint} and {x.numel()} unknowns: compile the solver and the equation, decorate outside"
            )
        for _ in range(2):
            jacobian = torch.func.jacrev(self.flat_equation)(x, *inputs)
            x = x - torch.linalg.inv(jacobian) @ self.flat_equation(x, *inputs)
        return (x, *held)

    def check(self, x: Tree, checked: set) -> None:
        """Evaluate the equation once, for its shape and for captured tensors that stay hidden."""
        tensors, merge = tree.partition((x,))
        key = tuple((t.shape, t.dtype) for t in (*tensors, *self.inputs))
        if self.complete and not self.static and key in checked:
            return

        def evaluate(*flat):
            (point,) = merge(flat[: len(tensors)])
            value = self.equation(point, flat[len(tensors) :])
            check_equation(value, point, self.name)
            return value

        check_closed(evaluate, (*tensors, *self.inputs), name=self.name)
        if not self.static and len(checked) < _MOST_CHECKED:
            checked.add(key)


def _shares_memory(vector: Tensor, others: list[Tensor]) -> bool:
    tensors = [unwrap_lanes(t) for t in (vector, *others)]
    first, *rest = [t.untyped_storage().data_ptr() for t in tensors]
    return first in rest


def _has_static_leaves(args: tuple, values: tuple, tensors: int) -> bool:
    if all(isinstance(a, Tensor) for a in (*args, *values)):
        return False
    every: Tree = (args, values)
    return len(optree.tree_leaves(every, none_is_leaf=True)) != tensors


def _with_static_leaves(values: Any, holders: Any) -> Any:
    """The values, with the static leaves of another tree, in which the tensors are None."""
    leaves, spec = optree.tree_flatten(holders, none_is_leaf=True)
    given = optree.tree_leaves(values, none_is_leaf=True)
    return spec.unflatten([v if isinstance(v, Tensor) else h for v, h in zip(given, leaves, strict=True)])


def _with_aux(out):
    if not isinstance(out, tuple) or len(out) != 2:
        raise ValueError(f"with has_aux=True the solver must return (solution, aux); got {type(out).__name__}")
    return out


def _same_statics(previous, merge, count):
    """The new merge, once its static leaves are known to agree with those of the lane before."""
    if previous is not None:
        try:
            same = bool(previous([None] * count) == merge([None] * count))
        except (TypeError, ValueError, RuntimeError):
            same = False
        if not same:
            raise TypeError("aux holds values that are not tensors and differ between lanes; return them as tensors")
    return merge
