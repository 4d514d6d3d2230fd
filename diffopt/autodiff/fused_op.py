"""Make a fused kernel a differentiable operator, so that no kernel needs to know autograd."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt.autodiff.custom_derivative import Rules, Tensors, by_rule, refuse_captures, rules_of

__all__ = ["fused_op"]

Launcher: TypeAlias = Callable[..., Tensors]


def fused_op(reference: Launcher, forward: Launcher, backward: Launcher | None = None) -> Launcher:
    r"""Give a fused launcher the derivatives of its readable reference.

    .. math:: y = f(x), \qquad \bar x = v^\top \partial f(x)

    The forward launcher computes `f`; the backward launcher computes its cotangents. Every further derivative (double
    backward, jvp) is that of the plain formula of the reference. `vmap` folds the batch into the launch.

    Args:
        reference: `(*inputs) -> outputs` in plain torch, elementwise: the inputs broadcast against each other and
            every output is floating-point and has the broadcast shape.
        forward: the same function, fused. It sees plain tensors and returns fresh ones.
        backward: `(*inputs, *cotangents) -> cotangents of the inputs`, each shaped like its input (so one of a scalar
            hyperparameter is a sum); None takes the plain formula. Both launchers must accept a leading batch
            dimension on all arguments at once, hyperparameters then of shape `(batch, 1, ..., 1)`.

    Returns:
        A function of the reference's signature, which is also what it runs as under `torch.compile`.

    Raises:
        ValueError: when called, if a function captured a tensor that carries gradient or a batch dimension.

    Example:
        >>> square = fused_op(lambda x: (x * x,), lambda x: (x.square(),), lambda x, v: (2 * x * v,))
        >>> torch.func.grad(torch.func.grad(lambda x: square(x)[0]))(torch.tensor(3.0))
        tensor(2.)
    """

    reference_vjp, reference_jvp = rules_of(reference)

    @functools.cache
    def backward_op(count: int) -> Launcher:
        """The cotangents of `count` inputs, as an operator of the inputs and the cotangents of the outputs."""

        def plain(*values: Tensor) -> Tensors:
            inputs, cotangents = values[:count], values[count:]
            wanted = tuple(x.is_floating_point() for x in inputs)
            found = reference_vjp(inputs, cotangents, cotangents, wanted)
            return tuple(torch.zeros_like(x) if f is None else f for f, x in zip(found, inputs, strict=True))

        plain_vjp, plain_jvp = rules_of(plain)
        return by_rule(Rules(backward or plain, plain_vjp, plain_jvp, _fold(count) if backward else "vmap"))

    def fused_vjp(inputs, outputs, cotangents, wanted):
        return backward_op(len(inputs))(*inputs, *cotangents)

    op = by_rule(Rules(forward, fused_vjp, reference_jvp, _fold(None)), reference)

    @functools.wraps(reference)
    def fused(*inputs: Tensor) -> Tensors:
        refuse_captures(reference, forward, backward, inputs=inputs)
        return op(*inputs)

    return fused


def _fold(shaped: int | None):
    """The batching rule that puts all lanes into one launch; see `_Folded` for `shaped`."""

    def fold(primal, dims, size):
        launcher, levels = (primal.launcher, primal.levels) if isinstance(primal, _Folded) else (primal, ())
        return _Folded(launcher, ((dims, size), *levels), shaped)

    return fold


class _Folded(NamedTuple):
    """A launcher over the lanes of one or more vmaps, outermost first.

    With `shaped`, the first `shaped` inputs give the shapes of the outputs; without, all outputs have the broadcast
    shape of the inputs.
    """

    launcher: Launcher
    levels: tuple[tuple[tuple[int | None, ...], int], ...]
    shaped: int | None

    def __call__(self, *inputs: Tensor) -> Tensors:
        sizes = tuple(size for _, size in self.levels)
        lanes = [self._lanes_first(x, i) for i, x in enumerate(inputs)]
        shapes = [x.shape[len(sizes) :] for x in lanes]
        rank = max(map(len, shapes))
        rows = [x.reshape(-1, *(1,) * (rank - len(s)), *s) for x, s in zip(lanes, shapes, strict=True)]
        outputs = self.launcher(*rows)
        targets = [torch.broadcast_shapes(*shapes)] * len(outputs) if self.shaped is None else shapes[: self.shaped]
        return tuple(o.reshape(*sizes, *t) for o, t in zip(outputs, targets, strict=True))

    def _lanes_first(self, x: Tensor, place: int) -> Tensor:
        for k, (dims, size) in enumerate(self.levels):
            dim = dims[place]
            x = x.unsqueeze(k).expand(*x.shape[:k], size, *x.shape[k:]) if dim is None else x.movedim(dim + k, k)
        return x
