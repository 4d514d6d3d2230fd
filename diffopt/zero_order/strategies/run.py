r"""The loop of a strategy: ask, evaluate, tell, with a key for each generation.

.. math:: k_t = \text{fold\_in}(k, t), \qquad X_t = \text{ask}(k_t, s_t), \qquad
          s_{t+1} = \text{tell}(X_t, f(X_t), s_t)
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.func import vmap

from diffopt import random, tree
from diffopt.autodiff import compile as compile_whole
from diffopt.schedules.hyperparameters import check_count
from diffopt.typing import Numeric, Tree
from diffopt.zero_order.strategies.base import Strategy
from diffopt.zero_order.strategies.bounds import Bounds, check_bounds, reflect

__all__ = ["Batching", "History", "Result", "evaluate_population", "make_generation", "run"]

Batching: TypeAlias = Literal["vmap", "batched", "sequential"]
"""How a function meets a population: "vmap" maps it over members, "batched" calls it once with all of them, and
"sequential" calls it once for each, so that it may use NumPy or ``.item()``."""


class History(NamedTuple):
    """What a run recorded, each of shape (generations,), or (0,) where it was not asked to.

    Attributes:
        best: The lowest loss so far.
        lowest: The lowest loss of the generation.
        mean: The mean of its finite losses; NaN where there is none.
    """

    best: Tensor
    lowest: Tensor
    mean: Tensor


class Result(NamedTuple):
    """How a run ended.

    Attributes:
        params: The best member of all generations, a tree like the parameters.
        loss: Its loss, a 0-d tensor; infinite if no loss was finite.
        state: The state of the strategy, from which a run goes on; ``state.mean`` is the centre of the search. With
            bounds, it is what was searched before reflection: see `reflect`.
        history: What was recorded.
    """

    params: Tree
    loss: Tensor
    state: Any
    history: History


def run(
    strategy: Strategy,
    f: Callable[[Tree], Numeric],
    params: Tree,
    key: Tensor,
    steps: int,
    *,
    bounds: Bounds = None,
    batching: Batching = "vmap",
    compile: bool = False,
    progress: bool = False,
    history: bool = False,
    callback: Callable[[Any, Tensor], Any] | None = None,
    state: Any = None,
) -> Result:
    """Minimize a function by a strategy.

    A run of s steps and one of t more from its state, with the same key, equal one of s + t steps. Neither the
    parameters nor the function carry gradient, but the strategy's hyperparameters do.

    Args:
        strategy: The strategy.
        f: Takes a tree like the parameters to a number; with batching "batched", one with the members first to the
            losses of shape (m,).
        params: Where the search starts.
        key: A key, int64, shape (2,).
        steps: The number of generations.
        bounds: A pair (lower, upper) between which f is evaluated, by `reflect`; each is a number or a tensor that
            holds for every leaf, a tree like the parameters, or None.
        batching: How f meets a population.
        compile: Whether a generation is compiled, f within it: seconds once, then without the overhead of each
            operation. Not with batching "sequential".
        progress: Whether to show a bar with the best loss.
        history: Whether to record losses.
        callback: ``callback(state, losses)`` after each generation; if it gives a true value, the run ends.
        state: Goes on from this state, from a former run or ``strategy.init``; the parameters then only say the
            structure.

    Returns:
        The best member, its loss, the state and the history.

    Raises:
        ValueError: If steps are negative, batching is another, bounds are out of order or no pair, or losses are not
            one number a member.
        TypeError: If steps are not an int, or the parameters not of dtype float32 or float64.

    Example:
        >>> from diffopt.zero_order import snes
        >>> f = lambda p: ((p["x"] - 3) ** 2).sum() + p["y"] ** 2
        >>> found = run(snes(1.0), f, {"x": torch.ones(2), "y": torch.ones(())}, random.key(0), 150)
        >>> [round(x, 2) for x in found.params["x"].tolist()]
        [3.0, 3.0]
    """
    check_count("steps", steps, at_least=0)
    check_bounds(bounds, params)
    advance = make_generation(strategy, f, bounds=bounds, batching=batching)
    if compile:
        advance = _compiled(advance, batching)
    if state is None:
        state = strategy.init(tree.map(Tensor.detach, params))
    else:
        tree.check_like(state.mean, params, name="state.mean", reference_name="params")
    rows = []
    bar = _bar(steps) if progress else None
    for _ in range(steps):
        state, losses = advance(key, state)
        if history:
            rows.append(_row(state, losses))
        if bar is not None:
            bar.update()
            bar.set_postfix(loss=float(state.best_loss), refresh=False)
        if callback is not None and callback(state, losses):
            break
    if bar is not None:
        bar.close()
    return Result(reflect(state.best, bounds), state.best_loss, state, _recorded(rows, state.best_loss))


def make_generation(
    strategy: Strategy, f: Callable[[Tree], Numeric], *, bounds: Bounds = None, batching: Batching = "vmap"
) -> Callable[[Tensor, Any], tuple[Any, Tensor]]:
    """Make one generation of a run: ask, evaluate and tell, as a function to compile or to vmap.

    Args:
        strategy: The strategy.
        f: The function, as `run` takes it.
        bounds: Between which it is evaluated, as `run` takes them.
        batching: How it meets a population.

    Returns:
        ``advance(key, state) -> (state, losses)``. The key is that of the whole run; the generation is folded in.

    Raises:
        ValueError: If batching is another.

    Example:
        >>> from diffopt.zero_order import snes
        >>> strategy = snes(1.0, 8)
        >>> advance = make_generation(strategy, lambda x: (x**2).sum())
        >>> state, losses = advance(random.key(0), strategy.init(torch.ones(3)))
        >>> losses.shape, state.generation
        (torch.Size([8]), tensor(1))
    """
    _check_batching(batching)

    def advance(key: Tensor, state: Any) -> tuple[Any, Tensor]:
        population = strategy.ask(random.fold_in(key, state.generation), state)
        losses = evaluate_population(f, reflect(population, bounds), batching)
        return strategy.tell(population, losses, state), losses

    return advance


def evaluate_population(f: Callable[[Tree], Numeric], population: Tree, batching: Batching = "vmap") -> Tensor:
    """Evaluate a function on the members of a population, without a graph.

    Args:
        f: The function, as `run` takes it.
        population: A tree whose leaves have the members first.
        batching: How the function meets it.

    Returns:
        The losses, shape (m,).

    Example:
        >>> evaluate_population(lambda x: (x**2).sum(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([ 5., 25.])
    """
    with torch.no_grad():
        if batching == "vmap":
            return vmap(f)(population)  # type: ignore[return-value]
        if batching == "batched":
            return f(population)  # type: ignore[return-value]
        leaves, treespec = tree.flatten(population)
        losses = [f(tree.unflatten(treespec, [leaf[i] for leaf in leaves])) for i in range(leaves[0].shape[0])]
        return torch.stack([_as_loss(loss, leaves[0].device) for loss in losses])


def _as_loss(loss: Any, device: torch.device) -> Tensor:
    loss = loss if isinstance(loss, Tensor) else torch.tensor(float(loss), dtype=torch.float64, device=device)
    if loss.ndim:
        raise ValueError(f"`f` must give one number for a member; got shape {tuple(loss.shape)}.")
    return loss


def _compiled(advance: Callable[..., Any], batching: Batching) -> Callable[..., Any]:
    if batching == "sequential":
        raise ValueError('`compile` needs batching "vmap" or "batched"; "sequential" is for what cannot be compiled.')
    return compile_whole(advance)


def _row(state: Any, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    finite = losses.isfinite()
    lowest = torch.where(finite, losses, math.inf).amin()
    mean = torch.where(finite, losses, 0.0).sum() / finite.sum()
    return state.best_loss, lowest, mean


def _recorded(rows: list[tuple[Tensor, Tensor, Tensor]], like: Tensor) -> History:
    if not rows:
        return History(*(like.new_empty((0,)) for _ in range(3)))
    return History(*(torch.stack(column).to(like.dtype) for column in zip(*rows, strict=True)))


def _bar(steps: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=steps, unit="generation")


def _check_batching(batching: Batching) -> None:
    if batching not in get_args(Batching):
        raise ValueError(f'`batching` must be "vmap", "batched" or "sequential"; got {batching!r}.')
