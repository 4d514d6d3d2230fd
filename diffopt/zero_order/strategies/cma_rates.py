"""The weights and learning rates of CMA-ES, for a number of unknowns and a size of the population."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rates", "by_rank", "rates"]


class Rates(NamedTuple):
    """The constants of a search, named as in the tutorial.

    Attributes:
        weights: Of the ranks, the best first; the positive ones sum to 1.
        mu_eff: The variance-effective number of members selected.
        c_sigma: The rate of the step size's path.
        d_sigma: The damping of the step size.
        c_c: The rate of the covariance's path.
        c_1: The rate of the rank-one update.
        c_mu: The rate of the rank-mu update.
        chi_n: The expected length of a standard normal vector.
    """

    weights: tuple[float, ...]
    mu_eff: float
    c_sigma: float
    d_sigma: float
    c_c: float
    c_1: float
    c_mu: float
    chi_n: float


def rates(n: int, population_size: int, *, active: bool, separable: bool = False) -> Rates:
    """Compute the constants.

    Args:
        n: The number of unknowns.
        population_size: The number of members, at least 2.
        active: Whether weights of the worse half are negative, and not 0.
        separable: Whether the covariance is diagonal, and learned (n + 2) / 3 times as fast.

    Returns:
        The constants.

    Example:
        >>> found = rates(10, 10, active=False)
        >>> round(found.mu_eff, 3), [round(weight, 3) for weight in found.weights[:5]]
        (3.167, [0.456, 0.271, 0.162, 0.085, 0.026])

    References:
        Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, revised 2023, table 1.
        Ros and Hansen, "A Simple Modification in CMA-ES Achieving Linear Time and Space Complexity", PPSN 2008, for the
        separable rates.
    """
    m = population_size
    raw = [math.log((m + 1) / 2) - math.log(i) for i in range(1, m + 1)]
    better, worse = raw[: m // 2], raw[m // 2 :]
    mu_eff, mu_eff_worse = _effective(better), _effective(worse)
    c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)
    c_mu = min(1 - c_1, 2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff))
    if separable:
        c_1 = min(1.0, c_1 * (n + 2) / 3)
        c_mu = min(1 - c_1, c_mu * (n + 2) / 3)
    share = 0.0
    if active and c_mu > 0:
        share = min(1 + c_1 / c_mu, 1 + 2 * mu_eff_worse / (mu_eff + 2), (1 - c_1 - c_mu) / (n * c_mu))
    good, bad = sum(better), sum(map(abs, worse))
    weights = [w / good for w in better] + [share * w / bad if share else 0.0 for w in worse]
    c_sigma = (mu_eff + 2) / (n + mu_eff + 5)
    return Rates(
        weights=tuple(weights),
        mu_eff=mu_eff,
        c_sigma=c_sigma,
        d_sigma=1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma,
        c_c=(4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n),
        c_1=c_1,
        c_mu=c_mu,
        chi_n=math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n)),
    )


def by_rank(found: Rates, like: Tensor) -> Tensor:
    """The weights by rank as a tensor: the positive ones, and below them the negative ones, shape (2, m)."""
    weights = torch.tensor(found.weights, dtype=like.dtype, device=like.device)
    return torch.stack([weights.clamp(min=0.0), weights.clamp(max=0.0)])


def _effective(weights: list[float]) -> float:
    squares = sum(w * w for w in weights)
    return sum(weights) ** 2 / squares if squares else 0.0
