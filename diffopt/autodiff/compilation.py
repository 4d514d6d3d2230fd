"""`torch.compile` that refuses what would be silently slow or wrong."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from diffopt.autodiff.levels import transforms_active

__all__ = ["compile"]


def compile(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a whole function, outermost, without graph breaks.

    `vmap(torch.compile(f))` runs eagerly without a word; here it raises. Operators that work by rule run as their
    plain-operation forms inside, and those whose work depends on data raise and name the form that compiles. The
    first call compiles, in seconds, or for the steps of a network in minutes; the time grows with an unroll, so for
    long ones compile one step.

    Args:
        fn: a function of trees of tensors, which may apply any transform inside.
        options: passed to `torch.compile`, such as `backend` and `dynamic`.

    Returns:
        The compiled function.

    Raises:
        RuntimeError: when called under a live transform; compile the transformed function instead.
        TypeError: if `fullgraph` is given.

    Example:
        >>> double = compile(lambda x: 2 * x, backend="eager")
        >>> double(torch.ones(2))
        tensor([2., 2.])
    """
    if "fullgraph" in options:
        raise TypeError("compile always takes the full graph; leave `fullgraph` out")
    compiled = torch.compile(fn, fullgraph=True, **options)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and transforms_active():
            raise RuntimeError(
                "a compiled function was called under a live transform, where it would run eagerly: write "
                "compile(vmap(f)) or compile(grad(f)), with compile outermost"
            )
        return compiled(*args, **kwargs)

    return wrapped
