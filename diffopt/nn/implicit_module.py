r"""Modules that solve for their own parameters, with gradients by the implicit function theorem.

.. math:: F(x^\star(\theta), \theta) = 0 \;\Rightarrow\; \partial x^\star = -\,(\partial_x F)^{-1}\,\partial_\theta F
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffopt import tree
from diffopt.autodiff import grad, transforms_active
from diffopt.implicit import custom_root
from diffopt.linalg import LinearSolver
from diffopt.linalg.solve import check_solver
from diffopt.nn.places import Place, find_places, find_tracked, leaf_of
from diffopt.nn.snapshot import Snapshot
from diffopt.transforms.leaves import check_scalar

__all__ = ["ImplicitModule"]


class ImplicitModule(nn.Module):
    r"""A module whose parameters are the solution of a problem that depends on meta-parameters.

    .. math:: F(x^\star(\theta), \theta) = 0 \;\Rightarrow\;
              \partial x^\star = -\,(\partial_x F)^{-1}\,\partial_\theta F

    Its parameters :math:`x` are those that it makes itself. Modules, and tensors that require grad, which are given to
    its constructor are *meta*: assigned to an attribute they are not registered, so that `parameters`, `train` and
    `to` leave them alone; `meta_parameters` lists their parameters. (To begin with the values of a given module,
    assign a ``copy.deepcopy`` of it.)

    A subclass defines

    - ``solve(self, *data)``, which changes the parameters in place in any way, by any optimizer, and returns ``self``
      or nothing. Make the optimizer inside: each solve has new parameters. What is given is constant there;
    - either ``objective(self, *data)``, the number that the parameters minimize, or ``optimality(self, *data)``, what
      is zero at the solution: a dict from names of parameters, or a tuple in the order of `parameters`, of tensors like
      them. Both must be functions of tensors alone, without dropout.

    After ``solve`` the parameters are tensors whose gradients flow, to any order, to meta-parameters, to all other
    tensors in attributes that require grad, and to ``data``; the start has no gradient. Solve again at any time: it
    starts from the values as they are. What modes, buffers and attributes are then is what later gradients see.

    For eager code: under `torch.func` transforms use `custom_root`. A deep copy is outside of the graph, and has
    copies of the meta-parameters, as always in Python: `copy.deepcopy(module, {id(meta): meta})` shares them.

    Args:
        linear_solver: Of the class, ``class Inner(ImplicitModule, linear_solver=CG())``: for the adjoint system, as in
            `Implicit`.
        symmetric: Of the class: whether the Jacobian of the optimality is symmetric positive definite. Default: with
            ``objective`` it is. If the Hessian may be indefinite, give False.

    Raises:
        TypeError: When made, if ``solve``, or one of ``objective`` and ``optimality``, is missing, or both are there;
            by ``solve``, if it returns something else.
        ValueError: If a given tensor is among other things in an attribute. By ``solve``, if there are no parameters,
            or nothing to have a gradient, if the optimality is not like the parameters, or if random numbers are drawn.
        RuntimeError: By ``solve``, under a `torch.func` transform.

    Example:
        >>> class Ridge(ImplicitModule):
        ...     def __init__(self, penalty):
        ...         super().__init__()
        ...         self.penalty, self.w = penalty, nn.Parameter(torch.zeros(2))
        ...
        ...     def objective(self, x, y):
        ...         return ((x @ self.w - y) ** 2).sum() + self.penalty * (self.w**2).sum()
        ...
        ...     def solve(self, x, y):
        ...         with torch.no_grad():
        ...             self.w.copy_(torch.linalg.solve(x.T @ x + self.penalty * torch.eye(2), x.T @ y))
        >>> penalty = torch.tensor(1.0, requires_grad=True)
        >>> inner = Ridge(penalty)
        >>> inner.solve(torch.eye(2), torch.ones(2)).w.sum().backward()
        >>> penalty.grad  # of 2 / (1 + penalty)
        tensor(-0.5000)

    References:
        Rajeswaran et al., "Meta-learning with implicit gradients", 2019, eq. 6. Blondel et al., "Efficient and modular
        implicit differentiation", 2022, eq. 2.
    """

    _linear_solver: LinearSolver | None = None
    _symmetric: bool | None = None
    _given: tuple[Tensor, ...]
    _meta_names: dict[str, None]
    _solving: bool

    def __init_subclass__(
        cls, *, linear_solver: LinearSolver | None = None, symmetric: bool | None = None, **rest: Any
    ) -> None:
        super().__init_subclass__(**rest)
        check_solver(linear_solver, "linear_solver")
        if linear_solver is not None:
            cls._linear_solver = linear_solver
        if symmetric is not None:
            cls._symmetric = symmetric
        if "solve" in vars(cls):
            cls.solve = _implicit(vars(cls)["solve"])

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        module = super().__new__(cls)
        _check_class(cls)
        given = tree.leaves((args, kwargs))
        tensors = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
        tensors += [p for m in given if isinstance(m, nn.Module) for p in m.parameters()]
        vars(module).update(_given=tuple(tensors), _meta_names={}, _solving=False)
        return module

    def __setattr__(self, name: str, value: Any) -> None:
        if not _is_given(self, name, value):
            self._meta_names.pop(name, None)
            super().__setattr__(name, value)
            return
        for registry in ("_parameters", "_modules", "_buffers"):
            vars(self).get(registry, {}).pop(name, None)
        self._meta_names[name] = None
        object.__setattr__(self, name, value)

    def solve(self, *data: Any) -> Self:
        """Solve for the parameters; to be defined by the subclass."""
        raise NotImplementedError

    def objective(self, *data: Any) -> Tensor:
        """The number that the parameters minimize; to be defined by the subclass, or else `optimality`."""
        raise NotImplementedError

    def optimality(self, *data: Any) -> Any:
        """What is zero at the solution, like the parameters; to be defined by the subclass, or else `objective`."""
        raise NotImplementedError

    def named_meta_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that were given to the constructor, by name, each once, in either mode."""
        seen: set[int] = set()
        for name in filter(vars(self).__contains__, self._meta_names):
            value = vars(self)[name]
            pairs = value.named_parameters(name) if isinstance(value, nn.Module) else [(name, value)]
            for path, tensor in pairs:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield path, tensor

    def meta_parameters(self) -> Iterator[Tensor]:
        """The tensors that were given to the constructor, each once, in either mode."""
        for _, tensor in self.named_meta_parameters():
            yield tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for tensor in self.parameters():
            if not tensor.is_leaf:
                memo[id(tensor)] = leaf_of(tensor.detach().clone(), requires_grad=True)
        for tensor in (*self._given, *self.meta_parameters()):
            if not tensor.is_leaf and id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone().requires_grad_()
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(vars(self), memo))
        return new


def _check_class(cls: type[ImplicitModule]) -> None:
    own = [name for name in ("objective", "optimality") if getattr(cls, name) is not getattr(ImplicitModule, name)]
    if len(own) != 1:
        raise TypeError(
            f"{cls.__name__} must define one of `objective` and `optimality`; it defines {' and '.join(own) or 'none'}."
        )
    if cls.solve is ImplicitModule.solve:
        raise TypeError(f"{cls.__name__} must define `solve`, which changes its parameters to those of the solution.")


def _is_given(module: ImplicitModule, name: str, value: Any) -> bool:
    """Whether an attribute is one of the things given to the constructor, or a module of such."""
    given = {id(t) for t in module._given}
    found = [id(t) in given for t in _tensors(value)] if given else []
    if not any(found):
        return False
    if not isinstance(value, Tensor | nn.Module):
        raise ValueError(
            f"`{name}` holds what was given to the constructor in a {type(value).__name__}, where it would not be "
            "found; use nn.ParameterList, nn.ModuleList, or one attribute for each."
        )
    if not all(found):
        raise ValueError(
            f"`{name}` holds parameters that were given to the constructor, which are meta-parameters, and others too; "
            "assign them to attributes of their own."
        )
    return True


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of an attribute, and the parameters of modules."""
    parts = tree.leaves(value) if isinstance(value, list | tuple | dict) else [value]
    found = [part for part in parts if isinstance(part, Tensor)]
    return found + [p for part in parts if isinstance(part, nn.Module) for p in part.parameters()]


def _implicit(solve: Callable[..., Any]) -> Callable[..., Any]:
    """A subclass's `solve`, whose result is differentiable."""

    @functools.wraps(solve)
    def solved(self: ImplicitModule, *data: Any, **named: Any) -> Any:
        if self._solving:  # called by the `solve` of a subclass
            return solve(self, *data, **named)
        if transforms_active():
            raise RuntimeError(
                f"{type(self).__name__}.solve is for eager code: under torch.func transforms use diffopt.custom_root."
            )
        modules = _all_modules(self)
        params = _own_parameters(self)
        held = find_tracked(modules, params.values())
        _check_problem(self, params, [place.tensor for place in held], (data, named))
        values = _run(solve, self, held, data, named)
        equation = _Equation(self, modules, [place.tensor for place in held], tuple(params))
        root = custom_root(equation.residual, solve=self._linear_solver, symmetric=equation.symmetric)(_found)
        found = root(values, tuple(place.tensor for place in held), data, named)
        _put(self, params, found)
        return self

    return solved


class _Equation:
    """The equation of a module as it is now, as a function of tensors. Slots keep `hoist` from looking inside."""

    __slots__ = ("names", "snapshot", "symmetric", "uses_objective")

    def __init__(
        self, module: ImplicitModule, modules: list[nn.Module], held: list[Tensor], names: tuple[str, ...]
    ) -> None:
        params = dict(module.named_parameters())
        self.names, self.snapshot = names, Snapshot(modules, [*(params[name] for name in names), *held])
        self.uses_objective = type(module).objective is not ImplicitModule.objective
        self.symmetric = self.uses_objective if module._symmetric is None else module._symmetric

    def residual(self, x: tuple, held: tuple, data: tuple, named: dict[str, Any]) -> tuple[Tensor, ...]:
        """What is zero at the solution, a tensor for each parameter."""
        before = None if transforms_active() else _random_state(x[0])
        found = self.evaluate(x, held, data, named)
        if before is not None and not torch.equal(before, _random_state(x[0])):
            name = "objective" if self.uses_objective else "optimality"
            raise ValueError(
                f"`{name}` draws random numbers, as dropout does, so that no solution satisfies it twice: call .eval() "
                "of such modules, or draw once, before `solve`."
            )
        return found

    def evaluate(self, x: tuple, held: tuple, data: tuple, named: dict[str, Any]) -> tuple[Tensor, ...]:
        """The residual, however it is defined."""
        if self.uses_objective:
            return grad(self.value)(x, held, data, named)
        found = self.snapshot.make([*x, *held]).optimality(*data, **named)
        if isinstance(found, Mapping):
            if found.keys() != set(self.names):
                raise ValueError(f"`optimality` must name the parameters {list(self.names)}; got {list(found)}.")
            return tuple(found[name] for name in self.names)
        if not isinstance(found, Tensor | tuple | list):
            raise ValueError(
                f"`optimality` must return a dict from the names {list(self.names)}, or a tuple, of tensors; got "
                f"{type(found).__name__}."
            )
        return (found,) if isinstance(found, Tensor) else tuple(found)

    def value(self, x: tuple, held: tuple, data: tuple, named: dict[str, Any]) -> Tensor:
        """The objective."""
        return check_scalar(self.snapshot.make([*x, *held]).objective(*data, **named), "`objective`")


def _random_state(like: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()


def _found(values: tuple, *_: Any) -> tuple:
    """The solver, which has run already."""
    return values


def _all_modules(module: ImplicitModule) -> list[nn.Module]:
    given = [vars(module)[name] for name in module._meta_names if name in vars(module)]
    return [m for root in (module, *given) if isinstance(root, nn.Module) for m in root.modules()]


def _own_parameters(module: ImplicitModule) -> dict[str, Tensor]:
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def _check_problem(module: ImplicitModule, params: dict[str, Tensor], held: list[Tensor], data: Any) -> None:
    kind, given = type(module).__name__, {id(t) for t in module._given}
    if not params:
        raise ValueError(
            f"{kind} has no parameters of its own that require grad. Modules given to its constructor are "
            "meta-parameters: to begin with their values, assign a copy.deepcopy of them."
        )
    shared = [name for name, value in params.items() if id(value) in given]
    if shared:
        raise ValueError(f"{shared} of {kind} were given to its constructor: assign them directly to attributes.")
    if not held and not module._meta_names and not any(t.requires_grad for t in tree.partition(data)[0]):
        raise ValueError(
            f"{kind} has nothing to have a gradient: give modules, or tensors that require grad, to its constructor "
            "or to `solve`."
        )


def _run(solve: Callable[..., Any], module: ImplicitModule, held: list[Place], data: tuple, named: dict[str, Any]):
    """The values that `solve` leads to; all that the problem depends on is constant meanwhile."""
    places = {name: place for name, place in find_places(module)[0].items() if place.tensor.requires_grad}
    before, constants = [place.tensor for place in places.values()], [place.tensor for place in held]
    tensors, merge = tree.partition((data, named))
    data, named = merge([t.detach() if t.requires_grad else t for t in tensors])
    try:
        module._solving = True
        for place in held:
            place.put(place.tensor.detach())
        for place in places.values():
            place.put(leaf_of(place.tensor.detach().clone(), requires_grad=True))
        with torch.enable_grad():
            result = solve(module, *data, **named)
        if result is not None and result is not module:
            raise TypeError(f"`solve` must return self or nothing; got {type(result).__name__}.")
        after = dict(module.named_parameters())
        tree.check_like(
            {n: after[n] for n in places if n in after}, {n: p.tensor for n, p in places.items()},
            name="the parameters after `solve`", reference_name="those before",
        )  # fmt: skip
        return tuple(after[name].detach().clone() for name in places)
    except BaseException:
        for place, tensor in zip(places.values(), before, strict=True):
            place.put(tensor)
        raise
    finally:
        module._solving = False
        for place, tensor in zip(held, constants, strict=True):
            place.put(tensor)


def _put(module: ImplicitModule, names: Iterable[str], values: tuple[Tensor, ...]) -> None:
    """Put values in the places of parameters: clones, since views cannot be detached in place."""
    places = find_places(module)[0]
    for name, value in zip(names, values, strict=True):
        places[name].put(value.clone() if value.requires_grad else leaf_of(value, requires_grad=True))
