"""Exponential natural evolution strategy: natural gradients of a mean and a full covariance."""

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

__all__ = ["XNESState", "xnes"]


class XNESState(NamedTuple):
    """The state of `xnes`.

    Attributes:
        mean: The parameters, a tree.
        best: The best member so far, a tree like them.
        best_loss: Its loss, a 0-d tensor.
        generation: How often `tell` was called, an int64 0-d tensor.
        sigma: The step size, a 0-d tensor.
        shape: The matrix B of determinant 1, shape (n, n); the covariance is the square of sigma times B B'.
    """

    mean: Tree
    best: Tree
    best_loss: Tensor
    generation: Tensor
    sigma: Tensor
    shape: Tensor


def xnes(
    sigma: Numeric,
    population_size: int | None = None,
    *,
    learning_rate: Numeric = 1.0,
    sigma_learning_rate: Numeric | None = None,
    shape_learning_rate: Numeric | None = None,
    fitness: Fitness = nes_utilities,
) -> Strategy:
    r"""Follow the natural gradient of a Gaussian with any covariance, in exponential coordinates.

    .. math:: x_i = \mu + \sigma B z_i, \qquad
              G_\delta = \sum_i u_i z_i, \quad G_M = \sum_i u_i (z_i z_i^\top - I), \quad
              G_\sigma = \tfrac1n \operatorname{tr} G_M, \quad G_B = G_M - G_\sigma I

    .. math:: \mu \leftarrow \mu + \eta_\mu \sigma B G_\delta, \qquad
              \sigma \leftarrow \sigma \exp(\tfrac{\eta_\sigma}{2} G_\sigma), \qquad
              B \leftarrow B \exp(\tfrac{\eta_B}{2} G_B)

    with utilities u, minus the shaped losses less their mean. Memory is quadratic and time cubic in the number n of
    unknowns; for many, take `snes`.

    Args:
        sigma: The step size at the start, above 0, a number or a 0-d tensor.
        population_size: The number of members m, at least 2. Default: :math:`4 + \lfloor 3 \ln n \rfloor`.
        learning_rate: The rate :math:`\eta_\mu`, above 0, a number or a 0-d tensor.
        sigma_learning_rate: The rate :math:`\eta_\sigma`, at least 0, likewise.
            Default: :math:`(9 + 3 \ln n) / (5 n \sqrt n)`.
        shape_learning_rate: The rate :math:`\eta_B`, likewise, with the same default.
        fitness: The shaping of losses.

    Returns:
        A strategy with `XNESState`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a number is out of range, or the size below 2.

    Example:
        >>> from diffopt import random
        >>> from diffopt.zero_order import run
        >>> found = run(xnes(0.5), lambda x: (x**2).sum(), torch.ones(3), random.key(0), 100)
        >>> bool(found.loss < 1e-4)
        True

    References:
        Glasmachers, Schaul, Sun, Wierstra and Schmidhuber, "Exponential Natural Evolution Strategies", GECCO 2010,
        algorithm 1.
        Wierstra et al., "Natural Evolution Strategies", JMLR 2014, table 1 and algorithm 5.
    """
    check_sigma(sigma)
    check_population_size(population_size)
    check_hyperparameter("learning_rate", learning_rate, above=0.0)
    for name, rate in (("sigma_learning_rate", sigma_learning_rate), ("shape_learning_rate", shape_learning_rate)):
        if rate is not None:
            check_hyperparameter(name, rate, at_least=0.0)

    def start(x: Tensor, params: Tree) -> tuple[Tensor, Tensor]:
        return filled(x[0], sigma), torch.eye(x.shape[0], dtype=x.dtype, device=x.device)

    def sample(key: Tensor, x: Tensor, state: XNESState) -> Tensor:
        z = normal_members(key, x, population_size)
        return x + state.sigma * (z @ state.shape.mT)

    def learn(x: Tensor, members: Tensor, losses: Tensor, state: XNESState) -> tuple[Tensor, dict[str, Any]]:
        n = x.shape[0]
        utilities = centered_utilities(fitness, losses, x.dtype)
        steps = (members - x) / state.sigma
        z = steps @ torch.linalg.inv(state.shape).mT
        delta, total = utilities @ z, utilities.sum()
        eye = torch.eye(n, dtype=x.dtype, device=x.device)
        slope = z.mT @ (utilities[:, None] * z) - total * eye
        along = slope.diagonal().mean()
        usual = (9 + 3 * math.log(n)) / (5 * n * math.sqrt(n))
        given = (sigma_learning_rate, shape_learning_rate)
        size, bend = (as_dtype(usual if rate is None else rate, x.dtype) / 2 for rate in given)
        step = as_dtype(learning_rate, x.dtype) * state.sigma * (state.shape @ delta)
        shape = state.shape @ torch.linalg.matrix_exp(bend * (slope - along * eye))
        return x + step, {"sigma": state.sigma * torch.exp(size * along), "shape": shape}

    return on_vectors(XNESState, start, sample, learn)
