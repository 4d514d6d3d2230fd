"""Captured tensors: rebuild a function with what it captured as explicit values, and detect what still escapes.

A tensor that a user's function captured inside a `custom_derivative` would lose its gradient silently. `hoist` walks
what the function holds (closure cells, defaults, globals, partials, bound methods, containers, modules, plain
objects) and rebuilds it with other tensors in their places; `check_closed` runs it on plain inputs and raises when the
output is tracked all the same.
"""

import copy
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import optree
import torch
from torch import Tensor, nn

from diffopt.autodiff.levels import first_lane, is_live, is_tracked

__all__ = ["check_closed", "hoist"]

Build: TypeAlias = Callable[["_Rebuild"], Any]

_MOST_ITEMS = 256  # longer containers are data, not structure; what they hide, check_closed finds
_MOST_VISITS = 10_000
_LIBRARIES = ("torch", "diffopt", "optree", "numpy", "scipy", "builtins", "functools")


def hoist(*fns: Callable[..., Any]) -> tuple[Callable[..., Any], list[Tensor]]:
    """Find the tracked tensors that functions captured, and rebuild the functions with others in their places.

    A tensor is tracked if it requires gradient, carries a tangent, or is wrapped by a live `torch.func` transform.
    Everything else stays where it is, shared with the original.

    Args:
        fns: functions, partials, bound methods, modules or callable objects; they are not changed.

    Returns:
        `(rebuild, captured)`: the tracked tensors in order, each once, and `rebuild(*values)`, which returns the
        function (or the tuple of functions, if several were given) with `values` in their places.

    Example:
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> rebuild, captured = hoist((lambda w: lambda x: w * x)(w))
        >>> captured[0] is w, rebuild(torch.tensor(3.0))(5.0)
        (True, tensor(15.))
    """
    if torch.compiler.is_compiling():  # a traced function runs in plain operations and may capture what it likes
        return lambda *_: fns[0] if len(fns) == 1 else fns, []
    plan = _Plan()
    builds = [plan.visit(fn) for fn in fns]

    def rebuild(*values: Tensor) -> Any:
        made = _Rebuild(values)
        new = tuple(fn if build is None else made.get(fn, build) for fn, build in zip(fns, builds, strict=True))
        return new[0] if len(fns) == 1 else new

    return rebuild, plan.captured


def check_closed(fn: Callable[..., Any], inputs: Sequence[Tensor], *, name: str) -> list[Any]:
    """Evaluate a function on the first lane of its inputs, and raise if a tracked tensor still reaches the output.

    Args:
        fn: the function, rebuilt on plain values.
        inputs: its flat tensor inputs, tracked or not.
        name: what to call the function in the error.

    Returns:
        The leaves of its output.

    Raises:
        ValueError: if an output requires gradient, carries a tangent, or is wrapped by a live transform.

    Example:
        >>> check_closed(lambda x: 2 * x, [torch.tensor(1.0)], name="double")
        [tensor(2.)]
    """
    with torch.enable_grad():
        leaves = optree.tree_leaves(fn(*map(first_lane, inputs)))
    for leaf in leaves:
        if isinstance(leaf, Tensor) and is_live(leaf):
            raise ValueError(
                f"{name} uses a tensor that carries gradient, a tangent or a batch dimension, but is hidden where it "
                f"cannot be found (an object with __slots__, a pullback, a long container, a recursive function). "
                f"Its gradient would be lost: pass it as an argument of the solver instead"
            )
    return leaves


class _Rebuild:
    """One rebuilding: the new values, and what has been rebuilt so far, so that shared objects stay shared."""

    def __init__(self, values: Sequence[Tensor]):
        self.values = values
        self.made: dict[int, Any] = {}

    def get(self, original: Any, build: Build | None) -> Any:
        if build is None:
            return original
        if id(original) not in self.made:
            self.made[id(original)] = build(self)
        return self.made[id(original)]


class _Plan:
    """One walk: the tracked tensors found, and for every object a way to rebuild it, or None to keep it."""

    def __init__(self):
        self.captured: list[Tensor] = []
        self.builds: dict[int, tuple[Any, Build | None]] = {}  # by id, with the object, so that no id is reused

    def visit(self, item: Any) -> Build | None:
        if item is None or isinstance(item, _OPAQUE):
            return None
        if id(item) not in self.builds:
            if len(self.builds) >= _MOST_VISITS:
                return None
            self.builds[id(item)] = (
                item,
                None,
            )  # a cycle keeps the original; check_closed sees what that hides
            self.builds[id(item)] = (item, self._plan(item))
        return self.builds[id(item)][1]

    def _plan(self, item: Any) -> Build | None:
        if isinstance(item, Tensor):
            return self._tensor(item)
        if isinstance(item, types.FunctionType):
            return self._function(item)
        if isinstance(item, types.MethodType):
            owner = self.visit(item.__self__)
            return owner and (lambda new: types.MethodType(item.__func__, new.get(item.__self__, owner)))
        if isinstance(item, functools.partial):
            parts = (item.func, item.args, item.keywords)
            build = self._items(parts)
            return build and (lambda new: _partial(*build(new)))
        if isinstance(item, (list, tuple, set, frozenset)):
            return self._container(item)
        if isinstance(item, dict):
            return self._mapping(item)
        return self._object(item)

    def _tensor(self, tensor: Tensor) -> Build | None:
        if not is_tracked(tensor):
            return None
        place = len(self.captured)
        self.captured.append(tensor)
        return lambda new: new.values[place]

    def _items(self, items: Sequence[Any]) -> Callable[["_Rebuild"], list[Any]] | None:
        builds = [self.visit(item) for item in items]
        if not any(builds):
            return None
        return lambda new: [new.get(item, build) for item, build in zip(items, builds, strict=True)]

    def _container(self, item: Any) -> Build | None:
        if len(item) > _MOST_ITEMS:
            return None
        items = list(item)
        build = self._items(items)
        if build is None:
            return None
        kind = type(item)
        return lambda new: kind(*build(new)) if hasattr(kind, "_fields") else kind(build(new))

    def _mapping(self, item: dict) -> Build | None:
        if len(item) > _MOST_ITEMS:
            return None
        build = self._items(list(item.values()))
        if build is None:
            return None

        def rebuilt(new):
            new_item = copy.copy(item)
            new_item.update(zip(item, build(new), strict=True))
            return new_item

        return rebuilt

    def _function(self, fn: types.FunctionType) -> Build | None:
        eager = fn.__dict__.get("_torchdynamo_orig_callable")  # a compiled body cannot be rebuilt: take its source
        if eager is not None:
            build = self.visit(eager)
            return build and (lambda new: new.get(eager, build))
        cells = [_contents(cell) for cell in fn.__closure__ or ()]
        if _is_library(fn) and any(isinstance(leaf, Tensor) for leaf in optree.tree_leaves(cells)):
            return None  # a pullback: its tensors are tied to a graph that stand-ins would not be part of
        names = _global_names(fn.__code__) if not _is_library(fn) else ()
        names = [n for n in names if n in fn.__globals__ and fn.__globals__[n] is not fn]
        parts = (cells, fn.__defaults__ or (), fn.__kwdefaults__ or {}, [fn.__globals__[n] for n in names])
        builds = [self._items(list(p.values()) if isinstance(p, dict) else p) for p in parts]
        if not any(builds):
            return None

        def rebuilt(new):
            cell_values, defaults, kwdefaults, global_values = (b and b(new) for b in builds)
            scope = {**fn.__globals__, **dict(zip(names, global_values, strict=True))} if global_values else None
            closure = fn.__closure__ and tuple(
                cell if cell_values is None or _contents(cell) is value else types.CellType(value)
                for cell, value in zip(fn.__closure__, cell_values or cells, strict=True)
            )
            made = types.FunctionType(
                fn.__code__, fn.__globals__ if scope is None else scope, fn.__name__,
                tuple(defaults) if defaults else fn.__defaults__, closure,
            )  # fmt: skip
            made.__kwdefaults__ = (
                dict(zip(fn.__kwdefaults__ or (), kwdefaults, strict=True)) if kwdefaults else fn.__kwdefaults__
            )
            return made

        return rebuilt

    def _object(self, item: Any) -> Build | None:
        kind = type(item)
        state = getattr(item, "__dict__", None)
        slotted = any(getattr(k, "__slots__", ()) for k in kind.__mro__)
        if not isinstance(state, dict) or slotted or kind.__new__ is not object.__new__:
            return None
        build = self._module(item) if isinstance(item, nn.Module) else self._mapping(state)
        if build is None:
            return None

        def rebuilt(new):
            made = object.__new__(kind)
            made.__dict__.update(build(new))
            return made

        return rebuilt

    def _module(self, module: nn.Module) -> Build | None:
        # parameters, buffers and submodules are dicts in __dict__; long ones are structure here, not data
        state = module.__dict__
        builds = {n: self._long_mapping(v) if n in _MODULE_DICTS else self.visit(v) for n, v in state.items()}
        if not any(builds.values()):
            return None
        return lambda new: {n: new.get(v, builds[n]) for n, v in state.items()}

    def _long_mapping(self, item: dict) -> Build | None:
        build = self._items(list(item.values()))
        return build and (lambda new: dict(zip(item, build(new), strict=True)))


_OPAQUE = (bool, int, float, complex, str, bytes, type, types.ModuleType, types.BuiltinFunctionType, types.CodeType,
           torch.dtype, torch.device, torch.Size, torch.Generator)  # fmt: skip
_MODULE_DICTS = ("_parameters", "_buffers", "_modules")
_EMPTY = object()


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _partial(fn, args, keywords):
    return functools.partial(fn, *args, **keywords)


def _is_library(fn: types.FunctionType) -> bool:
    return fn.__globals__.get("__name__", "").partition(".")[0] in _LIBRARIES


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function's code, and the functions defined in it, may look up in its globals."""
    nested = (name for c in code.co_consts if isinstance(c, types.CodeType) for name in _global_names(c))
    return tuple(dict.fromkeys((*code.co_names, *nested)))
