r"""An identity for the inverse Hessian, and a difference of gradients for the mixed derivative: `FiniteDifference`."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from diffopt import tree
from diffopt.implicit.adjoints import OneStep
from diffopt.implicit.protocol import Info, Response, unsolved
from diffopt.multilevel.methods.differences import check_radius, pulled_by_difference
from diffopt.typing import Tree

__all__ = ["FiniteDifference"]


@dataclasses.dataclass(frozen=True)
class FiniteDifference:
    r"""The response of one step of gradient descent at the iterate, in two more gradients.

    .. math:: u = \eta\,\bar x, \qquad
              \bar\theta = -\,\frac{\nabla_\theta \Phi(x + \epsilon u) - \nabla_\theta \Phi(x - \epsilon u)}{2 \epsilon}

    No graph of second order is built, so memory stays that of plain training. Gradients are compared at other values,
    so a `detach` in the lower loss does not hold here. Biased: the inverse Hessian is replaced by :math:`\eta I`, as in
    `OneStep`, whose exact mixed derivative this approximates.

    Args:
        step_size: :math:`\eta`.
        radius: How far the iterate is moved; None is :math:`\varepsilon^{1/3}` of its dtype times its norm, at least 1.

    Raises:
        TypeError: If `step_size` is not a number or a tensor.
        ValueError: If the radius is not positive.

    Example:
        >>> FiniteDifference(0.1).step_size
        0.1

    References:
        Liu, Simonyan and Yang (2019), DARTS: differentiable architecture search, eq. 8, for the difference.
    """

    step_size: float | Tensor = 1.0
    radius: float | None = None

    retraces: ClassVar[bool] = False
    moves: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(self.step_size, (int, float, Tensor)):
            raise TypeError(f"step_size must be a number or a tensor; got {self.step_size!r}")
        check_radius(self.radius)

    def begin(self, x: Tree, key: Tensor):
        """Nothing is carried."""
        return ()

    def pull(self, response: Response, cotangent: Tree, state) -> tuple[tuple[Tree, ...], tuple, Info]:
        """See `diffopt.implicit.Adjoint`."""
        u = tree.map(lambda v: self.step_size * v, cotangent)
        del cotangent  # it may be as large as all parameters
        return pulled_by_difference(response, u, self.radius), state, unsolved(response.x)

    def respond(self, response: Response, state) -> Tree:
        """See `diffopt.implicit.Adjoint`; with the exact mixed derivative."""
        return OneStep(self.step_size).respond(response, state)
