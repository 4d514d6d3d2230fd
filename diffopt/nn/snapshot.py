"""Modules as they were at one time, made anew from other tensors."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["Snapshot"]


class Snapshot:
    """The attributes of modules, to make the modules again with other tensors in the places of some.

    Modes, numbers and buffers are those of the time of the snapshot, which has no reference to the modules. Attributes
    other than modules, tensors, and lists and dicts of them are shared.

    Args:
        modules: Modules with all their submodules. The first is the one that `make` returns.
        tensors: Those of their tensors that are given to `make`.

    Example:
        >>> import torch
        >>> net = nn.Linear(1, 1)
        >>> snapshot = Snapshot(net.modules(), [net.weight, net.bias])
        >>> snapshot.make([torch.tensor([[2.0]]), torch.tensor([1.0])])(torch.tensor([3.0]))
        tensor([7.])
    """

    __slots__ = ("buffers", "frames")

    def __init__(self, modules: Iterable[nn.Module], tensors: Sequence[Tensor]) -> None:
        own = list({id(module): module for module in modules}.values())
        given = {id(tensor) for tensor in tensors}
        buffers = list({id(b): b for module in own for b in module.buffers() if id(b) not in given}.values())
        holes = {id(part): _Hole(i) for i, part in enumerate([*own, *tensors, *buffers])}
        self.buffers = [buffer.detach().clone() for buffer in buffers]
        self.frames = [
            (type(module), {name: _mapped(value, lambda part: holes.get(id(part), part)) for name, value in state})
            for module, state in ((module, vars(module).items()) for module in own)
        ]

    def make(self, values: Sequence[Tensor]) -> Any:
        """A module as the first one was, with these values for the tensors, and copies of the buffers."""
        made = [object.__new__(kind) for kind, _ in self.frames]
        parts = [*made, *values, *(buffer.clone() for buffer in self.buffers)]
        for module, (_, frame) in zip(made, self.frames, strict=True):
            for name, value in frame.items():
                vars(module)[name] = _mapped(value, lambda part: parts[part.i] if type(part) is _Hole else part)
        return made[0]


class _Hole:
    """The place of a module or a tensor that is given later."""

    __slots__ = ("i",)

    def __init__(self, i: int) -> None:
        self.i = i


def _mapped(value: Any, fn: Callable[[Any], Any]) -> Any:
    if type(value) is dict:
        return {name: fn(member) for name, member in value.items()}
    return [fn(member) for member in value] if type(value) is list else fn(value)
