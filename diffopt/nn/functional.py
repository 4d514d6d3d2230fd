"""A module as a function, with the module's own tensors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from diffopt.tree import from_module

__all__ = ["functional"]


def functional(
    module: nn.Module,
) -> tuple[Callable[..., tuple[Any, dict[str, Tensor]]], dict[str, Tensor], dict[str, Tensor]]:
    """Turn a module as it is now into a pure function, with its own tensors and their graph.

    `from_module` gives the same function with detached tensors, to begin with. This one carries on: what is computed
    from these parameters, under any transform, has its gradient flow into the module's parameters by ``backward()``,
    and through the steps of a `MetaOptimizer`.

    Args:
        module: Any module.

    Returns:
        ``function(params, buffers, *args, **kwargs) -> (output, new_buffers)``, as from `from_module`, then the
        parameters and the buffers. What the module would write into its buffers is in ``new_buffers``, and nowhere
        else.

    Raises:
        TypeError: If module is no module.
        ValueError: By the function, if names are missing or unexpected.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> function, params, buffers = functional(net)
        >>> output, _ = torch.func.vmap(lambda x: function(params, buffers, x))(torch.ones(3, 2))
        >>> output.sum().backward()
        >>> net.weight.grad
        tensor([[3., 3.]])
    """
    function, _, _ = from_module(module)
    return function, dict(module.named_parameters()), dict(module.named_buffers())
