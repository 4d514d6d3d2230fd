r"""`adapt`: the inner loop of meta-learning, a few steps of an optimizer on one task, differentiable in all it uses.

.. math:: (\phi_{t+1}, s_{t+1}) = \text{step}(\nabla L(\phi_t, D),\, s_t,\, \phi_t), \qquad \phi_0 = \theta
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor

from diffopt import random, tree
from diffopt.autodiff import unroll, value_and_grad
from diffopt.meta.normalization import sound_norms
from diffopt.schedules.hyperparameters import check_count
from diffopt.transforms import GradientTransformation, MaskedNode, step
from diffopt.transforms.base import check_optimizer
from diffopt.transforms.leaves import check_scalar, flatten_floating
from diffopt.transforms.masks import mask_leaves
from diffopt.typing import Tree

__all__ = ["Adapted", "Checkpoint", "Mask", "adapt", "check_inner", "check_loss", "evaluate"]

Mask = Tree | Callable[[Tree], Tree] | None
Checkpoint = Literal["sqrt", "log"] | int | None


class Adapted(NamedTuple):
    """What `adapt` returns.

    Attributes:
        params: The parameters after the last step.
        state: The optimizer's state then; of the leaves that adapt, where there is a mask.
        buffers: The buffers then; `()` where there are none.
        losses: The loss before each step, shape `(steps,)`.
    """

    params: Tree
    state: Any
    buffers: Tree
    losses: Tensor


def adapt(
    loss: Callable[..., Any],
    params: Tree,
    data: Tree,
    optimizer: GradientTransformation,
    steps: int,
    *,
    mask: Mask = None,
    buffers: Tree = None,
    key: Tensor | None = None,
    state: Any = None,
    first_order: bool = False,
    checkpoint: Checkpoint = None,
    truncate: int | None = None,
) -> Adapted:
    r"""Take some steps of an optimizer on the loss of one task.

    .. math:: (\phi_{t+1}, s_{t+1}) = \text{step}(\nabla L(\phi_t, D),\, s_t,\, \phi_t), \qquad \phi_0 = \theta

    The result is differentiable in the parameters, the data, what `loss` captures, and the optimizer's hyperparameters.

    Args:
        loss: `loss(params, data)`, a scalar. With `buffers`, `loss(params, buffers, data)` returns
            `(scalar, new_buffers)`; with `key`, it also takes a keyword `key`, another at each step, from which to draw
            dropout masks or a minibatch.
        params: The start :math:`\theta`, a tree of floating-point tensors.
        data: What all steps train on, a tree.
        optimizer: The inner optimizer, any of `diffopt.optimizers`; tensors in it carry gradient.
        steps: How many steps, at least 0.
        mask: Which leaves adapt: a tree of bools, a prefix of one, or a function of the parameters; by default all.
            The others are not differentiated in the inner steps.
        buffers: What `loss` hands on from step to step, such as the running statistics of `tree.from_module`.
        key: A key, from `diffopt.random`.
        state: The optimizer's state to go on from; by default its first.
        first_order: Whether the gradients of the inner steps are constants to the outer derivative.
        checkpoint: As in `unroll`: None, "sqrt", "log" or an int, to store fewer steps and compute them again.
        truncate: As in `unroll`: k cuts all gradient of what came before the last k steps, that of `params` included.

    Returns:
        The parameters, state, buffers and losses.

    Raises:
        TypeError: If a parameter is no floating-point tensor, or `loss` returns no scalar.
        ValueError: If `steps` is negative, the mask holds nowhere, or the state is of another optimizer or mask.

    Example:
        >>> import torch
        >>> from diffopt import sgd
        >>> loss = lambda w, target: ((w - target) ** 2).sum()
        >>> adapt(loss, torch.ones(2), torch.tensor([2.0, 3.0]), sgd(0.25), 2).params
        tensor([1.7500, 2.5000])
        >>> torch.func.grad(lambda r: adapt(loss, torch.tensor(0.0), torch.tensor(1.0), sgd(r), 2).params)(
        ...     torch.tensor(0.25)
        ... )
        tensor(2.)

    References:
        Finn, Abbeel and Levine (2017), Model-agnostic meta-learning, eq. 1.
    """
    check_inner(loss, optimizer, steps)
    leaves, treespec = flatten_floating(params, "params")
    chosen = _chosen(mask, params, len(leaves))

    def merge(part: Tree) -> Tree:
        if chosen is None:
            return part
        moving = iter(tree.leaves(part))
        return tree.unflatten(treespec, [next(moving) if c else p for c, p in zip(chosen, leaves, strict=True)])

    def inner(part: Tree, buffers: Tree, key: Tensor | None) -> tuple[Tensor, Tree]:
        return evaluate(loss, merge(part), buffers, data, key, stateful=stateful)

    stateful = buffers is not None
    part = params if chosen is None else _masked(leaves, treespec, chosen)
    first = optimizer.init(part)
    if state is None:
        state = first
    else:
        tree.check_like(state, first, name="state", reference_name="optimizer.init(params)")
    one = _step_of(inner, optimizer, first_order)
    keys = None if key is None else random.split(key, steps)
    (part, state, buffers), losses = unroll(
        one, (part, state, buffers if stateful else ()), keys,
        length=steps, checkpoint=checkpoint, truncate=truncate,
    )  # fmt: skip
    return Adapted(merge(part), state, buffers, leaves[0].new_empty((0,)) if losses is None else losses)


def _step_of(inner: Callable[..., tuple[Tensor, Tree]], optimizer: GradientTransformation, first_order: bool):
    """One inner step, `(params, state, buffers), key -> ..., loss`."""

    def slope(part, buffers, key):
        if not first_order:
            return value_and_grad(inner, has_aux=True)(part, buffers, key)
        return _detached(value_and_grad(inner, has_aux=True)(_detached(part), buffers, key))

    def one(carry, key):
        part, state, buffers = carry
        (value, new_buffers), grads = slope(part, buffers, key)
        extra = {"value": value, "grad_fn": lambda p: slope(p, buffers, key)[1]}
        part, state = step(optimizer, grads, state, part, **extra)
        return (part, state, new_buffers), value

    return one


def evaluate(
    loss: Callable[..., Any], params: Tree, buffers: Tree, data: Tree, key: Tensor | None, *, stateful: bool
) -> tuple[Tensor, Tree]:
    """Call a loss in the one of its forms that was asked for: `(value, new_buffers)`."""
    options = {} if key is None else {"key": key}
    with sound_norms(stateful):
        out = loss(params, buffers, data, **options) if stateful else loss(params, data, **options)
    if not stateful:
        return _scalar(out), ()
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(f"with buffers, `loss` must return (scalar, new_buffers); got {type(out).__name__}.")
    return _scalar(out[0]), out[1]


def check_inner(loss: Any, optimizer: Any, steps: Any) -> None:
    """Check what every method is given for its inner loop."""
    check_loss(loss)
    check_optimizer(optimizer)
    check_count("steps", steps, at_least=0)


def check_loss(loss: Any, name: str = "loss") -> None:
    """Check that a loss is a function."""
    if not callable(loss):
        raise TypeError(f"`{name}` must be a function of (params, data); got {type(loss).__name__}.")


def _scalar(value: Any) -> Tensor:
    if isinstance(value, tuple):
        raise TypeError("`loss` must return a scalar; got a tuple. One that returns (scalar, buffers) needs `buffers`.")
    return check_scalar(value, "`loss`")


def _chosen(mask: Mask, params: Tree, count: int) -> list[bool] | None:
    """Which leaves adapt; None if all do."""
    if not count:
        raise ValueError("`params` must have at least one leaf; got an empty tree.")
    chosen = mask_leaves(mask, params)
    if not any(chosen):
        raise ValueError("`mask` must hold for at least one parameter; it holds for none, and nothing would adapt.")
    return None if all(chosen) else chosen


def _masked(leaves, treespec, chosen) -> Tree:
    return tree.unflatten(treespec, [p if c else MaskedNode() for p, c in zip(leaves, chosen, strict=True)])


def _detached(values: Any) -> Any:
    tensors, merge = tree.partition(values)
    return merge([t.detach() for t in tensors])
