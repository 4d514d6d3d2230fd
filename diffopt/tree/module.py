"""A torch.nn.Module as a pure function of trees, and back."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from diffopt.tree.recomputation import recomputed_as_seen
from diffopt.tree.structure import leaves

__all__ = ["ModuleFunction", "from_module", "to_module"]


def from_module(module: nn.Module) -> tuple["ModuleFunction", dict[str, Tensor], dict[str, Tensor]]:
    """Turn a module into a pure function of its parameters and buffers.

    The function runs the module itself, in the train or eval mode that it has at the call, with the given
    values in the places of its own, so that also a module which holds functions of its parameters sees them.
    Neither the module nor the arguments are changed. What the module would update in place, such as the
    running statistics of a batch norm in train mode, comes back as new buffers. Batch norm under
    `torch.func.vmap` may start from shared buffers: each lane returns its own. Dropout draws from torch's
    global generator, as ever (give `vmap` its ``randomness``).

    Args:
        module: Any module.

    Returns:
        ``function(params, buffers, *args, **kwargs) -> (output, new_buffers)``, then the parameters and the
        buffers: dicts from name to tensor. As is usual with `torch.func`, the tensors are detached (they do
        not require grad) and share the module's memory. A parameter used under several names is one entry.

    Raises:
        TypeError: If `module` is no module.
        ValueError: By the function, if names are missing or unexpected.

    Example:
        >>> function, params, buffers = from_module(nn.BatchNorm1d(2))
        >>> output, new_buffers = function(params, buffers, torch.ones(4, 2))
        >>> buffers["running_mean"], new_buffers["running_mean"]
        (tensor([0., 0.]), tensor([0.1000, 0.1000]))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a torch.nn.Module; got {type(module).__name__}.")
    params = {name: value.detach() for name, value in module.named_parameters()}
    buffers = {name: value.detach() for name, value in module.named_buffers()}
    return ModuleFunction(module), params, buffers


class ModuleFunction:
    """A module as a function of its parameters and buffers; its own are never used.

    Args:
        module: Any module.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self._param_names = {name for name, _ in module.named_parameters()}
        self._buffer_names = {name for name, _ in module.named_buffers()}
        self._name_of = _name_of_place(module)

    def __call__(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """The output and the new buffers."""
        _check_names(params, self._param_names, "params")
        _check_names(buffers, self._buffer_names, "buffers")
        state = {**params, **_fresh(buffers, _tracked(self.module), (dict(params), args, list(kwargs.values())))}
        state = {place: state[name] for place, name in self._name_of.items()}
        # with tie_weights, torch leaves a submodule that stands in two places with the values given
        with recomputed_as_seen(self.module):
            output = functional_call(self.module, state, args, kwargs, tie_weights=False)
        # functional_call writes reassigned buffers back into the dict that it was given
        return output, {name: state[name] for name in buffers}


def to_module(
    module: nn.Module, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Make a new module with the architecture of one module and the given values.

    Args:
        module: Gives the architecture, the mode, and which parameters require grad. It is not changed.
        params: Values by name, as from `from_module`; shapes must match, dtypes and devices may differ.
        buffers: Values by name. Default: the module's own.

    Returns:
        A new module, which shares no memory with the values or with the module.

    Raises:
        ValueError: If names are missing or unexpected, or if a shape differs.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> _, params, buffers = from_module(module)
        >>> new = to_module(module, {**params, "bias": torch.ones(1)}, buffers)
        >>> new.bias
        Parameter containing:
        tensor([1.], requires_grad=True)
    """
    own_params, own_buffers = dict(module.named_parameters()), dict(module.named_buffers())
    buffers = own_buffers if buffers is None else buffers
    _check_names(params, set(own_params), "params")
    _check_names(buffers, set(own_buffers), "buffers")
    values: dict[int, Tensor] = {}
    for label, new, own in (("params", params, own_params), ("buffers", buffers, own_buffers)):
        for name, value in new.items():
            if value.shape != own[name].shape:
                want, got = tuple(own[name].shape), tuple(value.shape)
                raise ValueError(f"`{label}[{name!r}]` must have shape {want}; got {got}.")
            values[id(own[name])] = value
    return _rebuild(module, lambda own: values[id(own)].detach().clone())


def _rebuild(module: nn.Module, value_of: Callable[[Tensor], Tensor]) -> nn.Module:
    # Tensors already in the memo are not copied, and tied ones stay tied.
    memo: dict[int, Any] = {}
    for param in module.parameters():
        memo[id(param)] = nn.Parameter(value_of(param), requires_grad=param.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = value_of(buffer)
    return copy.deepcopy(module, memo)


def _name_of_place(module: nn.Module) -> dict[str, str]:
    """The name of the tensor in each place; a tensor in several has the name of the first, as everywhere in torch."""
    names: dict[Tensor, str] = {}
    places: dict[str, str] = {}
    for prefix, child in module.named_modules():
        for name, value in (*child._parameters.items(), *child._buffers.items()):
            if value is not None:
                place = f"{prefix}.{name}" if prefix else name
                places[place] = names.setdefault(value, place)
    return places


def _tracked(module: nn.Module) -> frozenset[str]:
    """Name the buffers that hold running statistics updated by a call in train mode."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        if child.training and getattr(child, "track_running_stats", False)
        for name, _ in child.named_buffers(recurse=False)
    )


def _fresh(buffers: Mapping[str, Tensor], tracked: frozenset[str], context: Any) -> dict[str, Tensor]:
    """Copy the buffers, with running statistics batched at every vmap level of the context."""
    if not tracked:
        return {name: value.clone() for name, value in buffers.items()}
    false = torch.zeros((), dtype=torch.bool)
    for leaf in leaves(context):
        if isinstance(leaf, Tensor):
            # A new tensor made from a batched one is batched; an in-place update of an unbatched one raises.
            false = false | leaf.new_zeros((), dtype=torch.bool, device="cpu")
    return {
        name: torch.where(false.to(value.device), value, value) if name in tracked else value.clone()
        for name, value in buffers.items()
    }


def _check_names(values: Mapping[str, Tensor], expected: set[str], label: str) -> None:
    if not isinstance(values, Mapping):
        raise TypeError(
            f"`{label}` must be a dict from name to tensor, as `from_module` gives it; got {type(values).__name__}. "
            f"The function is called as function(params, buffers, *args)."
        )
    if values.keys() != expected:
        missing, extra = sorted(expected - values.keys()), sorted(values.keys() - expected)
        raise ValueError(f"`{label}` must name what the module names: missing {missing}, unexpected {extra}.")
