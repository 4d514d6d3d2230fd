"""`torch.utils.checkpoint` inside a module that is called with other values than its own.

It calls parts of the module again in the backward pass, when the module has its own values back, and would give their
gradient, silently. Its internals are looked up here alone; tests/tree/test_recomputation.py fails when one changes.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.func import functional_call

__all__ = ["recomputed_with"]


def recomputed_with(
    module: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> contextlib.AbstractContextManager:
    """Let what is checkpointed in a context be computed again with the values that a module has there.

    Args:
        module: The module.
        params: Its parameters by place.
        buffers: Its buffers by place. The second time, copies of them are updated.

    Returns:
        The context. In it reentrant checkpoints raise: they have no gradient in values that are given.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _recomputed_with(module, params, buffers)


@contextlib.contextmanager
def _recomputed_with(module: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Iterator[None]:
    generator, reentrant = torch_checkpoint._checkpoint_without_reentrant_generator, torch_checkpoint.CheckpointFunction

    def recomputing(fn: Callable[..., Any], *options: Any, **named: Any) -> Any:
        def again(*args: Any, **kwargs: Any) -> Any:
            values = {**params, **{place: value.clone() for place, value in buffers.items()}}
            within = {f"module.{place}": value for place, value in values.items()}
            return functional_call(_Part(module, fn), within, args, kwargs, tie_weights=False)

        return generator(again, *options, **named)

    torch_checkpoint._checkpoint_without_reentrant_generator = recomputing
    torch_checkpoint.CheckpointFunction = _Refused
    try:
        yield
    finally:
        torch_checkpoint._checkpoint_without_reentrant_generator = generator
        torch_checkpoint.CheckpointFunction = reentrant


class _Part(nn.Module):
    """A function that calls parts of a module, as a module that has them."""

    def __init__(self, module: nn.Module, fn: Callable[..., Any]):
        super().__init__()
        self.module, self.fn = module, fn

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.fn(*args, **kwargs)


class _Refused:
    """What reentrant checkpoints meet."""

    @staticmethod
    def apply(*args: Any) -> Any:
        raise RuntimeError(
            "torch.utils.checkpoint(..., use_reentrant=True) gives no gradient in parameters that are given as a tree: "
            "take use_reentrant=False, or diffopt.checkpoint(part)(x), which composes with every transform"
        )
