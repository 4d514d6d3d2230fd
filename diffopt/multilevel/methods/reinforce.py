r"""The response to actions drawn from a policy: `Reinforce`."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from diffopt.implicit.protocol import Info, Response
from diffopt.multilevel.methods.estimates import pulled_by_values, responded_by_values
from diffopt.typing import Tree

__all__ = ["Reinforce"]

_BASELINE = {"method": "naive", "baseline": "leave_one_out"}


@dataclasses.dataclass(frozen=True)
class Reinforce:
    r"""The score function of a normal policy around what the lower level reads, with a leave-one-out baseline.

    .. math:: \bar\theta = \frac{1}{m} \sum_{i=1}^m \big(\bar x^\top x(a_i) - b_i\big)\,
              \nabla_\theta \log N(a_i; \theta, \sigma^2), \qquad a_i = \theta + \sigma \epsilon_i

    The actions are what the lower level is run with. `ZeroOrder` takes them in pairs, with less variance; this serves
    where runs cannot be paired.

    Args:
        sigma: The deviation of the policy.
        num_samples: The number of runs, at least 2.

    Raises:
        ValueError: If `sigma` is not positive, or `num_samples` below 2.

    Example:
        >>> Reinforce(0.1, 64).num_samples
        64

    References:
        Williams (1992), Simple statistical gradient-following algorithms for connectionist reinforcement learning,
        theorem 1.
    """

    sigma: float
    num_samples: int

    retraces: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    def __post_init__(self):
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive; got {self.sigma!r}")
        if not isinstance(self.num_samples, int) or self.num_samples < 2:
            raise ValueError(f"num_samples must be an int of at least 2; got {self.num_samples!r}")

    def begin(self, x: Tree, key: Tensor) -> Tensor:
        """The key of the next actions."""
        return key

    def pull(self, response: Response, cotangent: Tree, state: Tensor) -> tuple[tuple[Tree, ...], Tensor, Info]:
        """See `diffopt.implicit.Adjoint`."""
        return pulled_by_values(response, cotangent, state, self.sigma, self.num_samples, **_BASELINE)

    def respond(self, response: Response, state: Tensor) -> Tree:
        """See `diffopt.implicit.Adjoint`."""
        return responded_by_values(response, state, self.sigma, self.num_samples, **_BASELINE)
