r"""The response of one step of the lower level's own optimizer: `SAMA`."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from diffopt import tree
from diffopt.implicit.protocol import Info, Response, unsolved
from diffopt.multilevel.methods.differences import check_radius, pulled_by_difference
from diffopt.typing import Tree

__all__ = ["SAMA"]


@dataclasses.dataclass(frozen=True)
class SAMA:
    r"""The response of one step of the lower level's optimizer, in two more gradients.

    .. math:: u = A^\top \bar x, \quad A = -\,\frac{\partial\,\text{change}(g)}{\partial g}, \qquad
              \bar\theta = -\,\frac{\nabla_\theta \Phi(x + \epsilon u) - \nabla_\theta \Phi(x - \epsilon u)}{2 \epsilon}

    `A` is found by differentiating the level's step in its gradient, so that every optimizer serves, its bias
    correction, weight decay and schedule included, and the level's clipping and projection: for sgd it is the learning
    rate, for Adam its rates adapted to each parameter. No graph of second order of the loss is built. Gradients are
    compared at other values, so a `detach` in the lower loss does not hold here. Biased, as `FiniteDifference` is.
    Where a gradient is 0 and the step has no derivative (Adam's root of 0: a parameter that was never used), `A` is 0.

    Args:
        radius: How far the iterate is moved; None is :math:`\varepsilon^{1/3}` of its dtype times its norm, at least 1.

    Raises:
        ValueError: If the radius is not positive.

    Example:
        >>> SAMA(radius=0.01)
        SAMA(radius=0.01)

    References:
        Choe et al. (2023), Making scalable meta learning practical, section 3.2.
    """

    radius: float | None = None

    retraces: ClassVar[bool] = False
    moves: ClassVar[bool] = True

    def __post_init__(self):
        check_radius(self.radius)

    def begin(self, x: Tree, key: Tensor):
        """Nothing is carried."""
        return ()

    def pull(self, response: Response, cotangent: Tree, state) -> tuple[tuple[Tree, ...], tuple, Info]:
        """See `diffopt.implicit.Adjoint`."""
        slope = response.equation.residual(response.x, *response.args)
        u = response.pull_change(slope, cotangent)
        del cotangent, slope  # they may be as large as all parameters
        parts = pulled_by_difference(response, u, self.radius)
        return tree.map(torch.neg, parts), state, unsolved(response.x)

    def respond(self, response: Response, state) -> Tree:
        """See `diffopt.implicit.Adjoint`; with the exact mixed derivative."""
        change = response.change(response.equation.residual(response.x, *response.args))
        return tree.map(lambda x, c: x + (c - c.detach()), response.x, change)
