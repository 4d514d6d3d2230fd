r"""Trade computation for memory: recompute instead of storing, over one call or along an unroll.

An unroll of T steps stores T carries. With checkpoints it stores :math:`O(\sqrt T)` or :math:`O(\log T)` of them, and
computes the rest again in the backward pass (Griewank and Walther, 2000; Chen et al., 2016).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import optree
import torch
from torch import Tensor

from diffopt.autodiff.closures import check_closed, hoist
from diffopt.autodiff.custom_derivative import Rules, by_rule, rules_of
from diffopt.autodiff.levels import derivative_wanted
from diffopt.tree import partition

__all__ = ["checkpoint", "unroll"]


def checkpoint(fn: Callable[..., Any]) -> Callable[..., Any]:
    r"""Make a function that stores only its inputs for the backward pass, and computes the rest again there.

    Composes with every transform, unlike `torch.utils.checkpoint`. Memory is saved under `diffopt.grad` (also mapped by
    `vmap`), `.backward()` and `torch.func.vjp`; `torch.func.grad` gives the same gradient, but keeps the graph of its
    own backward pass, and with it what was recomputed. `fn` must be deterministic: dropout would draw another mask the
    second time, so draw random numbers from explicit keys.

    Args:
        fn: takes and returns trees of tensors; arguments that are not tensors are passed as they are.

    Returns:
        A function of the same value and derivatives.

    Raises:
        TypeError: if `fn` returns a leaf that is not a tensor.
        ValueError: if `fn` uses a tracked tensor that cannot be found to be passed in (see `hoist`).

    Example:
        >>> torch.func.grad(checkpoint(lambda x: x.sin().sin()))(torch.tensor(0.0))
        tensor(1.)

    References:
        Chen, Xu, Zhang and Guestrin (2016), Training deep nets with sublinear memory cost.
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        rebuild, captured, complete = hoist(fn)

        def closed(found, args, kwargs):
            return rebuild(*found)(*args, **kwargs)

        return _recomputed(closed, captured, args, kwargs, complete=complete)

    return wrapped


def _recomputed(fn: Callable[..., Any], *args: Any, complete: bool = True) -> Any:
    """`fn(*args)` storing only the arguments, for a function that captures nothing tracked, known if `complete`."""
    tensors, merge = partition(args)
    kinds = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _kinds(tensors)]
    out_spec = None

    def flat(*inputs):
        nonlocal out_spec
        with _autocast(kinds):  # also in the backward pass, which runs outside of it
            out, out_spec = optree.tree_flatten(fn(*merge(inputs)))
        for leaf in out:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"a checkpointed function must return tensors; found {type(leaf).__name__}")
        return tuple(out)

    def primal(*inputs):
        # under grad mode a tracked tensor that the walk of hoist missed shows in the output, and raises
        with torch.enable_grad():
            return flat(*(x.detach() for x in inputs))

    if not complete and derivative_wanted():
        check_closed(flat, tensors, name="the checkpointed function")
    vjp, jvp = rules_of(flat)
    out = by_rule(Rules(primal, vjp, jvp, "vmap"))(*tensors)
    assert out_spec is not None
    return out_spec.unflatten(out)


def _kinds(tensors: list[Tensor]) -> list[str]:
    """The kinds of device for which autocast may be on."""
    return sorted({"cpu", *(x.device.type for x in tensors)} - {"meta"})


@contextlib.contextmanager
def _autocast(kinds: list[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """Autocast as it was: on for some kinds of device, off for others."""
    with contextlib.ExitStack() as stack:
        for kind, enabled, dtype in kinds:
            if enabled or torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
        yield


def unroll(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    checkpoint: Literal["sqrt", "log"] | int | None = None,
    truncate: int | None = None,
) -> tuple[Any, Any]:
    r"""Run a step T times, differentiably, in as much memory as you allow.

    .. math:: (c_{t+1}, y_t) = \text{step}(c_t, x_t), \qquad t = 0, \dots, T - 1

    With checkpoints, differentiate by `diffopt.grad` or `.backward()`: see `checkpoint` for why not `torch.func.grad`.

    Args:
        step: `(carry, x) -> (carry, y)`; `y` may be None or any tree of tensors of fixed shapes.
        carry: a tree of tensors.
        xs: a tree of tensors with a leading dimension T, or None, in which case `x` is None and `length` tells T.
        length: T, where `xs` is None.
        checkpoint: None stores every step; "sqrt" stores :math:`O(\sqrt T)` carries and computes each step twice;
            "log" stores :math:`O(\log T)` and computes each up to :math:`\log_2 T + 1` times; an int k stores every
            k-th carry.
        truncate: k cuts the gradient of the carry before the last k steps, and every k steps before that: truncated
            backpropagation, for the final carry the last k steps alone.

    Returns:
        `(carry, ys)`, the last carry and the stacked `y`.

    Raises:
        ValueError: if T is ambiguous, or `checkpoint` or `truncate` is not as above.

    Example:
        >>> def loss(rate):
        ...     w, _ = unroll(lambda w, _: (w - rate * w, None), torch.tensor(1.0), length=3, checkpoint="sqrt")
        ...     return w
        >>> torch.func.grad(loss)(torch.tensor(0.5))
        tensor(-0.7500)

    References:
        Griewank and Walther (2000), Algorithm 799: revolve. Shaban et al. (2019), Truncated back-propagation for
        bilevel optimization, eq. 8.
    """
    size = _length(xs, length)
    if checkpoint not in (None, "sqrt", "log") and not (_is_int(checkpoint) and checkpoint >= 1):
        raise ValueError(f'checkpoint must be None, "sqrt", "log" or a positive int; got {checkpoint!r}')
    if truncate is not None and not (_is_int(truncate) and truncate >= 1):
        raise ValueError(f"truncate must be None or a positive int; got {truncate!r}")
    strategy = None if torch.compiler.is_compiling() else checkpoint
    rebuild, consts, complete = (lambda: step, [], True) if strategy is None else hoist(step)
    if not complete and size and derivative_wanted():
        _check_step(rebuild, consts, carry, _rows(xs, 0, 1))
    run = functools.partial(_run, rebuild, strategy)

    window = truncate or max(size, 1)
    ys, start = [], 0
    for stop in [*range(size % window, size, window), size] if size else []:
        if stop == start:
            continue
        if start:
            tensors, merge = partition(carry)
            carry = merge([t.detach() for t in tensors])
        carry, found = run(consts, carry, _rows(xs, start, stop), stop - start)
        ys.append(found)
        start = stop
    return carry, _concatenate(ys)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _length(xs, length):
    sizes = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in optree.tree_leaves(xs)}
    if None in sizes or len(sizes) > 1:
        got = "leaves without one" if None in sizes else f"{sizes}"
        raise ValueError(
            f"xs must be a tree of tensors that share their first dimension; got {got}. For a number of steps alone, "
            f"write length="
        )
    size = sizes.pop() if sizes else length
    if length is not None and not _is_int(length):
        raise TypeError(f"length must be an int; got {length!r}")
    if size is None or size < 0 or (length is not None and length != size):
        raise ValueError(f"give xs or a non-negative length that agrees with it; got {size} rows and length={length}")
    return size


def _check_step(rebuild, consts, carry, row):
    tensors, merge = partition((carry, row))

    def once(*inputs):
        carry, row = merge(inputs[len(consts) :])
        return _plain(rebuild(*inputs[: len(consts)]), carry, row, 1)

    check_closed(once, (*consts, *tensors), name="the step")


def _run(rebuild, strategy, consts, carry, xs, size):
    """The unroll over one window: `(carry, ys)`, the y stacked."""
    if strategy is None:
        return _plain(rebuild(*consts), carry, xs, size)
    if strategy == "log":
        return _bisect(rebuild, consts, carry, xs, size)
    block = math.isqrt(max(size - 1, 0)) + 1 if strategy == "sqrt" else strategy
    ys = []
    for start in range(0, size, block):
        rows = _rows(xs, start, min(start + block, size))
        carry, found = _recomputed(
            lambda consts, carry, rows, count: _plain(rebuild(*consts), carry, rows, count),
            consts, carry, rows, min(block, size - start),
        )  # fmt: skip
        ys.append(found)
    return carry, _concatenate(ys)


def _bisect(rebuild, consts, carry, xs, size):
    if size <= 1:
        return _plain(rebuild(*consts), carry, xs, size)
    half = size // 2
    carry, first = _recomputed(functools.partial(_bisect, rebuild), consts, carry, _rows(xs, 0, half), half)
    carry, second = _recomputed(functools.partial(_bisect, rebuild), consts, carry, _rows(xs, half, size), size - half)
    return carry, _concatenate([first, second])


def _plain(step, carry, xs, size):
    ys = []
    for t in range(size):
        out = step(carry, optree.tree_map(lambda leaf, t=t: leaf[t], xs))
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"step must return (carry, y), y possibly None; got {type(out).__name__}")
        carry, y = out
        ys.append(y)
    return carry, optree.tree_map(lambda *rows: torch.stack(rows), *ys) if ys else None


def _rows(xs, start, stop):
    return optree.tree_map(lambda leaf: leaf[start:stop], xs)


def _concatenate(ys):
    if len(ys) <= 1:
        return ys[0] if ys else None
    return optree.tree_map(lambda *blocks: torch.cat(blocks), *ys)
