"""Bodies of plain operations that diffopt compiles by itself on the CPU, and gives up with a warning where it cannot.

The first call of a body compiles it, in 3 to 15 seconds (about one, where torch's cache on disk knows it from another
process). ``DIFFOPT_COMPILE=0`` in the environment switches it off; it is read at every call that would compile.
"""

import functools
import os
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["available", "run"]

_broken: set[Callable[..., Any]] = set()


def available() -> bool:
    """Tell whether bodies may be compiled: not switched off, and a C++ compiler found.

    Returns:
        A bool. The first time that there is no compiler, a RuntimeWarning says so.

    Example:
        >>> os.environ["DIFFOPT_COMPILE"] = "0"
        >>> available()
        False
        >>> del os.environ["DIFFOPT_COMPILE"]
    """
    return os.environ.get("DIFFOPT_COMPILE", "1") != "0" and _has_compiler()


def run(body: Callable[..., Any], *args: Any, dynamic: bool = False) -> Any:
    """Run a body compiled, if it can be.

    Args:
        body: A function that lives as long as the process, compiled on its first use for a dtype.
        *args: Plain tensors on the CPU, and static values.
        dynamic: Whether one compiled body serves all lengths.

    Returns:
        What the body returns, never None; None where compiling is off, or failed with a RuntimeWarning once. Then the
        body has done nothing.

    Example:
        >>> run(lambda x: 2 * x, torch.ones(1)) if not available() else None
    """
    if body in _broken or not available():
        return None
    # no_grad as well as plain tensors: the mode that a body was compiled in is part of what it may be used for.
    with torch.no_grad():
        try:
            return _compiled(body, dynamic)(*args)
        except Exception as error:
            _broken.add(body)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            _warn(f"compiling {body.__name__} failed ({reason})")
            return None


@functools.cache
def _compiled(body: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    # torch limits the compiled versions of a code object, which closures of one function share: give each its own.
    own = types.FunctionType(
        body.__code__.replace(co_name=body.__name__),
        body.__globals__,
        body.__name__,
        body.__defaults__,
        body.__closure__,
    )
    return torch.compile(own, fullgraph=True, dynamic=dynamic, options={"cpp.dynamic_threads": True})


@functools.cache
def _has_compiler() -> bool:
    default = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    found = shutil.which(os.environ.get("CXX", default)) is not None
    if not found:
        _warn("no C++ compiler was found")
    return found


def _warn(cause: str) -> None:
    warnings.warn(
        f"{cause}: large random draws and optimizer steps on the CPU stay eager, some times slower. Set "
        "DIFFOPT_COMPILE=0 to keep them so without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )
