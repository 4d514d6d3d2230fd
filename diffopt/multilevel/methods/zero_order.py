r"""The response of the lower level's steps as a black box: `ZeroOrder`."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from diffopt.implicit.protocol import Info, Response
from diffopt.multilevel.methods.estimates import pulled_by_values, responded_by_values
from diffopt.typing import Tree

__all__ = ["ZeroOrder"]


@dataclasses.dataclass(frozen=True)
class ZeroOrder:
    r"""Evolution strategies through the lower level's steps: perturb what it reads, and run the steps again.

    .. math:: \bar\theta = \frac{1}{m} \sum_{i=1}^m
              \frac{\bar x^\top (x(\theta + \sigma \epsilon_i) - x(\theta - \sigma \epsilon_i))}{2 \sigma}\,\epsilon_i

    An unbiased estimate of the derivative of the smoothed steps. They are run forward alone, `2 m` times at once, so
    neither their length nor how rough they are matters; the variance grows with the number of what is read.

    Args:
        sigma: The scale of the perturbations.
        num_samples: `2 m`, the number of runs, even.

    Raises:
        ValueError: If `sigma` is not positive, or `num_samples` not even and positive.

    Example:
        >>> ZeroOrder(0.1, 64).num_samples
        64

    References:
        Vicol, Metz and Sohl-Dickstein (2021), Unbiased gradient estimation in unrolled computation graphs with
        persistent evolution strategies, section 2.
    """

    sigma: float
    num_samples: int

    retraces: ClassVar[bool] = True
    moves: ClassVar[bool] = True

    def __post_init__(self):
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive; got {self.sigma!r}")
        if not isinstance(self.num_samples, int) or self.num_samples < 2 or self.num_samples % 2:
            raise ValueError(f"num_samples must be an even int of at least 2; got {self.num_samples!r}")

    def begin(self, x: Tree, key: Tensor) -> Tensor:
        """The key of the next perturbations."""
        return key

    def pull(self, response: Response, cotangent: Tree, state: Tensor) -> tuple[tuple[Tree, ...], Tensor, Info]:
        """See `diffopt.implicit.Adjoint`."""
        return pulled_by_values(response, cotangent, state, self.sigma, self.num_samples)

    def respond(self, response: Response, state: Tensor) -> Tree:
        """See `diffopt.implicit.Adjoint`."""
        # the baseline leaves the first derivative as it is, and takes most of the noise out of the second
        return responded_by_values(response, state, self.sigma, self.num_samples, baseline="leave_one_out")
