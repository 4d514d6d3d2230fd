r"""Differentiable steps that change a module in place: each new parameter is a function of what the step depends on.

.. math:: \theta_{t+1} = \theta_t + u(\nabla_\theta \ell(\theta_t), s_t, \theta_t)
"""

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from diffopt import tree
from diffopt.autodiff import transforms_active
from diffopt.nn.places import Place, find_places
from diffopt.transforms import GradientTransformation, step
from diffopt.transforms.base import check_optimizer
from diffopt.tree.recomputation import follow
from diffopt.typing import Tree

__all__ = ["MetaOptimizer"]


class MetaOptimizer:
    r"""An optimizer of a module's parameters, through whose steps gradients flow.

    .. math:: \theta_{t+1} = \theta_t + u(\nabla_\theta \ell(\theta_t), s_t, \theta_t)

    After `step` the module holds, in the places of its parameters, tensors that depend on the parameters before, on all
    that the loss depends on, and on hyperparameters that are tensors. A later ``backward()`` reaches them all.
    `extract_state` and `recover_state` go back to where the module was, `stop_gradient` goes on from where it is.

    Parameters that do not require grad stay as they are, and so do buffers. Tied parameters stay tied and take one
    step. This is for eager code: under `torch.func` transforms use `functional` and `diffopt.step`.

    Args:
        params: A module; or a tree of modules and of tensors that require grad, which take their steps together. The
            transformation sees a dict from names to tensors in the place of each module.
        optimizer: Any transformation. To learn a hyperparameter, give it as a tensor.
        first_order: Whether gradients are constants, so that no second derivative is computed.

    Attributes:
        optimizer: The transformation.
        state: Its state, a tree of tensors.
        first_order: As given.
        tensors: The plain tensors among params as they are, a list.

    Raises:
        TypeError: If params holds other things, such as a generator of parameters, or optimizer is no transformation.
        ValueError: If params is empty, or holds a tensor, or a module of parameters, none of which requires grad.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> net, rate = nn.Linear(1, 1, bias=False), torch.tensor(0.1, requires_grad=True)
        >>> start, x = net.weight, torch.ones(1, 1)
        >>> inner = MetaOptimizer(net, sgd(rate))
        >>> for _ in range(2):
        ...     inner.step(net(x).square().sum())
        >>> net(x).sum().backward()
        >>> start.grad  # (1 - 2 * 0.1)**2
        tensor([[0.6400]])
        >>> torch.allclose(rate.grad, -4 * (1 - 2 * 0.1) * start)
        True

    References:
        Grefenstette et al., "Generalized inner loop meta-learning", 2019, algorithm 1.
    """

    def __init__(self, params: Any, optimizer: GradientTransformation, *, first_order: bool = False) -> None:
        check_optimizer(optimizer)
        members, spec = tree.flatten(params)
        if not members:
            raise ValueError("`params` must hold a module or a tensor; got an empty tree.")
        self._modules = [m for m in members if isinstance(m, nn.Module)]
        for module in self._modules:
            follow(module)  # each step gives it other tensors
        self.tensors = [m for m in members if isinstance(m, Tensor)]
        layout = tree.unflatten(spec, _layout(members, [f"params{path}" for path in tree.paths(params)]))
        self._keys, self._spec = tree.flatten(layout)
        self._names = tree.paths(layout)
        self.optimizer, self.first_order = optimizer, first_order
        self.state = optimizer.init(self.params)

    @property
    def params(self) -> Tree:
        """The tensors as they are: the given tree, with a dict from names to tensors for each module."""
        return tree.unflatten(self._spec, [place.tensor for place in self._places()])

    def step(self, loss: Tensor, *, allow_unused: bool = False, **extra: Any) -> None:
        """Take a step down a loss.

        Args:
            loss: A number (0-d tensor), computed by the modules as they are. Its graph is kept.
            allow_unused: Whether tensors that the loss does not depend on get zeros for their gradient, as
                `torch.func.grad` gives.
            **extra: What the transformation asks for, as in `diffopt.step`, such as ``grad_fn``. The loss is its
                ``value``.

        Raises:
            TypeError: If the loss is not a floating-point tensor.
            ValueError: If it is not a number, has no graph, or does not depend on some parameter; if a parameter has
                been frozen.
            RuntimeError: Under a `torch.func` transform, or without grad mode.
        """
        _check_loss(loss)
        places = self._places()
        flat = [place.tensor for place in places]
        grads = self._gradients(loss, flat, allow_unused)
        params = tree.unflatten(self._spec, flat)
        extra = {"value": loss} | extra
        new, self.state = step(self.optimizer, grads, self.state, params, **extra)
        for place, tensor in zip(places, tree.leaves(new), strict=True):
            place.put(tensor)

    def _gradients(self, loss: Tensor, flat: list[Tensor], allow_unused: bool) -> Tree:
        frozen = [name for name, tensor in zip(self._names, flat, strict=True) if not tensor.requires_grad]
        if frozen:
            raise ValueError(
                f"params{', params'.join(frozen)} no longer require grad: freeze parameters before making the "
                "MetaOptimizer, or make a new one."
            )
        found = torch.autograd.grad(loss, flat, create_graph=not self.first_order, retain_graph=True, allow_unused=True)
        unused = [name for name, gradient in zip(self._names, found, strict=True) if gradient is None]
        if unused and not allow_unused:
            raise ValueError(
                f"the loss does not depend on params{', params'.join(unused)}. Compute it by the module as it is after "
                "the step before; freeze what it never uses by requires_grad_(False) before making the MetaOptimizer; "
                "or give allow_unused=True, and those gradients are zeros."
            )
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(flat, found, strict=True)]
        return tree.unflatten(self._spec, grads)

    def _places(self) -> list[Place]:
        found = find_places(*self._modules)
        return [self._place(key, found) for key in self._keys]

    def _place(self, key: "_Key", found: list[dict[str, Place]]) -> Place:
        if key.name is None:
            return Place(self.tensors[key.index], [(self.tensors, key.index)])
        if key.name not in found[key.index]:
            raise ValueError(f"the module has no parameter {key.name!r} any more; make a new MetaOptimizer.")
        return found[key.index][key.name]


@dataclasses.dataclass(frozen=True)
class _Key:
    """Which parameter of which module, or, without a name, which tensor."""

    index: int
    name: str | None = None


def _layout(members: list[Any], labels: list[str]) -> list[Any]:
    """For each tensor its key, for each module a dict from names to keys."""
    modules = [m for m in members if isinstance(m, nn.Module)]
    found, keys, seen = iter(enumerate(find_places(*modules))), [], set()
    tensors = itertools.count()
    for member, label in zip(members, labels, strict=True):
        if isinstance(member, nn.Module):
            index, places = next(found)
            trained = {name: place.tensor for name, place in places.items() if place.tensor.requires_grad}
            keys.append({name: _Key(index, name) for name in trained})
        else:
            _check_tensor(member, label)
            trained = {"": member} if member.requires_grad else {}
            keys.append(_Key(next(tensors)))
        if not trained or seen & {id(t) for t in trained.values()}:
            raise ValueError(f"`{label}` must have something that requires grad and is nowhere else in `params`.")
        seen |= {id(t) for t in trained.values()}
    return keys


def _check_tensor(member: Any, label: str) -> None:
    if not isinstance(member, Tensor):
        raise TypeError(
            f"`{label}` must be a module or a tensor; got {type(member).__name__}. Give the module itself, so that its "
            "parameters can be replaced: MetaOptimizer(net, optimizer)."
        )


def _check_loss(loss: Any) -> None:
    if transforms_active():
        raise RuntimeError(
            "MetaOptimizer is for eager code: under torch.func transforms use diffopt.step and diffopt.nn.functional."
        )
    if not torch.is_grad_enabled():
        raise RuntimeError("MetaOptimizer.step differentiates in grad mode: call it outside of torch.no_grad().")
    if not isinstance(loss, Tensor):
        raise TypeError(f"`loss` must be a tensor; got {type(loss).__name__}.")
    if not loss.is_floating_point():
        raise TypeError(f"`loss` must be a real floating-point number; got {loss.dtype}.")
    if loss.ndim or not loss.requires_grad:
        raise ValueError(
            f"`loss` must be a number with a graph; got shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}."
        )
