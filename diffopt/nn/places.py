"""Where modules keep their parameters, and other tensors put there.

A module's own dict of parameters takes tensors that are results of computations, which `setattr` refuses;
`torch.func.functional_call` uses it in the same way.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

__all__ = ["Place", "find_places", "find_tracked", "leaf_of"]


@dataclasses.dataclass
class Place:
    """A tensor, and every container and key under which it is kept: a tied parameter has several.

    Attributes:
        tensor: What is there.
        spots: Pairs of a container and a key.
    """

    tensor: Tensor
    spots: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)

    def put(self, tensor: Tensor) -> None:
        """Put another tensor everywhere."""
        self.tensor = tensor
        for container, key in self.spots:
            container[key] = tensor


def find_places(*modules: nn.Module) -> list[dict[str, Place]]:
    """Find the parameters of modules by name, each once.

    Attributes that are the same tensor, and lists and dicts of such, are found too.

    Args:
        *modules: The modules. A parameter of several belongs to the first.

    Returns:
        For each module its places, by the names that `named_parameters` gives them.

    Example:
        >>> (places,) = find_places(nn.Linear(2, 1))
        >>> places.keys(), places["bias"].tensor.shape
        (dict_keys(['weight', 'bias']), torch.Size([1]))
    """
    known: dict[int, Place] = {}
    found: list[dict[str, Place]] = []
    for module in modules:
        fresh = {name: Place(value) for name, value in module.named_parameters() if id(value) not in known}
        known.update({id(place.tensor): place for place in fresh.values()})
        found.append(fresh)
    for container, key, value in _entries(m for module in modules for m in module.modules()):
        if id(value) in known:
            known[id(value)].spots.append((container, key))
    return found


def find_tracked(modules: Iterable[nn.Module], known: Iterable[Tensor]) -> list[Place]:
    """Find all tensors that require grad, in any attribute of modules, but for those that are known.

    Args:
        modules: Modules with all their submodules.
        known: Tensors to leave out.

    Returns:
        Their places, each tensor once.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> [place.tensor is net.bias for place in find_tracked(net.modules(), [net.weight])]
        [True]
    """
    places: dict[int, Place] = {}
    left_out = {id(tensor) for tensor in known}
    for container, key, value in _entries(modules):
        if value.requires_grad and id(value) not in left_out:
            places.setdefault(id(value), Place(value)).spots.append((container, key))
    return list(places.values())


def leaf_of(tensor: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
    """A parameter of the same value, in the same memory, outside of the graph."""
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad if requires_grad is None else requires_grad)


def _entries(modules: Iterable[nn.Module]) -> list[tuple[Any, Any, Tensor]]:
    """Containers, keys and tensors: what modules hold in attributes, and in lists and dicts there."""
    found: list[tuple[Any, Any, Any]] = []
    for module in {id(m): m for m in modules}.values():
        for name, value in vars(module).items():
            # `_parameters` is one of the dicts; no public way puts a tensor there that is not a leaf.
            if type(value) is dict:
                found += [(value, key, member) for key, member in value.items()]
            elif type(value) is list:
                found += [(value, i, member) for i, member in enumerate(value)]
            else:
                found.append((vars(module), name, value))
    return [entry for entry in found if isinstance(entry[2], Tensor)]
