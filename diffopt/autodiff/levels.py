"""Which transforms are live, and what a tensor carries for them.

Every private torch name that diffopt needs for this is imported here, so that a change in torch breaks one
file. `tests/autodiff/test_levels.py` fails when the meaning of one of them changes.
"""

import contextlib
import operator
from collections.abc import Iterable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import (  # no public way to look inside a functorch wrapper
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    maybe_get_bdim,
    maybe_get_level,
    peek_interpreter_stack,
    unwrap_if_dead,
)
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack  # to ask a tensor at its own level
from torch.autograd.forward_ad import _set_fwd_grad_enabled  # a Function's jvp runs with forward AD off

__all__ = [
    "any_lane",
    "batched_at_most",
    "derivative_possible",
    "derivative_wanted",
    "dual_only",
    "enable_forward_ad",
    "first_lane",
    "functorch_active",
    "is_legacy_batchedtensor",
    "is_live",
    "is_tracked",
    "level_primals",
    "plain_autograd",
    "transforms_active",
    "unwrap_if_dead",
    "unwrap_lanes",
]


_requires_grad = operator.attrgetter("requires_grad")


def transforms_active() -> bool:
    """Whether a `torch.func` transform or a `forward_ad.dual_level` is live around the caller.

    Returns:
        A Python bool; plain autograd does not count.

    Example:
        >>> transforms_active()
        False
        >>> torch.func.vmap(lambda x: x * transforms_active())(torch.ones(2))
        tensor([1., 1.])
    """
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def functorch_active() -> bool:
    """Whether a `torch.func` transform is live around the caller."""
    return peek_interpreter_stack() is not None


def derivative_possible(tensors: Iterable[Tensor]) -> bool:
    """Whether anything may later ask for a derivative, or a batch, of a function of these tensors."""
    return transforms_active() or (torch.is_grad_enabled() and any(map(_requires_grad, tensors)))


def batched_at_most(tensors: Iterable[Tensor]) -> bool:
    """Whether a batch is all that rides on these tensors: no transform but `vmap` is live, and none needs a gradient.

    No derivative of what is computed from them alone can be asked for, now or later.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if any(level.key() != TransformType.Vmap for level in get_interpreter_stack() or ()):
        return False
    return not (torch.is_grad_enabled() and any(unwrap_lanes(t).requires_grad for t in tensors))


def derivative_wanted() -> bool:
    """Whether a derivative of what is computed now may be asked for, in tensors that are not in sight."""
    return torch.is_grad_enabled() or transforms_active()


def dual_only() -> bool:
    """Whether the innermost forward level is a base `forward_ad.dual_level`, under any other transforms.

    There `torch.func.jvp` raises, so derivatives must be taken by two reverse passes.
    """
    if forward_ad._current_level < 0:
        return False
    return not any(level.key() == TransformType.Jvp for level in get_interpreter_stack() or ())


def plain_autograd() -> bool:
    """Whether derivatives may be taken by `torch.autograd` directly: no transform, no inference mode, not compiling."""
    return not (torch.compiler.is_compiling() or transforms_active() or torch.is_inference_mode_enabled())


def is_tracked(tensor: Tensor) -> bool:
    """Whether a gradient, a tangent or a batch dimension rides on the tensor."""
    return is_functorch_wrapped_tensor(tensor) or tensor.requires_grad or _has_tangent(tensor)


def is_live(tensor: Tensor) -> bool:
    """Whether a gradient, a tangent or a batch dimension really rides on a computed tensor.

    Under a transform every result is wrapped, also one that depends on constants alone; this looks inside.
    """
    if not is_functorch_wrapped_tensor(tensor):
        return tensor.requires_grad or _has_tangent(tensor)
    with contextlib.ExitStack() as stack:
        while is_functorch_wrapped_tensor(tensor):
            top = peek_interpreter_stack()
            if top is not None and top.level() > maybe_get_level(tensor):
                stack.enter_context(temporarily_pop_interpreter_stack())
                continue
            if is_batchedtensor(tensor) or tensor.requires_grad or _tangent(tensor) is not None:
                return True
            tensor = get_unwrapped(tensor)
    return tensor.requires_grad or _has_tangent(tensor)


def _tangent(tensor: Tensor) -> Tensor | None:
    return forward_ad.unpack_dual(tensor, level=0).tangent


def _has_tangent(tensor: Tensor) -> bool:
    """Whether a plain tensor carries a tangent of a base `dual_level`, seen from under any transform."""
    if forward_ad._current_level < 0:
        return False
    with contextlib.ExitStack() as stack:
        while peek_interpreter_stack() is not None:
            stack.enter_context(temporarily_pop_interpreter_stack())
        return _tangent(tensor) is not None


def level_primals(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors without the tangent of the innermost level; tangents of outer levels stay."""
    return tuple(forward_ad.unpack_dual(tensor, level=0).primal for tensor in tensors)


def enable_forward_ad():
    """A context in which the rules inside a `Function.jvp` are themselves differentiated forward.

    Without it, forward-over-forward is silently wrong (pytorch issue 197867).
    """
    return _set_fwd_grad_enabled(True)


def unwrap_lanes(tensor: Tensor) -> Tensor:
    """The plain tensor under all wrappers, with one extra dimension for every vmap it is batched over."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def any_lane(mask: Tensor) -> bool:
    r"""Whether a boolean tensor holds anywhere, in any lane of any enclosing `vmap`.

    .. math:: \bigvee_{\text{lanes}} \bigvee_i m_i

    Legal under every nesting of `vmap`, `grad` and `jvp`, where `bool(mask)` is not; this is what lets a Python
    loop stop when its last lane has finished.

    Args:
        mask: a bool tensor of any shape.

    Returns:
        A Python bool, the same for all lanes.

    Raises:
        TypeError: if `mask` is not a bool tensor.
        RuntimeError: while compiling, where the answer depends on data.

    Example:
        >>> torch.func.vmap(lambda x: x + any_lane(x > 2))(torch.tensor([1.0, 3.0]))
        tensor([2., 4.])
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "any_lane depends on data and cannot be compiled; use a fixed number of steps, or compile one step"
        )
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"any_lane needs a bool tensor; got {getattr(mask, 'dtype', type(mask).__name__)}")
    return bool(unwrap_lanes(mask).any())


def first_lane(tensor: Tensor) -> Tensor:
    """The tensor as the first lane of every vmap sees it, plain and detached; zeros where a vmap is empty."""
    shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
    while is_functorch_wrapped_tensor(tensor):
        dim = maybe_get_bdim(tensor) if is_batchedtensor(tensor) else None
        tensor = get_unwrapped(tensor)
        if dim is not None:
            if tensor.shape[dim] == 0:
                return torch.zeros(shape, dtype=dtype, device=device)
            tensor = tensor.select(dim, 0)
    return tensor.detach()
