"""What modules and meta-optimizers hold, to go back to, and how to cut it off from the graph."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from diffopt import tree
from diffopt.nn.meta_optimizer import MetaOptimizer
from diffopt.nn.places import find_places, leaf_of

__all__ = ["ModuleState", "OptimizerState", "extract_state", "recover_state", "stop_gradient"]

By = Literal["reference", "copy", "deepcopy"]


class ModuleState(NamedTuple):
    """What `extract_state` takes out of a module.

    Attributes:
        params: From names to tensors, tied ones once.
        buffers: From names to tensors.
    """

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]


class OptimizerState(NamedTuple):
    """What `extract_state` takes out of a `MetaOptimizer`.

    Attributes:
        state: The transformation's state.
        tensors: The plain tensors that it steps; parameters of modules are the modules' own state.
    """

    state: Any
    tensors: tuple[Tensor, ...]


@overload
def extract_state(obj: nn.Module, by: By = ...) -> ModuleState: ...
@overload
def extract_state(obj: MetaOptimizer, by: By = ...) -> OptimizerState: ...
def extract_state(obj: Any, by: By = "reference") -> Any:
    """Take out the state of a module or of a `MetaOptimizer`, to go back to with `recover_state`.

    Steps of a `MetaOptimizer` and solves of an `ImplicitModule` make new tensors, so "reference" goes back over them
    at no cost. Optimizers of torch write into tensors, and into those in a "reference" state too.

    Args:
        obj: The module or the meta-optimizer.
        by: "reference" keeps the very tensors: going back restores the parameters that an outer optimizer holds.
            "copy" copies memory but stays in the graph: gradients flow back to the tensors copied. "deepcopy" is
            outside of the graph. Buffers, which modules write into, are always copied.

    Returns:
        A `ModuleState` or an `OptimizerState`: trees of tensors, with nothing else.

    Raises:
        TypeError: If obj is something else.
        ValueError: If by is not one of the three.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> start = extract_state(net)
        >>> start.params["bias"] is net.bias
        True
    """
    _check_by(by)
    if isinstance(obj, MetaOptimizer):
        tensors = [_take_param(t, by) for t in obj.tensors]
        return OptimizerState(tree.map(lambda t: _take_constant(t, by), obj.state), tuple(tensors))
    if not isinstance(obj, nn.Module):
        raise TypeError(f"`extract_state` takes a module or a MetaOptimizer; got {type(obj).__name__}.")
    params = {name: _take_param(value, by) for name, value in obj.named_parameters()}
    return ModuleState(params, {name: _take_buffer(value, by) for name, value in obj.named_buffers()})


def recover_state(obj: nn.Module | MetaOptimizer, state: Any, by: By = "reference") -> None:
    """Put a state back into the module or the `MetaOptimizer` that it was taken from, or into one like it.

    Args:
        obj: The module or the meta-optimizer.
        state: From `extract_state`; it can be recovered any number of times.
        by: What is put in place, as in `extract_state`: the state's own tensors by "reference". With "deepcopy",
            training in place leaves the state as it is.

    Raises:
        TypeError: If the state is of another kind of object, or dtypes differ.
        ValueError: If names, shapes or structures differ, or by is not one of the three.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> start, bias = extract_state(net), net.bias
        >>> net.bias = nn.Parameter(torch.ones(1))
        >>> recover_state(net, start)
        >>> net.bias is bias
        True
    """
    _check_by(by)
    if isinstance(obj, MetaOptimizer) and isinstance(state, OptimizerState):
        tree.check_like(state, OptimizerState(obj.state, tuple(obj.tensors)), name="state", reference_name="own state")
        obj.state = tree.map(lambda t: _take_constant(t, by), state.state)
        obj.tensors[:] = [_take_param(t, by) for t in state.tensors]
    elif isinstance(obj, nn.Module) and isinstance(state, ModuleState):
        _recover_module(obj, state, by)
    else:
        got, given = type(obj).__name__, type(state).__name__
        raise TypeError(
            f"`recover_state` got a {got} and a {given}; give what `extract_state` took from the same kind."
        )


def stop_gradient(obj: Any) -> Any:
    """Go on from the values of now, cut off from the graph that led to them.

    What carries no graph (parameters, constants) stays the same tensor. What does is replaced, in the module or the
    meta-optimizer, by a leaf of the same value in the same memory: by a parameter in a module, by a constant in the
    state of an optimizer.

    Args:
        obj: A module or a `MetaOptimizer`, which is changed; or a tree of tensors, which is not.

    Returns:
        The module, the meta-optimizer, or a new tree, whose tensors require grad where they did.

    Raises:
        TypeError: If a tree has leaves that are not tensors.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> net = nn.Linear(1, 1)
        >>> MetaOptimizer(net, sgd(0.1)).step(net(torch.ones(1)).sum())
        >>> net.bias.is_leaf, stop_gradient(net).bias.is_leaf
        (False, True)
    """
    if isinstance(obj, MetaOptimizer):
        obj.state = tree.map(lambda t: t if t.is_leaf else t.detach(), obj.state)
        obj.tensors[:] = stop_gradient(obj.tensors)
        return obj
    if isinstance(obj, nn.Module):
        for place in find_places(obj)[0].values():
            if not place.tensor.is_leaf:
                place.put(leaf_of(place.tensor))
        _replace_buffers(obj, {id(b): b.detach() for b in obj.buffers() if not b.is_leaf})
        return obj
    tree.check_tensors(obj)
    return tree.map(lambda t: t if t.is_leaf else t.detach().requires_grad_(), obj)


def _recover_module(module: nn.Module, state: ModuleState, by: By) -> None:
    places, buffers = find_places(module)[0], dict(module.named_buffers())
    own = ModuleState({name: place.tensor for name, place in places.items()}, buffers)
    tree.check_like(state, own, name="state", reference_name="own state")
    for name, place in places.items():
        place.put(_take_param(state.params[name], by))
    _replace_buffers(module, {id(buffers[name]): _take_buffer(value, by) for name, value in state.buffers.items()})


def _check_by(by: Any) -> None:
    """Raise unless it is a way to take tensors."""
    if by not in ("reference", "copy", "deepcopy"):
        raise ValueError(f'`by` must be "reference", "copy" or "deepcopy"; got {by!r}.')


def _take_param(tensor: Tensor, by: By) -> Tensor:
    if by == "reference":
        return tensor
    if by == "copy" and tensor.requires_grad:
        with torch.enable_grad():
            return tensor.clone()
    return leaf_of(tensor.detach().clone(), tensor.requires_grad)


def _take_constant(tensor: Tensor, by: By) -> Tensor:
    return tensor if by == "reference" else _take_buffer(tensor, by)


def _take_buffer(tensor: Tensor, by: By) -> Tensor:
    with torch.enable_grad():
        return tensor.detach().clone() if by == "deepcopy" else tensor.clone()


def _replace_buffers(module: nn.Module, values: dict[int, Tensor]) -> None:
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False, remove_duplicate=False)):
            if id(buffer) in values:
                setattr(owner, name, values[id(buffer)])
