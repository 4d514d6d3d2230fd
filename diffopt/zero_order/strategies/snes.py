"""Separable natural evolution strategy: natural gradients of a mean and a width of each unknown."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.transforms.leaves import as_dtype
from diffopt.typing import Numeric, Tree
from diffopt.zero_order.strategies.base import (
    Strategy,
    check_population_size,
    check_sigma,
    filled,
    normal_members,
    on_vectors,
)
from diffopt.zero_order.strategies.fitness import Fitness, centered_utilities, nes_utilities

__all__ = ["SNESState", "snes"]


class SNESState(NamedTuple):
    """The state of `snes`.

    Attributes:
        mean: The parameters, a tree.
        best: The best member so far, a tree like them.
        best_loss: Its loss, a 0-d tensor.
        generation: How often `tell` was called, an int64 0-d tensor.
        sigma: The width of each unknown, shape (n,).
    """

    mean: Tree
    best: Tree
    best_loss: Tensor
    generation: Tensor
    sigma: Tensor


def snes(
    sigma: Numeric,
    population_size: int | None = None,
    *,
    learning_rate: Numeric = 1.0,
    sigma_learning_rate: Numeric | None = None,
    fitness: Fitness = nes_utilities,
) -> Strategy:
    r"""Follow the natural gradient of a Gaussian with a width for each unknown.

    .. math:: x_i = \mu + \sigma \odot z_i, \qquad \mu \leftarrow \mu + \eta_\mu \sigma \odot \sum_i u_i z_i, \qquad
              \sigma \leftarrow \sigma \odot \exp\left(\frac{\eta_\sigma}{2} \sum_i u_i (z_i^2 - 1)\right)

    with utilities u, minus the shaped losses less their mean.

    Args:
        sigma: The width at the start, above 0, a number or a 0-d tensor.
        population_size: The number of members m, at least 2. Default: :math:`4 + \lfloor 3 \ln n \rfloor`.
        learning_rate: The rate :math:`\eta_\mu`, above 0, a number or a 0-d tensor.
        sigma_learning_rate: The rate :math:`\eta_\sigma`, at least 0, likewise.
            Default: :math:`(3 + \ln n) / (5 \sqrt n)`.
        fitness: The shaping of losses.

    Returns:
        A strategy with `SNESState`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, or the size below 2.

    Example:
        >>> from diffopt import random
        >>> from diffopt.zero_order import run
        >>> found = run(snes(0.5), lambda x: (x**2).sum(), torch.ones(3), random.key(0), 100)
        >>> bool(found.loss < 1e-4)
        True

    References:
        Schaul, Glasmachers and Schmidhuber, "High dimensions and heavy tails for natural evolution strategies", GECCO
        2011, algorithm 2.
        Wierstra et al., "Natural Evolution Strategies", JMLR 2014, table 1 and algorithm 6.
    """
    check_sigma(sigma)
    check_population_size(population_size)
    check_hyperparameter("learning_rate", learning_rate, above=0.0)
    if sigma_learning_rate is not None:
        check_hyperparameter("sigma_learning_rate", sigma_learning_rate, at_least=0.0)

    def start(x: Tensor, params: Tree) -> tuple[Tensor]:
        return (filled(x, sigma),)

    def sample(key: Tensor, x: Tensor, state: SNESState) -> Tensor:
        return x + state.sigma * normal_members(key, x, population_size)

    def learn(x: Tensor, members: Tensor, losses: Tensor, state: SNESState) -> tuple[Tensor, dict[str, Any]]:
        n = x.shape[0]
        utilities = centered_utilities(fitness, losses, x.dtype)
        z = (members - x) / state.sigma
        rate = (3 + math.log(n)) / (5 * math.sqrt(n)) if sigma_learning_rate is None else sigma_learning_rate
        slope = utilities @ (z * z) - utilities.sum()
        step = as_dtype(learning_rate, x.dtype) * state.sigma * (utilities @ z)
        return x + step, {"sigma": state.sigma * torch.exp(as_dtype(rate, x.dtype) / 2 * slope)}

    return on_vectors(SNESState, start, sample, learn)
