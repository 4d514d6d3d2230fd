"""Functions with a derivative given by rule, under every transform at any nesting.

One `torch.autograd.Function` serves them all. Its first argument is an opaque `Rules` object; `vmap` replaces the
rules by batched ones and applies the same Function again, so any stack of transforms ends at plain tensors.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt.autodiff.closures import check_closed, hoist
from diffopt.autodiff.gradients import jvp as jvp_of
from diffopt.autodiff.gradients import vjp as vjp_of
from diffopt.autodiff.levels import (
    derivative_possible,
    derivative_wanted,
    enable_forward_ad,
    functorch_active,
    is_legacy_batchedtensor,
    is_tracked,
    level_primals,
    transforms_active,
    unwrap_if_dead,
)

__all__ = ["Batching", "Rules", "by_rule", "choose", "custom_derivative", "rules_of"]

Tensors: TypeAlias = tuple[Tensor, ...]
Partial: TypeAlias = tuple[Tensor | None, ...]
Primal: TypeAlias = Callable[..., Tensors]
Batching: TypeAlias = Literal["vmap", "sequential"] | Callable[[Primal, tuple[int | None, ...], int], Primal]


class Rules(NamedTuple):
    """A function and its derivatives, as `custom_derivative` takes them.

    With `forgets_outputs`, the rules look at no values of the outputs, and may be given their shapes and dtypes alone.
    """

    primal: Callable[..., Tensors]
    vjp: Callable[[Tensors, Tensors, Partial, tuple[bool, ...]], Partial]
    jvp: Callable[[Tensors, Tensors, Partial], Partial]
    batching: Batching
    forgets_outputs: bool = False


class _Like(NamedTuple):
    """What is known of an output that was not saved."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        return self.dtype.is_complex


def custom_derivative(
    primal: Callable[..., Tensors],
    *,
    vjp: Callable[[Tensors, Tensors, Partial, tuple[bool, ...]], Partial],
    jvp: Callable[[Tensors, Tensors, Partial], Partial],
    batching: Batching = "vmap",
    traceable: Callable[..., Tensors] | None = None,
) -> Callable[..., Tensors]:
    r"""Give a function of flat tensors its derivative by rule.

    .. math:: \bar x = v^\top \partial f(x), \qquad \dot y = \partial f(x)\, t

    The rules are ordinary differentiable functions, so derivatives of any order follow by recursion. Neither the
    function nor the rules may capture a tensor that carries gradient or a batch dimension: pass it as an input
    (`hoist` does so for a user's function). What is found so raises; a tensor that a rule alone hides is not found.

    Args:
        primal: `(*inputs) -> outputs`, a tuple of tensors. It sees plain tensors, or those of a `vmap` made here.
        vjp: `(inputs, outputs, cotangents, wanted) -> cotangents of the inputs`; entries where `wanted` is False
            are ignored and may be None. Cotangents of integer outputs are None.
        jvp: `(inputs, outputs, tangents) -> tangents of the outputs`; tangents of integer inputs are None, those of
            integer outputs are ignored.
        batching: how `vmap` runs `primal`: "vmap" maps it, "sequential" calls it once a lane (for `.item()`, NumPy
            or SciPy inside); a callable `(primal, in_dims, batch_size) -> primal` makes the batched function itself,
            its outputs batched in dimension 0.
        traceable: the same function in plain differentiable operations, used under `torch.compile`; without it,
            compiling raises.

    Returns:
        A function `(*inputs) -> outputs`.

    Raises:
        RuntimeError: under `torch.compile` without `traceable`.
        TypeError: if `primal` does not return a tuple of tensors, or a rule does not return what it should.
        ValueError: when called, if the function or a rule captured a tensor that carries gradient or a batch
            dimension.

    Example:
        >>> def cube_vjp(inputs, outputs, cotangents, wanted):
        ...     return (3 * inputs[0] ** 2 * cotangents[0],)
        >>> def cube_jvp(inputs, outputs, tangents):
        ...     return (3 * inputs[0] ** 2 * tangents[0],)
        >>> cube = custom_derivative(lambda x: (x**3,), vjp=cube_vjp, jvp=cube_jvp)
        >>> torch.func.grad(torch.func.grad(lambda x: cube(x)[0]))(torch.tensor(2.0))
        tensor(12.)
    """
    if batching not in ("vmap", "sequential") and not callable(batching):
        raise ValueError(f'batching must be "vmap", "sequential" or a callable; got {batching!r}')
    apply = by_rule(Rules(primal, vjp, jvp, batching), traceable)

    def checked(*inputs: Tensor) -> Tensors:
        refuse_captures(primal, vjp, jvp, inputs=inputs)
        return apply(*inputs)

    return checked


def refuse_captures(primal: Callable[..., Tensors], *others: Any, inputs: Sequence[Tensor]) -> None:
    """Raise if functions that must take all they use as inputs captured a tracked tensor."""
    found = hoist(primal, *others)
    if found.captured:
        raise ValueError(
            "the function or a rule captured a tensor that carries gradient or a batch dimension; its gradient would "
            "be lost: make it an input"
        )
    if not found.complete and not torch.compiler.is_compiling() and derivative_wanted():
        check_closed(primal, inputs, name="the function")


def by_rule(rules: Rules, traceable: Callable[..., Tensors] | None = None) -> Callable[..., Tensors]:
    """`custom_derivative` for rules that are known to capture nothing tracked."""

    def apply(*inputs: Tensor) -> Tensors:
        if torch.compiler.is_compiling():
            return _trace(traceable, inputs)
        if derivative_possible(inputs):
            return _CustomDerivative.apply(rules, *inputs)
        with torch.no_grad():
            return _evaluate(rules.primal, inputs)

    return apply


def rules_of(fn: Callable[..., Tensors]) -> tuple[Callable, Callable]:
    """The rules that differentiate a function of flat tensors by running it again on the saved inputs.

    Args:
        fn: `(*inputs) -> outputs`, a tuple of tensors, differentiable by torch.

    Returns:
        `(vjp, jvp)` for `custom_derivative`.

    Example:
        >>> vjp, jvp = rules_of(lambda x: (x**2,))
        >>> sqr = custom_derivative(lambda x: (x * x,), vjp=vjp, jvp=jvp)
        >>> torch.func.grad(lambda x: sqr(x)[0])(torch.tensor(3.0))
        tensor(6.)
    """

    def differentiable(inputs, chosen):
        part, primals = choose(fn, inputs, chosen)
        return (lambda *values: tuple(filter(_differentiable, part(*values)))), primals

    def vjp(inputs, outputs, cotangents, wanted):
        part, primals = differentiable(inputs, wanted)
        found = iter(vjp_of(part, *primals)[1](*(c for c in cotangents if c is not None)))
        return tuple(next(found) if w else None for w in wanted)

    def jvp(inputs, outputs, tangents):
        part, primals = differentiable(inputs, tuple(t is not None for t in tangents))
        found = iter(jvp_of(part, primals, tuple(t for t in tangents if t is not None))[1])
        return tuple(next(found) if _differentiable(o) else None for o in outputs)

    return vjp, jvp


def choose(
    fn: Callable[..., Any], inputs: Sequence[Tensor], chosen: Sequence[bool]
) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of the chosen inputs alone, the others held fixed, and those inputs.

    Example:
        >>> part, primals = choose(lambda x, y: x - y, [torch.tensor(3.0), torch.tensor(1.0)], [False, True])
        >>> part(*primals), part(torch.tensor(2.0))
        (tensor(2.), tensor(1.))
    """

    def part(*values):
        values = iter(values)
        return fn(*(next(values) if c else x for x, c in zip(inputs, chosen, strict=True)))

    return part, [x for x, c in zip(inputs, chosen, strict=True) if c]


def _trace(traceable, inputs):
    if traceable is None:
        raise RuntimeError(
            "this operator cannot be compiled: compile the code around it, compile one step of it, use its dense or "
            "fixed-iteration form, or give custom_derivative a `traceable` one"
        )
    return traceable(*inputs)


def _evaluate(primal, inputs):
    outputs = primal(*inputs)
    if not isinstance(outputs, tuple) or not all(isinstance(o, Tensor) for o in outputs):
        raise TypeError(f"primal must return a tuple of tensors; got {type(outputs).__name__}")
    # autograd gives an input returned as it is, or as a view, a history of its own
    same = {id(x) for x in inputs}
    return tuple([o.clone() if o._base is not None or id(o) in same else o for o in outputs])


def _checked_rule(name: str, found: Any, like: Sequence[Tensor], wanted: Sequence[bool]) -> Partial:
    if not isinstance(found, tuple) or len(found) != len(like):
        size = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
        raise TypeError(f"the {name} rule must return a tuple of {len(like)}; got {size}")
    for i, (value, x, w) in enumerate(zip(found, like, wanted, strict=True)):
        if w and (not isinstance(value, Tensor) or value.shape != x.shape):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"entry {i} of the {name} rule's result must have shape {tuple(x.shape)}; got {got}")
    return found


def _differentiable(tensor: Tensor | _Like) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class _CustomDerivative(torch.autograd.Function):
    @classmethod
    def apply(cls, rules: Rules, *inputs: Tensor) -> Tensors:
        if functorch_active():
            return super().apply(rules, *inputs)  # pyright: ignore[reportReturnType]
        # torch's own apply binds a signature at every call, which costs more than the rest of it
        base = super(torch.autograd.Function, cls)
        return base.apply(rules, *map(unwrap_if_dead, inputs))  # pyright: ignore[reportAttributeAccessIssue]

    @staticmethod
    def forward(rules: Rules, *inputs: Tensor) -> Tensors:  # pyright: ignore[reportIncompatibleMethodOverride]
        outputs = _evaluate(rules.primal, inputs)
        if any(is_tracked(o) for o in outputs):
            raise ValueError(
                "the function uses a tensor that carries gradient, a tangent or a batch dimension without taking it "
                "as an input; its gradient would be lost: pass it as an argument"
            )
        return outputs

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rules, *tensors = inputs
        ctx.count = len(tensors)
        ctx.set_materialize_grads(False)
        discrete = [] if all(map(Tensor.is_floating_point, output)) else [o for o in output if not _differentiable(o)]
        if discrete:
            ctx.mark_non_differentiable(*discrete)
        ctx.outputs = ()
        if transforms_active():
            ctx.save_for_forward(*tensors, *output)
        elif ctx.rules.forgets_outputs:
            ctx.outputs = tuple([_Like(o.shape, o.dtype, o.device) for o in output])
        # the output is saved as well, so that rules which use it are differentiated through it
        ctx.save_for_backward(*tensors, *(() if ctx.outputs else output))

    @staticmethod
    def backward(ctx, *cotangents):
        # a pullback can run after its functorch level has died, as when a root's function contains a root
        saved = tuple(map(unwrap_if_dead, ctx.saved_tensors))
        inputs, outputs = saved[: ctx.count], ctx.outputs or saved[ctx.count :]
        wanted = tuple(ctx.needs_input_grad[1:])
        if any(is_legacy_batchedtensor(c) for c in cotangents if c is not None):
            raise RuntimeError(
                "is_grads_batched=True and vectorize=True use an older vmap that cannot map this operator; use "
                "torch.func.jacrev, or torch.func.vmap over the pullback of torch.func.vjp"
            )
        cotangents = _materialized(cotangents, outputs)
        found = _checked_rule("vjp", ctx.rules.vjp(inputs, outputs, cotangents, wanted), inputs, wanted)
        return None, *(f if w else None for f, w in zip(found, wanted, strict=True))

    @staticmethod
    def jvp(ctx, _, *tangents):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = tuple(map(unwrap_if_dead, level_primals(ctx.saved_tensors)))
        inputs, outputs = saved[: ctx.count], saved[ctx.count :]
        tangents = tuple(
            (torch.zeros_like(x) if t is None else t) if _differentiable(x) else None
            for x, t in zip(inputs, tangents, strict=True)
        )
        with enable_forward_ad():
            moving = tuple(map(_differentiable, outputs))
            found = _checked_rule("jvp", ctx.rules.jvp(inputs, outputs, tangents), outputs, moving)
        return tuple(f if _differentiable(o) else None for f, o in zip(found, outputs, strict=True))

    @staticmethod
    def vmap(info, in_dims, rules, *inputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        batched = _batch(rules, in_dims[1:], info.batch_size, info.randomness)
        return _CustomDerivative.apply(batched, *inputs), 0


def _materialized(cotangents: Partial, outputs: Sequence[Tensor | _Like]) -> Partial:
    """The cotangents of outputs: None for integers, and zeros where nothing came."""
    if transforms_active():
        zeros_like = lambda o: torch.zeros(o.shape, dtype=o.dtype, device=o.device)  # noqa: E731
    else:
        # one expanded 0 costs no memory, but cannot carry a tangent
        zero = functools.cache(lambda shape, dtype, device: torch.zeros((), dtype=dtype, device=device).expand(shape))
        zeros_like = lambda o: zero(o.shape, o.dtype, o.device)  # noqa: E731
    pairs = zip(cotangents, outputs, strict=True)
    return tuple([(zeros_like(o) if c is None else c) if _differentiable(o) else None for c, o in pairs])


def _batch(rules: Rules, dims: tuple[int | None, ...], size: int, randomness: str) -> Rules:
    """The rules of the function mapped over a new leading dimension of its outputs."""

    def mapped(fn, in_dims):
        return torch.func.vmap(fn, in_dims=in_dims, randomness=randomness)

    def vjp(inputs, outputs, cotangents, wanted):
        given, restore = _drop_none(cotangents)

        def lane(inputs, outputs, given):
            found = rules.vjp(inputs, outputs, restore(given), wanted)
            return tuple(f for f, w in zip(found, wanted, strict=True) if w)

        found = iter(mapped(lane, (dims, 0, 0))(inputs, outputs, given))
        return tuple(_unmap(next(found), d) if w else None for w, d in zip(wanted, dims, strict=True))

    def jvp(inputs, outputs, tangents):
        given, restore = _drop_none(tangents)
        given_dims = tuple(d for d, t in zip(dims, tangents, strict=True) if t is not None)
        kept = tuple(map(_differentiable, outputs))

        def lane(inputs, outputs, given):
            found = rules.jvp(inputs, outputs, restore(given))
            return tuple(f for f, keep in zip(found, kept, strict=True) if keep)

        found = iter(mapped(lane, (dims, 0, given_dims))(inputs, outputs, given))
        return tuple(next(found) if keep else None for keep in kept)

    if rules.batching == "vmap":
        primal = mapped(rules.primal, dims)
    else:
        fold = _sequential if rules.batching == "sequential" else rules.batching
        primal = fold(rules.primal, dims, size)
    return Rules(primal, vjp, jvp, rules.batching)


def _drop_none(values):
    """The entries that are not None, and a function that puts them back in their places."""
    present = tuple(v is not None for v in values)

    def restore(given):
        given = iter(given)
        return tuple(next(given) if p else None for p in present)

    return tuple(v for v in values if v is not None), restore


def _unmap(cotangent: Tensor, dim: int | None) -> Tensor:
    return cotangent.sum(0) if dim is None else cotangent.movedim(0, dim)


def _sequential(primal, dims, size):
    def run(*inputs):
        if size == 0:
            raise ValueError('batching="sequential" cannot map over an empty batch: no lane tells the output shape')
        lanes = [
            _evaluate(primal, tuple(x if d is None else x.select(d, i) for x, d in zip(inputs, dims, strict=True)))
            for i in range(size)
        ]
        return tuple(map(torch.stack, zip(*lanes, strict=True)))

    return run
