"""Restarts with growing populations (IPOP): small ones are quick, large ones search globally."""

import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from diffopt import random, tree
from diffopt.schedules.hyperparameters import check_count, check_hyperparameter
from diffopt.typing import Numeric, Tree
from diffopt.zero_order.strategies.base import Strategy, check_population_size
from diffopt.zero_order.strategies.bounds import Bounds, check_bounds, reflect
from diffopt.zero_order.strategies.run import Batching, make_generation

__all__ = ["Attempt", "RestartsResult", "StopRules", "run_with_restarts"]


class StopRules(NamedTuple):
    r"""When an attempt ends; an infinite or zero bound turns a rule off.

    Attributes:
        tolfun: Ends when the losses of the generation and the lowest ones of the last
            :math:`10 + \lceil 30 n / \lambda \rceil` generations span at most this.
        stagnation: Ends after this many generations at least (and :math:`120 + 30 n / \lambda`, and a fifth of all), if
            over them neither the lowest nor the median losses became better; infinite for never.
        max_condition: Ends when the condition number of a covariance exceeds this.
    """

    tolfun: float = 1e-12
    stagnation: float = 0.0
    max_condition: float = 1e14


class Attempt(NamedTuple):
    """One run among restarts.

    Attributes:
        population_size: Its number of members.
        generations: How many it took.
        loss: The lowest loss it found.
        reason: Why it ended: "target", "budget", "tolfun", "stagnation", "condition" or "failed" (no finite loss).
    """

    population_size: int
    generations: int
    loss: float
    reason: str


class RestartsResult(NamedTuple):
    """How a search with restarts ended.

    Attributes:
        params: The best member of all attempts, a tree like the parameters.
        loss: Its loss, a 0-d tensor; infinite if no loss was finite.
        state: The state of the last attempt.
        evaluations: How often the function was evaluated.
        attempts: The attempts, in order.
    """

    params: Tree
    loss: Tensor
    state: Any
    evaluations: int
    attempts: tuple[Attempt, ...]


def run_with_restarts(
    make: Callable[[int], Strategy],
    f: Callable[[Tree], Numeric],
    params: Tree,
    key: Tensor,
    population_size: int,
    *,
    max_evaluations: int,
    restarts: int = 9,
    growth: float = 2.0,
    target: float = -math.inf,
    start: Callable[[Tensor], Tree] | None = None,
    rules: StopRules | None = None,
    bounds: Bounds = None,
    batching: Batching = "vmap",
) -> RestartsResult:
    """Run a strategy until it gets stuck, and again with a larger population, within a budget.

    Args:
        make: Takes the size of the population to a strategy, such as ``lambda size: cma_es(2.0, size)``.
        f: The function, as `run` takes it.
        params: Where the first attempt starts.
        key: A key, int64, shape (2,).
        population_size: That of the first attempt, at least 2.
        max_evaluations: The budget; an attempt ends once it is spent.
        restarts: How many attempts may follow the first.
        growth: By what the population is multiplied each time, at least 1.
        target: Ends with the first loss that is at most this.
        start: Takes a key to where a further attempt starts. Default: where the first did.
        rules: When an attempt ends. Default: ``StopRules()``.
        bounds: Between which f is evaluated, as `run` takes them.
        batching: How f meets a population.

    Returns:
        The best member, its loss, and the attempts.

    Raises:
        TypeError: If a number is of another type.
        ValueError: If a number is out of range.

    Example:
        >>> import torch
        >>> from diffopt.zero_order import cma_es
        >>> f = lambda x: (x**2 - 10 * torch.cos(2 * torch.pi * x) + 10).sum()
        >>> x, key = torch.full((2,), 3.0), random.key(0)
        >>> found = run_with_restarts(lambda size: cma_es(2.0, size), f, x, key, 6, max_evaluations=5000, target=1e-4)
        >>> bool(found.loss <= 1e-4)
        True

    References:
        Auger and Hansen, "A Restart CMA Evolution Strategy With Increasing Population Size", CEC 2005.
        Hansen, "The CMA Evolution Strategy: A Tutorial", 2016, section B.3, for the rules.
    """
    check_population_size(population_size)
    check_hyperparameter("growth", growth, at_least=1.0)
    _check_counts(max_evaluations=max_evaluations, restarts=restarts)
    check_bounds(bounds, params)
    rules = StopRules() if rules is None else rules
    evaluations, attempts, best, best_loss, state = 0, [], params, None, None
    for i in range(restarts + 1):
        run_key, start_key = random.split(random.fold_in(key, i))
        strategy = make(round(population_size * growth**i))
        state = strategy.init(tree.map(Tensor.detach, params if start is None or i == 0 else start(start_key)))
        advance = make_generation(strategy, f, bounds=bounds, batching=batching)
        state, size, reason = _attempt(advance, run_key, state, max_evaluations - evaluations, target, rules)
        attempts.append(Attempt(size, int(state.generation), float(state.best_loss), reason))
        evaluations += size * int(state.generation)
        if best_loss is None or state.best_loss < best_loss:
            best, best_loss = state.best, state.best_loss
        if reason in ("target", "budget"):
            break
    return RestartsResult(reflect(best, bounds), best_loss, state, evaluations, tuple(attempts))  # type: ignore[arg-type]


def _attempt(
    advance: Callable[..., Any], key: Tensor, state: Any, budget: int, target: float, rules: StopRules
) -> tuple[Any, int, str]:
    lowest, medians = [], []
    while True:
        state, losses = advance(key, state)
        values = sorted(loss for loss in losses.tolist() if math.isfinite(loss))
        size = losses.shape[0]
        if not values:
            return state, size, "failed"
        lowest.append(values[0])
        medians.append(statistics.median(values))
        reason = "target" if values[0] <= target else _stuck(rules, state, values, lowest, medians, size)
        if not reason and size * (len(lowest) + 1) > budget:
            reason = "budget"
        if reason:
            return state, size, reason


def _stuck(
    rules: StopRules, state: Any, values: list[float], lowest: list[float], medians: list[float], size: int
) -> str:
    """The rule that ends an attempt, or nothing."""
    n = tree.ravel(state.mean)[0].shape[0]
    window = 10 + math.ceil(30 * n / size)
    recent = [*values, *lowest[-window:]]
    if len(lowest) >= window and max(recent) - min(recent) <= rules.tolfun:
        return "tolfun"
    least = max(rules.stagnation, 120 + 30 * n / size, len(lowest) / 5)
    last = min(math.ceil(least), 20000)
    if len(lowest) >= least and not _improved(lowest[-last:]) and not _improved(medians[-last:]):
        return "stagnation"
    if hasattr(state, "scales") and float((state.scales.amax() / state.scales.amin()) ** 2) > rules.max_condition:
        return "condition"
    return ""


def _improved(losses: list[float]) -> bool:
    share = math.ceil(0.3 * len(losses))
    return statistics.median(losses[-share:]) < statistics.median(losses[:share])


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        check_count(name, count, at_least=0)
