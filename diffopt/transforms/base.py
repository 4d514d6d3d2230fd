r"""The grammar: a gradient transformation is a pair of pure functions, and updates are added to parameters.

.. math:: (u_t, s_{t+1}) = \text{update}(g_t, s_t, \theta_t), \qquad \theta_{t+1} = \theta_t + u_t
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from diffopt import tree
from diffopt.transforms.donation import check_donation
from diffopt.transforms.leaves import flatten_floating, flatten_like
from diffopt.typing import Tree

__all__ = ["EmptyState", "GradientTransformation", "apply_updates", "check_optimizer", "identity", "step"]


class GradientTransformation(NamedTuple):
    """A rule that turns gradients into updates, as pure functions of an explicit state.

    Attributes:
        init: ``init(params) -> state``. States are (nested) named tuples of tensors.
        update: ``update(updates, state, params=None, **extra) -> (updates, state)``. It mutates nothing.
        step: ``step(grads, state, params, *, donate=False, **extra) -> (params, state)``, where one pass can do better
            than `update` followed by `apply_updates`, with the same result; else None. Call it through `step`.

    Example:
        >>> import torch
        >>> def update(updates, state, params=None, **extra):
        ...     return tree.map(torch.sign, updates), state
        >>> sign = GradientTransformation(init=lambda params: EmptyState(), update=update)
        >>> sign.update(torch.tensor([-3.0, 2.0]), sign.init(torch.zeros(2)))
        (tensor([-1.,  1.]), EmptyState())

    References:
        DeepMind, "The DeepMind JAX Ecosystem", 2020 (optax), whose grammar and names these are.
    """

    init: Callable[[Tree], Any]
    update: Callable[..., tuple[Tree, Any]]
    step: Callable[..., tuple[Tree, Any]] | None = None


def check_optimizer(optimizer: GradientTransformation, name: str = "optimizer") -> None:
    """Raise unless a value is an optimizer.

    Args:
        optimizer: The value.
        name: What error messages call it.

    Raises:
        TypeError: If it is anything but a `GradientTransformation`.

    Example:
        >>> check_optimizer(0.1)
        Traceback (most recent call last):
        ...
        TypeError: `optimizer` must be a GradientTransformation, such as diffopt.adam(0.01); got float.
    """
    if not isinstance(optimizer, GradientTransformation):
        hint = "; call the factory, as in adam(0.01)" if callable(optimizer) else ""
        raise TypeError(
            f"`{name}` must be a GradientTransformation, such as diffopt.adam(0.01); got "
            f"{type(optimizer).__name__}{hint}."
        )


class EmptyState(NamedTuple):
    """The state of a transformation that remembers nothing."""


def identity() -> GradientTransformation:
    r"""Pass the updates through: :math:`u_t = g_t`.

    Returns:
        A stateless transformation.

    Example:
        >>> import torch
        >>> identity().update(torch.ones(2), EmptyState())
        (tensor([1., 1.]), EmptyState())
    """

    def init(params: Tree) -> EmptyState:
        return EmptyState()

    def update(updates: Tree, state: EmptyState, params: Tree | None = None, **extra: Any) -> tuple[Tree, EmptyState]:
        return updates, state

    return GradientTransformation(init, update)


def apply_updates(params: Tree, updates: Tree) -> Tree:
    r"""Add the updates to the parameters: :math:`\theta_{t+1} = \theta_t + u_t`.

    Args:
        params: A tree of floating-point tensors.
        updates: A tree of the same structure and shapes; dtypes may differ.

    Returns:
        New parameters, in the dtypes of params. The sum is taken in the wider dtype of the two.

    Raises:
        ValueError: If structures or shapes differ; the message names the path.
        TypeError: If a leaf is not a floating-point tensor.

    Example:
        >>> import torch
        >>> apply_updates({"w": torch.ones(2)}, {"w": torch.full((2,), -0.5)})
        {'w': tensor([0.5000, 0.5000])}
    """
    leaves, treespec = flatten_floating(params, "params")
    changes = flatten_like(updates, leaves, treespec, name="updates", reference_name="params")
    return tree.unflatten(treespec, [(p + u).to(p.dtype) for p, u in zip(leaves, changes, strict=True)])


def step(
    optimizer: GradientTransformation, grads: Tree, state: Any, params: Tree, *, donate: bool = False, **extra: Any
) -> tuple[Tree, Any]:
    r"""Take one step: `update`, then `apply_updates`, or the transformation's own `step` where it has one.

    .. math:: (u, s_{t+1}) = \text{update}(g, s_t, \theta_t), \qquad \theta_{t+1} = \theta_t + u

    Args:
        optimizer: The transformation.
        grads: Gradients, a tree like params.
        state: The state, from ``optimizer.init(params)`` or the step before.
        params: The parameters.
        donate: Whether the memory of params and state may be written over, as in JAX: use only what comes back.
            Optimizers with a fused step (`adam`, `adamw`, `sgd`, `rmsprop`, `lion`) then step in place; a graph that
            saved one of the tensors raises in its backward pass.
        **extra: What members of the transformation ask for, such as ``value``.

    Returns:
        The new parameters and the new state. Without donate, the arguments are unchanged.

    Raises:
        ValueError: If structures or shapes differ; the message names the path. With donate, also if tensors share
            memory (tied leaves, views of one tensor, expanded ones).
        TypeError: If a leaf is not a floating-point tensor.
        RuntimeError: With donate, under a live transform, or if a tensor requires grad in grad mode.

    Example:
        >>> import torch
        >>> from diffopt.optimizers import sgd
        >>> optimizer, params = sgd(0.1), torch.tensor([1.0, 2.0])
        >>> params, state = step(optimizer, 2 * params, optimizer.init(params), params)
        >>> params
        tensor([0.8000, 1.6000])
    """
    if optimizer.step is not None:
        return optimizer.step(grads, state, params, **({"donate": True} if donate else {}), **extra)
    if donate and not torch.compiler.is_compiling():
        check_donation(tree.leaves(params), [*tree.leaves(state), *tree.leaves(grads)])
    updates, state = optimizer.update(grads, state, params, **extra)
    return apply_updates(params, updates), state
