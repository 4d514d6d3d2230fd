r"""The mixed second derivative along a direction, from two gradients.

.. math:: \partial_\theta \nabla_x \Phi(x, \theta)^\top u \approx
          \frac{\nabla_\theta \Phi(x + \epsilon u, \theta) - \nabla_\theta \Phi(x - \epsilon u, \theta)}{2 \epsilon},
          \qquad \epsilon = \frac{r}{\|u\|}
"""

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import grad
from diffopt.implicit.protocol import Response
from diffopt.typing import Tree

__all__ = ["check_radius", "pulled_by_difference"]


def check_radius(radius: float | None) -> None:
    """Raise unless a radius is positive or None."""
    if radius is not None and not (isinstance(radius, (int, float)) and radius > 0):
        raise ValueError(f"radius must be a positive number or None; got {radius!r}")


def pulled_by_difference(response: Response, u: Tree, radius: float | None) -> tuple[Tree, ...]:
    r"""The cotangents :math:`-\,\partial_\theta \nabla_x \Phi^\top u`, without a graph of second order.

    Args:
        response: The response.
        u: The direction, a tree like the iterate.
        radius: How far the iterate is moved; None is :math:`\varepsilon^{1/3}` of its dtype times its norm, at least 1.

    Returns:
        A tree for each argument.
    """
    if not response.args:
        return ()
    x, length = response.x, tree.norm(u)
    if radius is None:
        moved = torch.finfo(length.dtype).eps ** (1 / 3) * tree.norm(x).clamp(min=1.0)
    else:
        moved = torch.full_like(length, radius)
    epsilon = torch.where(length > 0, moved / length, 0.0).detach()
    slopes = grad(response.objective, argnums=tuple(range(1, len(response.args) + 1)))
    draws = _generators(x)
    high = slopes(tree.map(lambda x, u: x + epsilon * u, x, u), *response.args)
    _rewind(draws)
    low = slopes(tree.map(lambda x, u: x - epsilon * u, x, u), *response.args)
    divisor = torch.where(epsilon > 0, 2 * epsilon, 1.0)
    return tree.map(lambda low, high: (low - high) / divisor, low, high)


def _generators(x: Tree) -> list[tuple[torch.device, Tensor]]:
    """Where torch's own generators are, from which a loss may draw, as dropout does; none while compiling."""
    if torch.compiler.is_compiling():
        return []
    devices = {leaf.device for leaf in tree.leaves(x) if leaf.is_cuda}
    states = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    return [(torch.device("cpu"), torch.get_rng_state()), *states]


def _rewind(draws: list[tuple[torch.device, Tensor]]) -> None:
    """Let the next loss draw what the one before drew: a difference of two others would be noise."""
    for device, state in draws:
        torch.set_rng_state(state) if device.type == "cpu" else torch.cuda.set_rng_state(state, device)
