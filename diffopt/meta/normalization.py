r"""Normalization layers whose second derivatives are right under `vmap`.

.. math:: \text{norm}(x, w, b) = \text{norm}(x, 1, 0) \cdot w + b

The gradient of `layer_norm`, `batch_norm` and `instance_norm` in inputs and weights, taken under `torch.func.vmap`, has
a wrong derivative (pytorch/functorch#534, torch 2.13), and a meta-gradient needs it. Without weights, theirs is right.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffopt.autodiff import transforms_active

__all__ = ["sound_norms"]


def sound_norms(stateful: bool) -> contextlib.AbstractContextManager:
    """Within, normalizations apply their weights on their own, where a transform is live or there is state."""
    needed = stateful or torch.compiler.is_compiling() or transforms_active()
    return _SoundNorms() if needed else contextlib.nullcontext()


class _SoundNorms(TorchFunctionMode):
    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _layer_norm(input, normalized_shape, weight=None, bias=None, *rest: Any, **options: Any) -> Tensor:
    y = F.layer_norm(input, normalized_shape, None, None, *rest, **options)
    return _affine(y, weight, bias, list(normalized_shape))


def _over_channels(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def separate(input, running_mean=None, running_var=None, weight=None, bias=None, *rest: Any, **options: Any):
        # constants to torch also where it does not raise; updated in place
        statistics = (s if s is None else s.detach() for s in (running_mean, running_var))
        y = norm(input, *statistics, None, None, *rest, **options)
        return _affine(y, weight, bias, [1, -1] + [1] * (input.ndim - 2))

    return separate


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _over_channels(F.batch_norm),
    F.instance_norm: _over_channels(F.instance_norm),
}
