"""`watch`: keep what a function is given and returns, call by call, so that a graph can name it."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from diffopt import tree
from diffopt.autodiff.levels import unwrap_lanes

__all__ = ["watch"]


def watch(fn: Callable[..., Any], named: dict[str, Any], label: str = "step") -> Callable[..., Any]:
    """Make a function that keeps the tensors of each call, for `make_dot`.

    Call k is kept as ``named["<label> k"]``, a dict of the arguments in order and, last, of the value. A loss that is
    watched so shows the parameters before each inner step and the losses, a `step` function of `unroll` the carries.
    Under `vmap` and inside of inner gradients the plain tensors underneath are kept, with a dimension more for each
    `vmap`.

    Args:
        fn: Takes and returns trees; leaves that are not tensors are not kept.
        named: Where to keep them; it is changed.
        label: What the calls are called.

    Returns:
        A function of the same values. Watch anew for each run, with a new dict: what is kept is not freed before.

    Raises:
        TypeError: If `fn` is no function, or `named` no dict.
        RuntimeError: While compiling, where nothing can be kept.

    Example:
        >>> named = {}
        >>> double = watch(lambda x: 2 * x, named)
        >>> double(torch.tensor(1.0)), double(torch.tensor(3.0))
        (tensor(2.), tensor(6.))
        >>> named["step 1"]
        {'x': tensor(3.), 'value': tensor(6.)}
    """
    if not callable(fn) or not isinstance(named, dict):
        raise TypeError(f"`watch` takes a function and a dict; got {type(fn).__name__} and {type(named).__name__}.")

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError("`watch` keeps tensors of eager calls: leave out compile where you draw a graph.")
        value = fn(*args, **kwargs)
        given = dict(zip(_names(fn, len(args)), args, strict=True)) | kwargs
        kept = {f"{name} given" if name == "value" else name: held for name, held in given.items()} | {"value": value}
        count = sum(1 for name in named if name.rpartition(" ")[0] == label)
        named[f"{label} {count}"] = {name: _bottom(held) for name, held in kept.items() if tree.partition(held)[0]}
        return value

    return wrapped


def _names(fn: Callable[..., Any], count: int) -> list[str]:
    """What a function calls its positional arguments."""
    code = getattr(fn, "__code__", None)
    bound = int(inspect.ismethod(fn))  # a method is given its object, too
    found = list(code.co_varnames[bound : code.co_argcount][:count]) if code is not None else []
    return found + [f"arg {i}" for i in range(len(found), count)]


def _bottom(held: Any) -> Any:
    tensors, merge = tree.partition(held)
    return merge([unwrap_lanes(t) for t in tensors])
