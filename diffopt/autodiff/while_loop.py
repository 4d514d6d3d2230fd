r"""A loop that stops when its last lane has finished, and is differentiated through the steps it took.

.. math:: x_{k+1} = f(x_k) \text{ while } c(x_k)
"""

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from diffopt.autodiff.closures import hoist
from diffopt.autodiff.levels import any_lane, transforms_active, unwrap_lanes

__all__ = ["while_loop"]

_MOST_COMPILED_STEPS = 64


def while_loop(cond: Callable[[Any], Tensor], body: Callable[[Any], Any], carry: Any, *, max_steps: int) -> Any:
    r"""Repeat `body` while `cond` holds, at most `max_steps` times.

    .. math:: x_{k+1} = \begin{cases} f(x_k) & c(x_k) \\ x_k & \text{otherwise} \end{cases}

    Under `vmap` every lane stops on its own: a finished lane is frozen, and the loop ends with the last one. The
    derivative is that of the unrolled steps; a frozen lane contributes none, not even the NaN of a 0/0 at its
    solution.

    Args:
        cond: `carry -> bool tensor` of shape `()`.
        body: `carry -> carry`, of the same structure, shapes and dtypes.
        carry: a tree of tensors.
        max_steps: the most steps taken, a Python int; reaching it is not an error. Under `torch.compile` all of them
            are taken, with finished lanes frozen, and at most 64 are allowed.

    Returns:
        The last carry.

    Raises:
        TypeError: if `cond` does not return a scalar bool tensor, or `carry` holds a leaf that is not a tensor.
        ValueError: if `max_steps` is negative, or `body` changes the structure, a shape or a dtype.
        RuntimeError: under `torch.compile` with more than 64 steps.

    Example:
        >>> while_loop(lambda x: x < 100, lambda x: 2 * x, torch.tensor(3.0), max_steps=50)
        tensor(192.)
    """
    if not isinstance(max_steps, int) or max_steps < 0:
        raise ValueError(f"max_steps must be a non-negative int; got {max_steps!r}")
    leaves, spec = optree.tree_flatten(carry)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"carry must be a tree of tensors; found a leaf of type {type(leaf).__name__}")

    def flat_cond(values):
        return _checked_mask(cond(spec.unflatten(values)))

    def flat_body(values, body=body):
        return _checked_carry(body(spec.unflatten(values)), values, spec)

    if torch.compiler.is_compiling():
        return spec.unflatten(_compiled_loop(flat_cond, flat_body, tuple(leaves), max_steps))
    return spec.unflatten(_eager_loop(flat_cond, flat_body, tuple(leaves), max_steps, body))


def _eager_loop(cond, step, values, max_steps, body):
    last = None
    for k in range(max_steps):
        live = cond(values)
        if not any_lane(live):
            break
        if not transforms_active() or unwrap_lanes(live).numel() == 1:
            values = step(values)
            continue
        if last is None:
            last = tuple(v.detach() for v in values)
            if k == 0 and any_lane(~live):
                body = _masked(body, live)
        # a frozen lane is fed its last live carry, where the body was finite, so that its zero cotangent stays zero
        fed = tuple(torch.where(live, v, w) for v, w in zip(values, last, strict=True))
        last = tuple(f.detach() for f in fed)
        new = step(fed, body)
        values = tuple(torch.where(live, n, v) for n, v in zip(new, values, strict=True))
    return values


def _masked(body, live):
    """The body with its captured tensors cut off in lanes that never ran: nothing says it is finite there."""
    rebuild, captured, _ = hoist(body)
    return rebuild(*(torch.where(live, c, c.detach()) for c in captured))


def _compiled_loop(cond, step, values, max_steps):
    if max_steps > _MOST_COMPILED_STEPS:
        raise RuntimeError(
            f"while_loop depends on data; compiled, it takes all of its max_steps={max_steps} steps, and at most "
            f"{_MOST_COMPILED_STEPS} are allowed. Use a smaller max_steps, or compile one step and loop outside"
        )
    last = tuple(v.detach() for v in values)
    for _ in range(max_steps):
        live = cond(values)
        fed = tuple(torch.where(live, v, w) for v, w in zip(values, last, strict=True))
        last = tuple(f.detach() for f in fed)
        new = step(fed)
        values = tuple(torch.where(live, n, v) for n, v in zip(new, values, strict=True))
    return values


def _checked_mask(mask):
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 0:
        found = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"cond must return a bool tensor of shape (); got {found}")
    return mask


def _checked_carry(carry, values, spec):
    leaves, found = optree.tree_flatten(carry)
    if found != spec:
        raise ValueError(f"body must return a carry of the structure it was given, {spec}; got {found}")
    for i, (new, old) in enumerate(zip(leaves, values, strict=True)):
        if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
            got = f"{new.dtype} {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"body must keep shapes and dtypes; at {spec.paths()[i]} {old.dtype} {tuple(old.shape)} became {got}"
            )
    return tuple(leaves)
