"""Captured tensors: rebuild a function with what it captured as explicit values, and detect what still escapes.

A tensor that a user's function captured inside a `custom_derivative` would lose its gradient silently. `hoist` walks
what the function holds (closure cells, defaults, globals, partials, bound methods, containers, modules, plain
objects) and rebuilds it with other tensors in their places; `check_closed` runs it on plain inputs and raises when the
output is tracked all the same. The tensors of a module that `tree.from_module` made a function of are left out: every
call is given others.
"""

import copy
import dis
import functools
import pathlib
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import optree
import torch
from torch import Tensor, nn

from diffopt import tree
from diffopt.autodiff.levels import first_lane, is_live, is_tracked
from diffopt.tree.module import ModuleFunction

__all__ = ["check_closed", "hoist"]

Build: TypeAlias = Callable[["_Rebuild"], Any]

_MOST_ITEMS = 4096  # longer containers are data, not structure; what they hide, check_closed finds
_MOST_VISITS = 200_000
_HERE = pathlib.Path(__file__).parent
_LIBRARIES = tuple(str(pathlib.Path(p).parent) for p in (torch.__file__, optree.__file__, _HERE))
_GRAPHS = (str(pathlib.Path(torch.__file__).parent / "_functorch"), str(_HERE / "gradients.py"))


class Hoisted(NamedTuple):
    """What `hoist` found: `rebuild(*values)`, the captured tensors, and whether nothing can have escaped it."""

    rebuild: Callable[..., Any]
    captured: list[Tensor]
    complete: bool


def hoist(*fns: Any) -> Hoisted:
    """Find the tracked tensors that functions captured, and rebuild the functions with others in their places.

    A tensor is tracked if it requires gradient, carries a tangent, or is wrapped by a live `torch.func` transform.
    Everything else stays where it is, shared with the original.

    Args:
        fns: functions, partials, bound methods, modules or callable objects; they are not changed.

    Returns:
        `(rebuild, captured, complete)`: `rebuild(*values)` returns the function (or the tuple of functions, if several
        were given) with `values` in the places of the tracked tensors, each once and in order; `complete` tells that
        everything was seen and can be rebuilt, so that `check_closed` is not needed.

    Example:
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> rebuild, captured, _ = hoist((lambda w: lambda x: w * x)(w))
        >>> captured[0] is w, rebuild(torch.tensor(3.0))(5.0)
        (True, tensor(15.))
    """
    if torch.compiler.is_compiling():  # a traced function may capture what it likes
        return Hoisted(lambda *_: fns[0] if len(fns) == 1 else fns, [], True)
    tracked, complete = _scan(fns)
    if not tracked:
        return Hoisted(lambda *_: fns[0] if len(fns) == 1 else fns, [], complete)
    plan = _Plan()
    builds = [plan.visit(fn) for fn in fns]

    def rebuild(*values: Tensor) -> Any:
        made = _Rebuild(values)
        new = tuple(made.get(fn, build) for fn, build in zip(fns, builds, strict=True))
        return new[0] if len(fns) == 1 else new

    return Hoisted(rebuild, list(plan.places), complete and not plan.cyclic)


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
        leaves = tree.leaves(fn(*map(first_lane, inputs)))
    for leaf in leaves:
        if isinstance(leaf, Tensor) and is_live(leaf):
            raise ValueError(
                f"{name} uses a tensor that carries gradient, a tangent or a batch dimension, but is hidden where it "
                f"cannot be found (an object with __slots__, a pullback, a long container, a recursive function). "
                f"Its gradient would be lost: pass it as an argument of the solver instead"
            )
    return leaves


class _Kind(NamedTuple):
    """How to take objects of a kind apart, and how to make one with other parts."""

    parts: Callable[[Any], list[Any]]
    make: Callable[[Any, list[Any]], Any]


def _function_parts(fn: types.FunctionType) -> list[Any]:
    eager = fn.__dict__.get("_torchdynamo_orig_callable")  # a compiled body cannot be rebuilt: take its source
    if eager is not None:
        return [eager]
    cells = [_contents(cell) for cell in fn.__closure__ or ()]
    if fn.__code__.co_filename.startswith(_GRAPHS) and any(isinstance(leaf, Tensor) for leaf in tree.leaves(cells)):
        return _HIDDEN  # a pullback's tensors are tied to a graph that stand-ins would not be part of
    names = _global_names(fn.__code__)
    cells += [fn.__globals__[n] for n in names if n in fn.__globals__]
    return [*cells, *(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]


def _make_function(fn: types.FunctionType, parts: list[Any]) -> Callable[..., Any]:
    if "_torchdynamo_orig_callable" in fn.__dict__:
        return parts[0]
    given = iter(parts)
    closure = tuple(
        cell if _contents(cell) is (value := next(given)) else types.CellType(value) for cell in fn.__closure__ or ()
    )
    scope = fn.__globals__
    names = [n for n in _global_names(fn.__code__) if n in scope]
    scope = {**scope, **{n: next(given) for n in names}} if names else scope
    defaults = tuple(next(given) for _ in fn.__defaults__ or ()) or None
    made = types.FunctionType(fn.__code__, scope, fn.__name__, defaults, closure or None)
    made.__kwdefaults__ = {n: next(given) for n in fn.__kwdefaults__ or ()} or None
    return made


def _object_parts(item: Any) -> list[Any]:
    kind = type(item)
    state = getattr(item, "__dict__", None)
    slotted = any(getattr(k, "__slots__", ()) for k in kind.__mro__)
    if not isinstance(state, dict) or slotted or kind.__new__ is not object.__new__ or len(state) > _MOST_ITEMS:
        return _HIDDEN
    return list(state.values())


def _make_object(item: Any, parts: list[Any]) -> Any:
    made = object.__new__(type(item))
    made.__dict__.update(zip(item.__dict__, parts, strict=True))
    return made


def _module_kind(*opened: str) -> _Kind:
    """Modules, with the values of some of their dicts among the parts; the other dicts of tensors stay as they are."""

    def parts_of(module: nn.Module) -> list[Any]:
        parts = []
        for name, value in module.__dict__.items():
            parts += value.values() if name in opened else [] if name in _MODULE_DICTS else [value]
        return parts

    def make(module: nn.Module, parts: list[Any]) -> nn.Module:
        given = iter(parts)
        made = object.__new__(type(module))
        for name, value in module.__dict__.items():
            if name in opened:
                value = {n: next(given) for n in value}
            elif name not in _MODULE_DICTS:
                value = next(given)
            made.__dict__[name] = value
        return made

    return _Kind(parts_of, make)


def _make_container(item: Any, parts: list[Any]) -> Any:
    kind = type(item)
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)


def _make_mapping(item: dict, parts: list[Any]) -> dict:
    made = copy.copy(item)
    made.update(zip(item, parts, strict=True))
    return made


def _make_partial(item: functools.partial, parts: list[Any]) -> functools.partial:
    return functools.partial(parts[0], *parts[1], **parts[2])


_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size))
_LEAVES = _PLAIN | {type, types.ModuleType, types.BuiltinFunctionType, types.CodeType, torch.Generator}
_HIDDEN: list[Any] = []  # the parts of what cannot be looked into
_TRUSTED = (
    "torch",
    "math",
    "numpy",
    "scipy",
    "builtins",
    "diffopt",
    "diffopt_kernels",
    "optree",
    "functools",
    "operator",
)
_MODULE_DICTS = ("_parameters", "_buffers", "_modules")
_FUNCTION = _Kind(_function_parts, _make_function)
_METHOD = _Kind(lambda m: [m.__self__], lambda m, parts: types.MethodType(m.__func__, parts[0]))
_PARTIAL = _Kind(lambda p: [p.func, p.args, p.keywords], _make_partial)
_CONTAINER = _Kind(lambda c: list(c) if len(c) <= _MOST_ITEMS else _HIDDEN, _make_container)
_MAPPING = _Kind(lambda m: list(m.values()) if len(m) <= _MOST_ITEMS else _HIDDEN, _make_mapping)
_MODULE = _module_kind(*_MODULE_DICTS)
_EMPTIED = _module_kind("_modules")  # a module whose own tensors are not used
_OBJECT = _Kind(_object_parts, _make_object)
_EXACT = {
    types.FunctionType: _FUNCTION, types.MethodType: _METHOD, functools.partial: _PARTIAL,
    tuple: _CONTAINER, list: _CONTAINER, set: _CONTAINER, frozenset: _CONTAINER, dict: _MAPPING,
}  # fmt: skip
_EMPTY = object()


def _kind(item: Any, emptied: frozenset[int] = frozenset()) -> _Kind:
    exact = _EXACT.get(type(item))
    if exact is not None:
        return exact
    if isinstance(item, nn.Module):
        return _EMPTIED if id(item) in emptied else _MODULE
    if isinstance(item, (list, tuple, set, frozenset)):
        return _CONTAINER
    return _MAPPING if isinstance(item, dict) else _OBJECT


def _emptied(function: ModuleFunction) -> frozenset[int]:
    """The modules whose own tensors a function of a module does not use."""
    return frozenset(map(id, function.module.modules()))


def _scan(roots: Sequence[Any], emptied: frozenset[int] = frozenset()) -> tuple[bool, bool]:
    """Whether something tracked is reached, and whether everything was seen: cheaper than planning a rebuild."""
    stack, seen, tracked, complete = list(roots), {}, False, True
    while stack:
        item = stack.pop()
        kind = type(item)
        if item is torch or kind in _PLAIN or id(item) in seen:
            continue
        if kind in _LEAVES:
            complete = complete and _is_transparent(item)
            continue
        seen[id(item)] = item  # kept, so that no id is reused
        if isinstance(item, Tensor):
            tracked = tracked or is_tracked(item)
            continue
        if isinstance(item, ModuleFunction):
            within = _scan([item.module], _emptied(item))
            tracked, complete = tracked or within[0], complete and within[1]
            continue
        parts = _kind(item, emptied).parts(item)
        complete = complete and parts is not _HIDDEN and _class_is_transparent(item)
        stack += parts
        if len(seen) > _MOST_VISITS:
            return True, False
    return tracked, complete


def _class_is_transparent(item: Any) -> bool:
    """Whether an object's class is a library's: the code and the attributes of others are not walked."""
    owner = item.__self__ if type(item) is types.MethodType else item
    return type(owner) in _EXACT or _is_transparent(type(owner))


def _is_transparent(leaf: Any) -> bool:
    """Whether a module, a class or a builtin cannot hold a tracked tensor of the user's."""
    if isinstance(leaf, types.BuiltinFunctionType):
        return leaf.__self__ is None or isinstance(leaf.__self__, types.ModuleType)
    name = leaf.__name__ if isinstance(leaf, types.ModuleType) else getattr(leaf, "__module__", "")
    return name.partition(".")[0] in _TRUSTED


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

    def __init__(self, places: dict[Tensor, int] | None = None, emptied: frozenset[int] = frozenset()):
        self.places: dict[Tensor, int] = {} if places is None else places  # of the captured tensors, in order
        self.emptied = emptied
        self.builds: dict[int, tuple[Any, Build | None]] = {}  # by id, with the object, so that no id is reused
        self.open: set[int] = set()
        self.cyclic = False

    def visit(self, item: Any) -> Build | None:
        if type(item) in _LEAVES:
            return None
        if id(item) not in self.builds:
            if len(self.builds) >= _MOST_VISITS:
                return None
            self.builds[id(item)] = item, None
            self.open.add(id(item))
            self.builds[id(item)] = item, self._tensor(item) if isinstance(item, Tensor) else self._other(item)
            self.open.remove(id(item))
        elif id(item) in self.open:
            self.cyclic = True  # keeps the original; check_closed sees what that hides
        return self.builds[id(item)][1]

    def _tensor(self, tensor: Tensor) -> Build | None:
        if not is_tracked(tensor):
            return None
        place = self.places.setdefault(tensor, len(self.places))
        return lambda new: new.values[place]

    def _function_of_a_module(self, item: ModuleFunction) -> Build | None:
        """What else than the tensors given anew a module holds, in a plan of its own: elsewhere they may be used."""
        module, plan = item.module, _Plan(self.places, _emptied(item))
        build = plan.visit(module)
        self.cyclic = self.cyclic or plan.cyclic
        return build and (lambda new: ModuleFunction(_Rebuild(new.values).get(module, build)))

    def _other(self, item: Any) -> Build | None:
        if isinstance(item, ModuleFunction):
            return self._function_of_a_module(item)
        kind = _kind(item, self.emptied)
        parts = kind.parts(item)
        builds = [self.visit(part) for part in parts]
        if not any(builds):
            return None
        return lambda new: kind.make(item, [new.get(part, build) for part, build in zip(parts, builds, strict=True)])


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a user's function, and the functions defined in it, may look up in its globals."""
    if code.co_filename.startswith(_LIBRARIES):
        return ()
    own = (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    nested = (name for c in code.co_consts if isinstance(c, types.CodeType) for name in _global_names(c))
    return tuple(dict.fromkeys((*own, *nested)))
