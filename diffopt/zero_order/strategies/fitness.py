r"""Fitness shaping: what a strategy learns of the losses of a population.

A shaping takes the losses of m members, shape (m,), to shaped losses of the same shape, of which lower is better too.

Losses that are NaN or infinite, of either sign, are failures: they count as equal to each other and rank last. Equal
losses share: each gets the mean of what their ranks would get, so that the order of members is of no account, and a
flat function gives no direction.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Fitness",
    "centered_rank",
    "centered_utilities",
    "finite_losses",
    "nes_utilities",
    "rank_weights",
    "raw_losses",
    "standardize",
]

Fitness: TypeAlias = Callable[[Tensor], Tensor]
"""A shaping: losses of shape (m,) to shaped losses of shape (m,)."""


def centered_rank(losses: Tensor) -> Tensor:
    r"""Replace losses by their ranks, spread evenly over [-1/2, 1/2].

    .. math:: \frac{\text{rank}_i}{m - 1} - \frac12, \qquad \text{rank}_i \in \{0, \ldots, m - 1\}

    Args:
        losses: Floating-point, shape (m,), m at least 2.

    Returns:
        The ranks, shape (m,): -1/2 for the lowest loss, and a sum of 0.

    Raises:
        ValueError: If there are fewer than 2 losses, or the shape is another.

    Example:
        >>> centered_rank(torch.tensor([3.0, 1.0, float("nan"), 1.0, 7.0]))
        tensor([ 0.0000, -0.3750,  0.5000, -0.3750,  0.2500])

    References:
        Salimans, Ho, Chen, Sidor and Sutskever, "Evolution Strategies as a Scalable Alternative to Reinforcement
        Learning", 2017, section 2.1.
    """
    _check_losses("centered_rank", losses)
    ranks = torch.arange(losses.shape[0], dtype=losses.dtype, device=losses.device)
    return rank_weights(losses, ranks / (losses.shape[0] - 1) - 0.5)


def standardize(losses: Tensor) -> Tensor:
    r"""Bring losses to mean 0 and standard deviation 1.

    .. math:: \frac{l_i - \bar l}{s}, \qquad s^2 = \frac1m \sum_i (l_i - \bar l)^2

    Args:
        losses: Floating-point, shape (m,), m at least 2; one that is not finite counts as the highest finite one.

    Returns:
        The standardized losses, shape (m,); zeros where all are equal.

    Raises:
        ValueError: If there are fewer than 2 losses, or the shape is another.

    Example:
        >>> standardize(torch.tensor([1.0, 3.0, float("inf"), 1.0]))
        tensor([-1.,  1.,  1., -1.])
    """
    _check_losses("standardize", losses)
    losses = finite_losses(losses)
    centered = losses - losses.mean()
    spread = (centered * centered).mean().sqrt()
    return centered / torch.where(spread > 0, spread, 1.0)


def nes_utilities(losses: Tensor) -> Tensor:
    r"""Replace losses by minus the utilities of natural evolution strategies, which learn from the better half only.

    .. math:: u_k = \frac{\max(0, \log(m/2 + 1) - \log k)}{\sum_j \max(0, \log(m/2 + 1) - \log j)} - \frac1m

    for the k-th lowest loss, k = 1, ..., m.

    Args:
        losses: Floating-point, shape (m,), m at least 2.

    Returns:
        Minus the utilities, shape (m,), with a sum of 0.

    Raises:
        ValueError: If there are fewer than 2 losses, or the shape is another.

    Example:
        >>> nes_utilities(torch.tensor([3.0, 1.0, 2.0, 4.0]))
        tensor([ 0.2500, -0.4804, -0.0196,  0.2500])

    References:
        Wierstra, Schaul, Glasmachers, Sun, Peters and Schmidhuber, "Natural Evolution Strategies", JMLR 2014,
        section 3.1.
    """
    _check_losses("nes_utilities", losses)
    m = losses.shape[0]
    ranks = torch.arange(1, m + 1, dtype=losses.dtype, device=losses.device)
    utilities = torch.clamp(math.log(m / 2 + 1) - torch.log(ranks), min=0.0)
    return rank_weights(losses, 1 / m - utilities / utilities.sum())


def raw_losses(losses: Tensor) -> Tensor:
    """Leave losses as they are, but that one that is not finite becomes the highest finite one.

    Args:
        losses: Floating-point, shape (m,), m at least 2.

    Returns:
        The losses, shape (m,).

    Raises:
        ValueError: If there are fewer than 2 losses, or the shape is another.

    Example:
        >>> raw_losses(torch.tensor([1.0, float("nan"), 3.0]))
        tensor([1., 3., 3.])
    """
    _check_losses("raw_losses", losses)
    return finite_losses(losses)


def rank_weights(losses: Tensor, weights: Tensor) -> Tensor:
    """Give each member the weight of the rank of its loss; equal losses share their weights evenly.

    Args:
        losses: Shape (m,); those that are not finite rank last.
        weights: The weights by rank, that of the lowest loss first, shape (m,) or (k, m).

    Returns:
        The weights by member, of the shape and dtype of weights.

    Example:
        >>> rank_weights(torch.tensor([5.0, 2.0, 5.0]), torch.tensor([3.0, 2.0, 1.0]))
        tensor([1.5000, 3.0000, 1.5000])
    """
    ordered, order = torch.sort(torch.where(losses.isfinite(), losses, math.inf), stable=True)
    new = (ordered[1:] != ordered[:-1]).to(torch.int64)
    group = torch.cat([torch.zeros_like(new[:1]), new.cumsum(0)])
    zeros = torch.zeros_like(weights)
    rows = group.expand(weights.shape)
    totals = zeros.scatter_add(-1, rows, weights)
    counts = zeros.scatter_add(-1, rows, torch.ones_like(weights))
    shared = (totals / counts.clamp(min=1.0)).gather(-1, rows)
    return zeros.scatter(-1, order.expand(weights.shape), shared)


def centered_utilities(fitness: Fitness, losses: Tensor, dtype: torch.dtype) -> Tensor:
    """The utilities of members: minus the shaped losses less their mean, in a dtype."""
    shaped = fitness(losses).to(dtype)
    return shaped.mean() - shaped


def finite_losses(losses: Tensor) -> Tensor:
    """Replace losses that are not finite by the highest finite one, or by 0 where there is none.

    Args:
        losses: Shape (m,).

    Returns:
        Finite losses, shape (m,).

    Example:
        >>> finite_losses(torch.tensor([1.0, -float("inf"), 2.0]))
        tensor([1., 2., 2.])
    """
    finite = losses.isfinite()
    worst = torch.where(finite, losses, -math.inf).amax()
    return torch.where(finite, losses, torch.where(worst.isfinite(), worst, 0.0))


def _check_losses(name: str, losses: Tensor) -> None:
    if losses.ndim != 1 or losses.shape[0] < 2:
        raise ValueError(
            f"`{name}` needs the losses of at least 2 members, of shape (m,); got shape {tuple(losses.shape)}."
        )
