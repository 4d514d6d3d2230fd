"""Where modules keep their parameters, and other tensors put there.

A module's own dict of parameters takes tensors that are results of computations, which `setattr` refuses;
`torch.func.functional_call` uses it in the same way.
"""

import dataclasses
from typing import Any

from torch import Tensor, nn

__all__ = ["Place", "find_places", "leaf_of"]


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

    Attributes that are the same tensor, and lists of such, are found too.

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
    for owner in {id(m): m for module in modules for m in module.modules()}.values():
        for container, key, value in _entries(owner):
            if id(value) in known:
                known[id(value)].spots.append((container, key))
    return found


def leaf_of(tensor: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
    """A parameter of the same value, in the same memory, outside of the graph."""
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad if requires_grad is None else requires_grad)


def _entries(module: nn.Module) -> list[tuple[Any, Any, Any]]:
    attributes = vars(module)
    # `_parameters` is torch's: no public way puts a tensor there that is not a leaf.
    found = [(attributes["_parameters"], key, value) for key, value in attributes["_parameters"].items()]
    for key, value in attributes.items():
        if isinstance(value, Tensor):
            found.append((attributes, key, value))
        elif type(value) is list:
            found += [(value, i, item) for i, item in enumerate(value)]
    return found
