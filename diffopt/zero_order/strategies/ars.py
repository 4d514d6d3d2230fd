"""Augmented random search: finite differences along random directions, of which the best are kept."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.transforms import GradientTransformation
from diffopt.transforms.base import check_optimizer
from diffopt.typing import Numeric, Tree
from diffopt.zero_order.noise import noise
from diffopt.zero_order.strategies.base import Strategy, check_population_size, check_sigma, filled, on_vectors
from diffopt.zero_order.strategies.fitness import finite_losses, rank_weights
from diffopt.zero_order.strategies.pairs import descend, halves, mirrored

__all__ = ["ARSState", "ars"]


class ARSState(NamedTuple):
    """The state of `ars`.

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


def ars(
    optimizer: GradientTransformation,
    sigma: Numeric,
    population_size: int,
    *,
    top: int | None = None,
) -> Strategy:
    r"""Step along the mean of random directions, weighted by differences of losses over their standard deviation.

    .. math:: g = \frac{1}{b\, s} \sum_{i \in \text{top } b} \left(f(x + \sigma \epsilon_i)
              - f(x - \sigma \epsilon_i)\right) \epsilon_i

    The top directions are those whose better side has the lowest loss, and s is the standard deviation of their 2 b
    losses. This is V1, and with top below m / 2 it is V1-t; V2 normalizes what a policy observes, inside of f.

    Args:
        optimizer: Takes the steps along g; ``sgd(learning_rate)`` is the published one.
        sigma: The width, above 0, a number or a 0-d tensor.
        population_size: The number of members m, even, at least 4.
        top: The number of directions b that are kept, from 1 to m / 2. Default: all.

    Returns:
        A strategy with `ARSState`.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If sigma is not above 0, the size below 4 or odd, or top out of range.

    Example:
        >>> from diffopt import random, sgd
        >>> from diffopt.zero_order import run
        >>> strategy = ars(sgd(0.1), sigma=0.1, population_size=20, top=5)
        >>> found = run(strategy, lambda x: (x**2).sum(), torch.ones(3), random.key(0), 60)
        >>> bool(found.loss < 0.01)
        True

    References:
        Mania, Guy and Recht, "Simple random search of static linear policies is competitive for reinforcement
        learning", NeurIPS 2018, algorithms 1 and 2.
    """
    check_optimizer(optimizer)
    check_population_size(population_size, least=4, even=True)
    check_sigma(sigma)
    kept = population_size // 2 if top is None else _checked_top(top, population_size // 2)

    def sample(key: Tensor, x: Tensor, state: ARSState) -> Tensor:
        return mirrored(x, filled(x[0], sigma) * noise(key, x.shape[0], population_size // 2, dtype=x.dtype))

    def learn(x: Tensor, members: Tensor, losses: Tensor, state: ARSState) -> tuple[Tensor, dict[str, Any]]:
        offsets, plus, minus = halves(members, torch.where(losses.isfinite(), losses, torch.inf))
        chosen = _mean_of_top(torch.minimum(plus, minus), kept).to(x.dtype)
        _, plus, minus = halves(members, finite_losses(losses).to(x.dtype))
        spread = _spread(plus, minus, chosen)
        weights = chosen * (plus - minus) / torch.where(spread > 0, spread, 1.0)
        x, inner = descend(optimizer, weights @ offsets / filled(x[0], sigma), state.optimizer, state.mean)
        return x, {"optimizer": inner}

    return on_vectors(
        ARSState, lambda x, params: (optimizer.init(params),), sample, learn, even=True
    )  # fmt: skip


def _checked_top(top: int, directions: int) -> int:
    if not isinstance(top, int) or isinstance(top, bool):
        raise TypeError(f"`top` must be an int; got {type(top).__name__}: {top!r:.60}.")
    if not 1 <= top <= directions:
        raise ValueError(
            f"`top` must be from 1 to {directions}, the number of directions, which is half of `population_size`; "
            f"got {top}."
        )
    return top


def _mean_of_top(scores: Tensor, kept: int) -> Tensor:
    """The weights that average over the `kept` lowest scores."""
    weights = torch.arange(scores.shape[0], device=scores.device) < kept
    return rank_weights(scores, weights.to(scores.dtype) / kept)


def _spread(plus: Tensor, minus: Tensor, weights: Tensor) -> Tensor:
    """The standard deviation of the losses on both sides, weighted."""
    centre = weights @ (plus + minus) / 2
    return (weights @ ((plus - centre) ** 2 + (minus - centre) ** 2) / 2).sqrt()
