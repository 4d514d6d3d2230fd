"""Policy gradients with parameter-based exploration: a mean and a width of each unknown, both by gradients."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.transforms import GradientTransformation
from diffopt.transforms.base import check_optimizer
from diffopt.transforms.leaves import as_dtype
from diffopt.typing import Numeric, Tree
from diffopt.zero_order.noise import noise
from diffopt.zero_order.strategies.base import Strategy, check_population_size, check_sigma, filled, on_vectors
from diffopt.zero_order.strategies.clipup import clipup
from diffopt.zero_order.strategies.fitness import Fitness, centered_rank
from diffopt.zero_order.strategies.pairs import descend, halves, mirrored

__all__ = ["PGPEState", "pgpe"]


class PGPEState(NamedTuple):
    """The state of `pgpe`.

    Attributes:
        mean: The parameters, a tree.
        best: The best member so far, a tree like them.
        best_loss: Its loss, a 0-d tensor.
        generation: How often `tell` was called, an int64 0-d tensor.
        sigma: The width of each unknown, shape (n,).
        optimizer: The state of the optimizer of the mean.
    """

    mean: Tree
    best: Tree
    best_loss: Tensor
    generation: Tensor
    sigma: Tensor
    optimizer: Any


def pgpe(
    sigma: Numeric,
    population_size: int,
    *,
    optimizer: GradientTransformation | None = None,
    sigma_learning_rate: Numeric = 0.1,
    sigma_max_change: Numeric = 0.2,
    fitness: Fitness = centered_rank,
) -> Strategy:
    r"""Descend the expected loss of a Gaussian with a width for each unknown, sampled in pairs.

    .. math:: g_\theta = \frac{2}{m} \sum_i \frac{w_i^+ - w_i^-}{2}\, \delta_i, \qquad
              g_\sigma = \frac{2}{m} \sum_i \left(\frac{w_i^+ + w_i^-}{2} - \bar w\right)
              \frac{\delta_i^2 - \sigma^2}{\sigma}

    with :math:`\delta_i \sim \mathcal{N}(0, \sigma^2)` and the shaped losses :math:`w_i^\pm` of
    :math:`\theta \pm \delta_i`. The factor :math:`\sigma^{-2}` of the true gradient is left to the learning rates, as
    published.

    Args:
        sigma: The width at the start, above 0, a number or a 0-d tensor.
        population_size: The number of members m, even, at least 4.
        optimizer: Takes the steps of the mean. Default: `clipup` with the greatest speed :math:`\sigma \sqrt n / 15`
            and half of it as learning rate.
        sigma_learning_rate: The rate of the widths, at least 0, a number or a 0-d tensor.
        sigma_max_change: By what share a width may change in a generation, in [0, 1), likewise.
        fitness: The shaping of losses.

    Returns:
        A strategy with `PGPEState`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, or the size below 4 or odd.

    Example:
        >>> from diffopt import random
        >>> from diffopt.zero_order import run
        >>> strategy = pgpe(sigma=0.3, population_size=20)
        >>> found = run(strategy, lambda x: (x**2).sum(), torch.ones(3), random.key(0), 60)
        >>> bool(found.loss < 0.01)
        True

    References:
        Sehnke, Osendorfer, Rueckstiess, Graves, Peters and Schmidhuber, "Parameter-exploring policy gradients", Neural
        Networks 2010, algorithm 2.
        Toklu, Liskowski and Srivastava, "ClipUp", PPSN 2020, section 3 and the default speed.
    """
    check_sigma(sigma)
    check_population_size(population_size, least=4, even=True)
    check_hyperparameter("sigma_learning_rate", sigma_learning_rate, at_least=0.0)
    check_hyperparameter("sigma_max_change", sigma_max_change, at_least=0.0, below=1.0)
    if optimizer is not None:
        check_optimizer(optimizer)

    def mover(x: Tensor) -> GradientTransformation:
        if optimizer is not None:
            return optimizer
        speed = sigma * x.shape[0] ** 0.5 / 15
        return clipup(speed / 2, speed)

    def start(x: Tensor, params: Tree) -> tuple[Tensor, Any]:
        return filled(x, sigma), mover(x).init(params)

    def sample(key: Tensor, x: Tensor, state: PGPEState) -> Tensor:
        return mirrored(x, state.sigma * noise(key, x.shape[0], population_size // 2, dtype=x.dtype))

    def learn(x: Tensor, members: Tensor, losses: Tensor, state: PGPEState) -> tuple[Tensor, dict[str, Any]]:
        offsets, plus, minus = halves(members, fitness(losses).to(x.dtype))
        pairs = offsets.shape[0]
        following, inner = descend(mover(x), (plus - minus) / (2 * pairs) @ offsets, state.optimizer, state.mean)
        both = (plus + minus) / 2
        both = (both - both.mean()) / pairs
        width = state.sigma
        slope = (both @ (offsets * offsets) - both.sum() * width * width) / width
        change = as_dtype(sigma_max_change, x.dtype) * width
        rate = as_dtype(sigma_learning_rate, x.dtype)
        width = torch.clamp(width - rate * slope, min=width - change, max=width + change)
        return following, {"sigma": width, "optimizer": inner}

    return on_vectors(PGPEState, start, sample, learn, even=True)
