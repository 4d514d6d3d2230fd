"""`torch.utils.checkpoint` inside modules that have other values in a call than when its graph is differentiated.

It calls parts of a module again in the backward pass. By then the module may have its own values back, or later ones,
and the gradient would be theirs, silently. So what is checkpointed here remembers the values that it saw. The internals
of torch that this needs are named here alone; tests/tree/test_recomputation.py fails when one changes.
"""

import contextlib
import contextvars
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame

__all__ = ["follow", "recomputed_as_seen"]

_called: contextvars.ContextVar[tuple[nn.Module, ...]] = contextvars.ContextVar("modules in a call", default=())
_followed: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def recomputed_as_seen(module: nn.Module) -> contextlib.AbstractContextManager:
    """A context in which what is checkpointed will be computed again with the values that a module has in it.

    Args:
        module: The module.

    Returns:
        The context. In it reentrant checkpoints raise: they have no gradient in values that are given.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _within(module)


def follow(module: nn.Module) -> None:
    """Let all that is checkpointed from now on be computed again with the values that a module had at the call.

    Args:
        module: The module, whose tensors are replaced between calls.
    """
    _prepare()
    _followed.add(module)


@contextlib.contextmanager
def _within(module: nn.Module) -> Iterator[None]:
    _prepare()
    token = _called.set((*_called.get(), module))
    try:
        yield
    finally:
        _called.reset(token)


@functools.cache
def _prepare() -> None:
    """Have torch's checkpoints ask which modules are followed; where none is, they are as they were."""
    begin, reentrant = _CheckpointFrame.__init__, CheckpointFunction.forward

    def remembering(frame: Any, recompute: Callable[..., Any], *options: Any, **named: Any) -> None:
        for module in {*_called.get(), *_followed}:
            recompute = _with_values_of(module, recompute)
        begin(frame, recompute, *options, **named)

    def refusing(ctx: Any, *args: Any) -> Any:
        if _called.get():
            raise RuntimeError(
                "torch.utils.checkpoint(..., use_reentrant=True) gives no gradient in parameters that are given as a "
                "tree: take use_reentrant=False, or diffopt.checkpoint(part)(x), which composes with every transform"
            )
        return reentrant(ctx, *args)

    _CheckpointFrame.__init__ = remembering  # pyright: ignore[reportAttributeAccessIssue]
    CheckpointFunction.forward = staticmethod(refusing)  # pyright: ignore[reportAttributeAccessIssue]


def _with_values_of(module: nn.Module, fn: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is called as if the module had the values of now."""
    params, buffers = _tensors(module, "_parameters"), _tensors(module, "_buffers")
    buffers = {place: value.clone() for place, value in buffers.items()}  # a call may write over them

    def again(*args: Any, **kwargs: Any) -> Any:
        values = {**params, **{place: value.clone() for place, value in buffers.items()}}
        within = {f"module.{place}": value for place, value in values.items()}
        with recomputed_as_seen(module):
            return functional_call(_Part(module, fn), within, args, kwargs, tie_weights=False)

    return again


def _tensors(module: nn.Module, kind: str) -> dict[str, Tensor]:
    """The tensors in each place."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, child in module.named_modules()
        for name, value in getattr(child, kind).items()
        if value is not None
    }


class _Part(nn.Module):
    """A function that calls parts of a module, as a module that has them."""

    def __init__(self, module: nn.Module, fn: Callable[..., Any]):
        super().__init__()
        self.module, self.fn = module, fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)
