r"""Vector-Jacobian products, Jacobian-vector products and gradients that pick the cheapest right path.

With no transform live, plain `torch.autograd.grad` is about four times cheaper a call than `torch.func`; with one
live, only `torch.func` is right. The functions here choose, and return the same either way.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.variable import Variable

from diffopt.autodiff.levels import dual_only, plain_autograd, transforms_active, unwrap_if_dead
from diffopt.tree import flatten, partition

__all__ = ["grad", "jvp", "linearize", "value_and_grad", "vjp"]

_engine = Variable._execution_engine  # the public door checks and wraps more than a small graph costs

Pull: TypeAlias = Callable[..., tuple[Tensor, ...]]
Push: TypeAlias = Callable[..., tuple[Tensor, ...]]


def vjp(fn: Callable[..., Any], *primals: Tensor) -> tuple[Any, Pull]:
    r"""Evaluate a function of tensors and return its pullback, which may be called many times.

    .. math:: v \mapsto v^\top \partial f(x)

    Args:
        fn: takes the primals, returns a tensor or a tuple of tensors.
        primals: floating-point tensors of any shape.

    Returns:
        `(output, pullback)`, where `pullback(*cotangents)` takes one cotangent an output and returns one an input.
        Both are differentiable again, also in whatever `fn` captured.

    Example:
        >>> out, pullback = vjp(torch.sin, torch.tensor([0.0]))
        >>> pullback(torch.ones(1))
        (tensor([1.]),)
    """
    out, pullback, _ = linearize(fn, *primals)
    return out, pullback


def linearize(fn: Callable[..., Any], *primals: Tensor) -> tuple[Any, Pull, Push]:
    r"""Evaluate a function of tensors once, and return the two linear maps of its derivative there.

    .. math:: v \mapsto v^\top \partial f(x), \qquad t \mapsto \partial f(x)\, t

    The second is the pullback pulled back, so that neither evaluates `fn` again.

    Args:
        fn: takes the primals, returns a tensor or a tuple of tensors.
        primals: floating-point tensors of any shape.

    Returns:
        `(output, pullback, pushforward)`; `pushforward(*tangents)` returns a tuple with one tangent an output.

    Example:
        >>> out, pullback, pushforward = linearize(lambda x: x[:1] * x[1:], torch.tensor([2.0, 3.0]))
        >>> pullback(torch.ones(1)), pushforward(torch.tensor([1.0, 0.0]))
        ((tensor([3., 2.]),), (tensor([3.]),))
    """
    primals = tuple(map(unwrap_if_dead, primals))
    return _autograd_linearize(fn, primals) if plain_autograd() else _functional_linearize(fn, primals)


def pullbacks(fn: Callable[..., Tensor], *primals: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """The pullback to each primal on its own, sharing one evaluation; for plain autograd, where nothing is tracked."""
    with torch.enable_grad():
        inputs = _fresh(primals, False)
        out = fn(*inputs)
    _retire(inputs)
    if not out.requires_grad:
        return [lambda v, p=p: torch.zeros_like(p) for p in primals]
    return [lambda v, x=x: _backward((out,), (x,), (v,), keep=True, create=False)[0] for x in inputs]


def _functional_linearize(fn, primals):
    out, pull = torch.func.vjp(fn, *primals)[:2]
    outs = out if isinstance(out, tuple) else (out,)
    pull_tuple = pull if isinstance(out, tuple) else (lambda cotangents: pull(cotangents[0]))
    push = None

    def pushforward(*tangents: Tensor) -> tuple[Tensor, ...]:
        nonlocal push
        if push is None:
            push = torch.func.vjp(lambda *v: pull_tuple(v), *map(torch.zeros_like, outs))[1]
        return push(tangents)

    return out, (lambda *cotangents: pull_tuple(cotangents)), pushforward


def _autograd_linearize(fn, primals):
    connected = torch.is_grad_enabled() and any(p.requires_grad for p in primals)
    with torch.enable_grad():
        inputs = _fresh(primals, connected)
        out = fn(*inputs)
    _retire(inputs)
    outs = out if isinstance(out, tuple) else (out,)
    create = connected or (torch.is_grad_enabled() and _reaches_foreign_leaf(outs, inputs))
    live = [o for o in outs if o.requires_grad]
    pulled = None

    def differentiate(results, at, weights):
        for result, weight in zip(results, weights, strict=True):
            if weight.shape != result.shape:
                raise ValueError(f"expected a weight of shape {tuple(result.shape)}; got {tuple(weight.shape)}")
        again = create or (torch.is_grad_enabled() and any(w.requires_grad for w in weights))
        return _backward(results, at, weights, keep=True, create=again)

    def pullback(*cotangents: Tensor) -> tuple[Tensor, ...]:
        if len(cotangents) != len(outs):
            raise ValueError(f"the pullback takes {len(outs)} cotangents, one an output; got {len(cotangents)}")
        if not live:
            return tuple(map(torch.zeros_like, primals))
        return differentiate(live, inputs, [c for o, c in zip(outs, cotangents, strict=True) if o.requires_grad])

    def pushforward(*tangents: Tensor) -> tuple[Tensor, ...]:
        nonlocal pulled
        if pulled is None:
            with torch.enable_grad():
                seeds = tuple(torch.zeros_like(o, requires_grad=True) for o in outs)
                pulled = seeds, pullback(*seeds)
                _retire(seeds)
        seeds, results = pulled
        moving = [(r, t) for r, t in zip(results, tangents, strict=True) if r.requires_grad]
        if not moving:
            return tuple(map(torch.zeros_like, outs))
        return differentiate([r for r, _ in moving], seeds, [t for _, t in moving])

    return (out if create else _detach(out)), pullback, pushforward


def _backward(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor], *, keep: bool, create: bool
):
    """`torch.autograd.grad` without its checks, which cost twice the pass itself on small graphs."""
    found = _engine.run_backward(
        tuple(outputs), tuple(weights), keep, create, tuple(inputs), allow_unreachable=True, accumulate_grad=False
    )
    return tuple(torch.zeros_like(x) if f is None else f for f, x in zip(found, inputs, strict=True))


def _fresh(primals: Sequence[Tensor], connected: bool) -> tuple[Tensor, ...]:
    """Stand-ins for the primals: aliases where the outer graph must stay attached, new leaves elsewhere."""
    return tuple(p.view_as(p) if connected and p.requires_grad else p.detach().requires_grad_() for p in primals)


def _retire(stand_ins: Sequence[Tensor]) -> None:
    """Mark stand-ins whose function has returned: nobody else can ask for a gradient in them any more."""
    for tensor in stand_ins:
        tensor._retired = True  # pyright: ignore[reportAttributeAccessIssue]


def _detach(out):
    return tuple(o.detach() for o in out) if isinstance(out, tuple) else out.detach()


def _reaches_foreign_leaf(outs: Sequence[Tensor], ours: Sequence[Tensor]) -> bool:
    """Whether the outputs depend on a leaf that the caller did not pass in, such as a captured parameter."""
    known = {id(leaf) for leaf in ours}
    stack = [o.grad_fn for o in outs if o.grad_fn is not None]
    seen = set(stack)
    while stack:
        parents = stack.pop().next_functions
        for parent, _ in parents:
            if parent is None or parent in seen:
                continue
            leaf = None if parent.next_functions else getattr(parent, "variable", None)
            if leaf is not None and id(leaf) not in known and not getattr(leaf, "_retired", False):
                return True
            seen.add(parent)
            if leaf is None:
                stack.append(parent)
    return any(o.grad_fn is None and o.requires_grad and id(o) not in known for o in outs)


def jvp(fn: Callable[..., Any], primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Any, Any]:
    r"""Evaluate a function of tensors and its directional derivative.

    .. math:: (x, t) \mapsto (f(x),\ \partial f(x)\, t)

    Args:
        fn: takes the primals, returns a tensor or a tuple of tensors.
        primals: floating-point tensors of any shape.
        tangents: one a primal, of the same shape and dtype.

    Returns:
        `(output, tangent)`, the tangent shaped like the output; legal inside `forward_ad.dual_level` too, where
        `torch.func.jvp` raises.

    Example:
        >>> jvp(torch.sin, (torch.tensor(0.0),), (torch.tensor(2.0),))[1]
        tensor(2.)
    """
    primals, tangents = tuple(primals), tuple(tangents)
    if any(p.is_complex() for p in primals):
        raise TypeError("jvp takes real tensors; pass torch.view_as_real of complex ones")
    if torch.compiler.is_compiling() or (transforms_active() and not dual_only()):
        return torch.func.jvp(fn, tuple(map(_unexpanded, primals)), tangents)[:2]
    out, _, pushforward = linearize(fn, *primals)
    tangent = pushforward(*tangents)
    return out, (tangent if isinstance(out, tuple) else tangent[0])


def _unexpanded(x: Tensor) -> Tensor:
    """The tensor in memory of its own: torch cannot give a tangent to one whose entries share theirs."""
    shared = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.clone(memory_format=torch.contiguous_format) if shared else x


def value_and_grad(
    fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    r"""Make a function that returns the value of `fn` and its gradient.

    .. math:: x \mapsto (f(x),\ \nabla f(x))

    Args:
        fn: returns a scalar tensor, or `(scalar, aux)` with `has_aux`.
        argnums: which positional arguments (trees of floating-point tensors) to differentiate.
        has_aux: whether `fn` returns a second, undifferentiated output.

    Returns:
        A function of the same arguments returning `(value, gradient)`, or `((value, aux), gradient)`. The gradient
        is a tree like the argument, a tuple of them where `argnums` is a tuple. It composes with every `torch.func`
        transform, and keeps the gradient of tensors that `fn` captured.

    Raises:
        TypeError: if a differentiated leaf is not a floating-point tensor, or `fn` does not return a scalar tensor.
        ValueError: if `argnums` names an argument that was not given.

    Example:
        >>> value_and_grad(lambda x: (x**2).sum())(torch.tensor([1.0, 2.0]))
        (tensor(5.), tensor([2., 4.]))
    """
    argnums_tuple = tuple(argnums) if isinstance(argnums, (tuple, list)) else (argnums,)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        leaves, spec = _differentiated(args, argnums_tuple)
        if not plain_autograd():
            value, aux, grads = _functional(fn, args, kwargs, argnums_tuple, has_aux, leaves, spec)
        else:
            value, aux, grads = _autograd(fn, args, kwargs, argnums_tuple, has_aux, leaves, spec)
        grads = grads if isinstance(argnums, (tuple, list)) else grads[0]
        return ((value, aux) if has_aux else value), grads

    return wrapped


def grad(fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, *, has_aux: bool = False) -> Callable[..., Any]:
    r"""Make a function that returns the gradient of `fn`, with `aux` beside it where `has_aux`.

    .. math:: x \mapsto \nabla f(x)

    Args:
        fn: as in `value_and_grad`.
        argnums: as in `value_and_grad`.
        has_aux: as in `value_and_grad`.

    Returns:
        A function of the same arguments returning the gradient, or `(gradient, aux)`.

    Raises:
        TypeError: as in `value_and_grad`.
        ValueError: as in `value_and_grad`.

    Example:
        >>> grad(grad(lambda x: x**3))(torch.tensor(2.0))
        tensor(12.)
    """
    both = value_and_grad(fn, argnums, has_aux=has_aux)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return wrapped


def _differentiated(args: tuple, argnums: tuple[int, ...]):
    if not all(isinstance(n, int) for n in argnums):
        raise TypeError(f"argnums must be ints; got {argnums}")
    if len({n % max(len(args), 1) for n in argnums}) < len(argnums):
        raise ValueError(f"argnums must name different arguments; got {argnums}")
    for n in argnums:
        if not -len(args) <= n < len(args):
            raise ValueError(f"argnums names argument {n}, but {len(args)} positional arguments were given")
    leaves, spec = flatten(tuple(args[n] for n in argnums))
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            found = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"a differentiated argument must be a tree of floating-point tensors; found {found}")
    return leaves, spec


def _call(fn, args, kwargs, argnums, values, has_aux):
    args = list(args)
    for n, value in zip(argnums, values, strict=True):
        args[n] = value
    out = fn(*args, **kwargs)
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"with has_aux=True the function must return (scalar, aux); got {type(out).__name__}")
    value, aux = out if has_aux else (out, None)
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError("the function must return a real scalar; got a complex one. Take its .real or .abs()")
    if not isinstance(value, Tensor) or value.numel() != 1 or value.dim() > 1:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"the function must return a scalar tensor; got {found}. Reduce it, for example by .sum()")
    return (value.reshape(()) if value.dim() else value), aux


def _functional(fn, args, kwargs, argnums, has_aux, leaves, spec):
    merge_aux = None

    def scalar(*flat):
        value, extra = _call(fn, args, kwargs, argnums, spec.unflatten(flat), has_aux)
        nonlocal merge_aux
        tensors, merge_aux = partition(extra)
        return value, tensors

    if not leaves:
        return *_call(fn, args, kwargs, argnums, spec.unflatten(()), has_aux), spec.unflatten(())
    # not torch.func.grad: that one keeps the graph of its own backward pass, which undoes checkpoints
    found: Any = torch.func.vjp(scalar, *leaves, has_aux=True)
    value, pull, tensors = found
    grads = pull(torch.ones_like(value))
    assert merge_aux is not None
    return value, merge_aux(tensors), spec.unflatten(grads)


def _autograd(fn, args, kwargs, argnums, has_aux, leaves, spec):
    connected = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    with torch.enable_grad():
        inputs = _fresh(leaves, connected)
        value, aux = _call(fn, args, kwargs, argnums, spec.unflatten(inputs), has_aux)
    _retire(inputs)
    reached = (value, *partition(aux)[0]) if has_aux else (value,)
    create = connected or (torch.is_grad_enabled() and _reaches_foreign_leaf(reached, inputs))
    if inputs and value.requires_grad:
        grads = _backward((value,), inputs, (torch.ones_like(value),), keep=create, create=create)
    else:
        grads = tuple(map(torch.zeros_like, inputs))
    if not create:
        value, aux = value.detach(), _detach_tensors(aux) if has_aux else None
    return value, aux, spec.unflatten(grads)


def leaf_gradient(value: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """The gradient of a scalar in leaves made for it, whose graph it frees; for plain autograd alone.

    Args:
        value: A scalar, computed in grad mode.
        leaves: Leaves that require grad and that only the caller knows.

    Returns:
        A tensor for each leaf; None, and the graph as it was, if a derivative of it may be asked for: in grad mode, if
        the value depends on another leaf.
    """
    if torch.is_grad_enabled() and _reaches_foreign_leaf((value,), leaves):
        return None
    if not value.requires_grad:
        return tuple(map(torch.zeros_like, leaves))
    found = _engine.run_backward(
        (value,), (torch.ones_like(value),), False, False, leaves, allow_unreachable=True, accumulate_grad=False
    )
    return tuple([torch.zeros_like(x) if f is None else f for f, x in zip(found, leaves, strict=True)])


def _detach_tensors(tree):
    tensors, merge = partition(tree)
    return merge([t.detach() for t in tensors])
