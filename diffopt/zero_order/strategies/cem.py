"""The cross-entropy method: a Gaussian fitted to the best members."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.transforms.leaves import as_dtype
from diffopt.typing import Numeric, Tree
from diffopt.zero_order.noise import noise
from diffopt.zero_order.strategies.base import Strategy, check_population_size, check_sigma, filled, on_vectors
from diffopt.zero_order.strategies.fitness import rank_weights

__all__ = ["CEMState", "cem"]


class CEMState(NamedTuple):
    """The state of `cem`.

    Attributes:
        mean: The parameters, a tree.
        best: The best member so far, a tree like them.
        best_loss: Its loss, a 0-d tensor.
        generation: How often `tell` was called, an int64 0-d tensor.
        sigma: The standard deviation of each unknown, shape (n,).
    """

    mean: Tree
    best: Tree
    best_loss: Tensor
    generation: Tensor
    sigma: Tensor


def cem(
    sigma: Numeric,
    population_size: int,
    *,
    elites: int | None = None,
    momentum: Numeric = 0.0,
    extra_noise: Numeric = 0.0,
) -> Strategy:
    r"""Fit the mean and the standard deviation of each unknown to the best members.

    .. math:: \mu \leftarrow \alpha \mu + (1 - \alpha) \bar x, \qquad
              \sigma^2 \leftarrow \alpha \sigma^2 + (1 - \alpha) \frac1k \sum_{i \in \text{elite}} (x_i - \bar x)^2 + v

    with :math:`\bar x` the mean of the k elites. Without momentum or extra noise it can shrink before it has arrived.

    Args:
        sigma: The standard deviation at the start, above 0, a number or a 0-d tensor.
        population_size: The number of members m, at least 3.
        elites: The number k of members that are fitted, from 2 to m - 1. Default: a quarter of m, at least 2.
        momentum: The share :math:`\alpha` of mean and variance that is kept, in [0, 1), a number or a 0-d tensor.
        extra_noise: The variance v that is added each generation, at least 0, likewise.

    Returns:
        A strategy with `CEMState`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, or the size below 3.

    Example:
        >>> from diffopt import random
        >>> from diffopt.zero_order import run
        >>> found = run(cem(1.0, 40), lambda x: (x**2).sum(), torch.ones(3), random.key(0), 20)
        >>> bool(found.loss < 1e-4)
        True

    References:
        Rubinstein, "The Cross-Entropy Method for Combinatorial and Continuous Optimization", Methodology and Computing
        in Applied Probability 1999.
        Szita and Lorincz, "Learning Tetris Using the Noisy Cross-Entropy Method", Neural Computation 2006, eqs. 1-3.
    """
    check_sigma(sigma)
    check_population_size(population_size, least=3)
    check_hyperparameter("momentum", momentum, at_least=0.0, below=1.0)
    check_hyperparameter("extra_noise", extra_noise, at_least=0.0)
    kept = max(2, population_size // 4) if elites is None else _checked_elites(elites, population_size)

    def sample(key: Tensor, x: Tensor, state: CEMState) -> Tensor:
        return x + state.sigma * noise(key, x.shape[0], population_size, dtype=x.dtype)

    def learn(x: Tensor, members: Tensor, losses: Tensor, state: CEMState) -> tuple[Tensor, dict[str, Any]]:
        ranks = torch.arange(losses.shape[0], device=x.device)
        weights = rank_weights(losses, (ranks < kept).to(x.dtype) / kept)
        centre = weights @ members
        spread = weights @ (members - centre) ** 2
        old, new = as_dtype(momentum, x.dtype), as_dtype(1 - momentum, x.dtype)
        variance = old * state.sigma**2 + new * spread + as_dtype(extra_noise, x.dtype)
        return old * x + new * centre, {"sigma": variance.sqrt()}

    return on_vectors(CEMState, lambda x, params: (filled(x, sigma),), sample, learn)


def _checked_elites(elites: int, population_size: int) -> int:
    if not isinstance(elites, int) or isinstance(elites, bool):
        raise TypeError(f"`elites` must be an int; got {type(elites).__name__}: {elites!r:.60}.")
    if not 2 <= elites < population_size:
        raise ValueError(
            f"`elites` must be from 2 to {population_size - 1}: one has no spread, and all are no choice; got {elites}."
        )
    return elites
