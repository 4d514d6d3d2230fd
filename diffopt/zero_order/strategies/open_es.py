"""OpenAI's evolution strategy: an optimizer that descends the gradient of the smoothed function."""

from typing import Any, NamedTuple

from torch import Tensor

from diffopt.transforms import GradientTransformation
from diffopt.transforms.base import check_optimizer
from diffopt.typing import Numeric, Schedule, Tree
from diffopt.zero_order.noise import noise
from diffopt.zero_order.strategies.base import Strategy, check_population_size, check_sigma, filled, on_vectors
from diffopt.zero_order.strategies.fitness import Fitness, centered_rank
from diffopt.zero_order.strategies.pairs import descend, mirrored

__all__ = ["OpenESState", "open_es"]


class OpenESState(NamedTuple):
    """The state of `open_es`.

    Attributes:
        mean: The parameters, a tree.
        best: The best member so far, a tree like them.
        best_loss: Its loss, a 0-d tensor.
        generation: How often `tell` was called, an int64 0-d tensor.
        optimizer: The state of the optimizer.
    """

    mean: Tree
    best: Tree
    best_loss: Tensor
    generation: Tensor
    optimizer: Any


def open_es(
    optimizer: GradientTransformation,
    sigma: Numeric | Schedule,
    population_size: int,
    *,
    antithetic: bool = True,
    fitness: Fitness = centered_rank,
) -> Strategy:
    r"""Descend the estimated gradient of the function smoothed by a Gaussian of fixed width.

    .. math:: x_i = \theta + \sigma \epsilon_i, \qquad g = \frac{1}{m \sigma} \sum_{i=1}^m w_i \epsilon_i

    with shaped losses w less their mean; antithetic members come in pairs :math:`\pm \epsilon_i`. The strategy for many
    unknowns: a generation costs two passes over the population.

    Args:
        optimizer: Takes the steps; any optimizer, which sees the gradient as a tree like the parameters.
        sigma: The width, above 0, a number, a 0-d tensor, or a schedule, a function of the generation.
        population_size: The number of members m, at least 2.
        antithetic: Whether members come in pairs; then their number is even.
        fitness: The shaping of losses.

    Returns:
        A strategy with `OpenESState`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If sigma is not above 0, or the size below 2 or odd though antithetic.

    Example:
        >>> import torch
        >>> from diffopt import adam, random
        >>> from diffopt.zero_order import run
        >>> strategy = open_es(adam(0.1), sigma=0.1, population_size=20)
        >>> found = run(strategy, lambda x: (x**2).sum(), torch.ones(3), random.key(0), 60)
        >>> bool(found.loss < 0.01)
        True

    References:
        Salimans, Ho, Chen, Sidor and Sutskever, "Evolution Strategies as a Scalable Alternative to Reinforcement
        Learning", 2017, algorithm 1.
    """
    check_optimizer(optimizer)
    check_population_size(population_size, even=antithetic)
    if not callable(sigma):
        check_sigma(sigma)

    def width(state: OpenESState, like: Tensor) -> Tensor:
        return filled(like[0], sigma(state.generation) if callable(sigma) else sigma)

    def sample(key: Tensor, x: Tensor, state: OpenESState) -> Tensor:
        size = population_size // 2 if antithetic else population_size
        offsets = width(state, x) * noise(key, x.shape[0], size, dtype=x.dtype)
        return mirrored(x, offsets) if antithetic else x + offsets

    def learn(x: Tensor, members: Tensor, losses: Tensor, state: OpenESState) -> tuple[Tensor, dict[str, Any]]:
        weights = fitness(losses).to(x.dtype)
        weights = (weights - weights.mean()) / weights.shape[0]
        # The weights sum to 0 up to rounding, which the second term takes back.
        total = weights @ members - weights.sum() * x
        x, inner = descend(optimizer, total / width(state, x) ** 2, state.optimizer, state.mean)
        return x, {"optimizer": inner}

    return on_vectors(
        OpenESState,
        lambda x, params: (optimizer.init(params),),
        sample,
        learn,
        even=antithetic,
    )
