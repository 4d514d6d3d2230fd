r"""The grammar of strategies: three pure functions of an explicit state, in a loop that evaluates a population.

.. math:: X_t = \text{ask}(k_t, s_t), \qquad l_{ti} = f(X_{ti}), \qquad s_{t+1} = \text{tell}(X_t, l_t, s_t)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.random.dispatch import runs_eagerly
from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.transforms.leaves import as_dtype
from diffopt.typing import Numeric, Tree
from diffopt.zero_order.noise import noise

__all__ = [
    "Strategy",
    "check_population_size",
    "check_sigma",
    "default_population_size",
    "filled",
    "normal_members",
    "on_vectors",
]


class Strategy(NamedTuple):
    """A search for the minimum of a function by its values alone, as pure functions of an explicit state.

    A state is a named tuple of tensors, the same for every strategy but for the last fields: ``mean``, a tree like the
    parameters; ``best``, the member of the lowest finite loss so far, with its ``best_loss`` (infinite until there is
    one); ``generation``, how often `tell` was called, int64; and what the strategy learned, on flat vectors in the
    order of `diffopt.tree.ravel`. It can be vmapped, saved and resumed.

    Losses are data: no derivative passes through them, while it does through the strategy's hyperparameters. A loss
    that is NaN or infinite ranks last.

    Attributes:
        init: ``init(params) -> state``. Parameters are a tree of tensors of one dtype, float32 or float64.
        ask: ``ask(key, state) -> population``, a tree like the parameters, whose leaves have the members first.
        tell: ``tell(population, losses, state) -> state``, with the losses of the members, shape (m,).

    Example:
        >>> from diffopt import random
        >>> from diffopt.zero_order import cma_es
        >>> strategy, key = cma_es(0.5), random.key(0)
        >>> state = strategy.init({"a": torch.ones(3), "b": torch.ones(())})
        >>> for t in range(60):
        ...     population = strategy.ask(random.fold_in(key, t), state)
        ...     losses = (population["a"] ** 2).sum(dim=1) + population["b"] ** 2
        ...     state = strategy.tell(population, losses, state)
        >>> bool(state.best_loss < 1e-4)
        True
    """

    init: Callable[[Tree], Any]
    ask: Callable[[Tensor, Any], Tree]
    tell: Callable[[Tree, Tensor, Any], Any]


def on_vectors(
    state_type: Callable[..., Any],
    start: Callable[[Tensor, Tree], tuple[Any, ...]],
    sample: Callable[[Tensor, Tensor, Any], Tensor],
    learn: Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, dict[str, Any]]],
    *,
    even: bool = False,
) -> Strategy:
    """Make a strategy of functions on flat vectors: what all of them share.

    Args:
        state_type: The state, a NamedTuple whose first fields are mean, best, best_loss and generation.
        start: ``start(x, params)``, from the parameters, flat and as a tree, to the further fields.
        sample: ``sample(key, x, state)``, from the flat mean to members, shape (m, n).
        learn: ``learn(x, members, losses, state)``, to the next flat mean and the fields that change.
        even: Whether members come in pairs, the first half and the second.

    Returns:
        The strategy.
    """

    def init(params: Tree) -> Any:
        x, unravel = tree.ravel(params)
        _check_params(x)
        params = unravel(x + 0)
        worst = torch.full_like(x[0], math.inf)
        generation = torch.zeros_like(x[0], dtype=torch.int64)
        return state_type(params, tree.map(torch.clone, params), worst, generation, *start(x, params))

    def ask(key: Tensor, state: Any) -> Tree:
        x = tree.ravel(state.mean)[0]
        return _as_population(sample(key, x, state), state.mean)

    def tell(population: Tree, losses: Tensor, state: Any) -> Any:
        members = _as_members(population, state.mean, even)
        x, unravel = tree.ravel(state.mean)
        losses = _checked_losses(losses, members)
        following, changes = learn(x, members, losses, state)
        best, best_loss = _best(members, losses, tree.ravel(state.best)[0], state.best_loss)
        return state._replace(
            mean=unravel(following),
            best=unravel(best),
            best_loss=best_loss,
            generation=state.generation + 1,
            **changes,
        )

    return Strategy(init, ask, tell)


def normal_members(key: Tensor, x: Tensor, population_size: int | None) -> Tensor:
    """Standard normal numbers for each member, shape (m, n), for a flat mean of n; by default as many as is usual."""
    n = x.shape[0]
    return noise(key, n, population_size or default_population_size(n), dtype=x.dtype)


def default_population_size(n: int) -> int:
    r"""Give the usual size of a population of n unknowns: :math:`4 + \lfloor 3 \ln n \rfloor`."""
    return 4 + math.floor(3 * math.log(n))


def check_population_size(size: int | None, *, least: int = 2, even: bool = False) -> None:
    """Raise unless the size of a population is None, or an int that a strategy can learn from.

    Args:
        size: The size.
        least: The least that is meaningful.
        even: Whether members come in pairs.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is too small, or odd where members come in pairs.

    Example:
        >>> check_population_size(7, even=True)
        Traceback (most recent call last):
        ...
        ValueError: `population_size` must be even, for its members come in pairs x + d, x - d; got 7. Take 6 or 8.
    """
    if size is None:
        return
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"`population_size` must be an int; got {type(size).__name__}: {size!r:.60}.")
    if size < least:
        raise ValueError(
            f"`population_size` must be at least {least}, for the strategy learns by comparing members; got {size}."
        )
    if even and size % 2:
        raise ValueError(
            "`population_size` must be even, for its members come in pairs x + d, x - d; "
            f"got {size}. Take {size - 1} or {size + 1}."
        )


def check_sigma(sigma: Numeric) -> None:
    """Raise unless a step size is positive, a number or a 0-d tensor, which is read where that can be done.

    Args:
        sigma: The step size.

    Raises:
        TypeError: If it is neither a number nor a floating-point tensor.
        ValueError: If it is not above 0, or a tensor with dimensions.

    Example:
        >>> check_sigma(0.0)
        Traceback (most recent call last):
        ...
        ValueError: `sigma` must be above 0.0; got 0.0.
    """
    check_hyperparameter("sigma", sigma, above=0.0)
    if isinstance(sigma, Tensor) and runs_eagerly(sigma) and not bool(sigma > 0):
        raise ValueError(f"`sigma` must be above 0.0; got {sigma}.")


def filled(like: Tensor, value: Numeric) -> Tensor:
    """Make a tensor of one hyperparameter, which keeps its gradient, in the shape and dtype of another tensor."""
    return torch.zeros_like(like) + as_dtype(value, like.dtype)


def _check_params(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"a strategy needs parameters of dtype float32 or float64; got {x.dtype}. Convert them first; "
            "where the function needs another dtype, cast inside it."
        )
    if x.shape[0] == 0:
        raise ValueError("a strategy needs at least one unknown; the parameters have no elements.")


def _as_population(members: Tensor, params: Tree) -> Tree:
    leaves, treespec = tree.flatten(params)
    parts = members.split([leaf.numel() for leaf in leaves], dim=1) if len(leaves) > 1 else [members]
    count = members.shape[0]
    shaped = [part.reshape(count, *leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return tree.unflatten(treespec, shaped)


def _as_members(population: Tree, params: Tree, even: bool) -> Tensor:
    leaves, treespec = tree.flatten(params)
    found, spec = tree.flatten(population)
    if spec != treespec:
        tree.check_same_structure(population, params, name="population", reference_name="params")
    tree.check_tensors(population, name="population")
    count = found[0].shape[0] if found[0].ndim else 0
    for i, (leaf, like) in enumerate(zip(found, leaves, strict=True)):
        if leaf.shape != (count, *like.shape):
            raise ValueError(
                f"`population{tree.paths(params)[i]}` must have the members first, shape (m, "
                f"{', '.join(map(str, like.shape))}); got {tuple(leaf.shape)}."
            )
    check_population_size(count, even=even)
    flat = [leaf.reshape(count, -1).to(like.dtype) for leaf, like in zip(found, leaves, strict=True)]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def _checked_losses(losses: Tensor, members: Tensor) -> Tensor:
    if not isinstance(losses, Tensor):
        raise TypeError(f"`losses` must be a tensor of shape (m,); got {type(losses).__name__}. Use torch.as_tensor.")
    if losses.shape != members.shape[:1]:
        raise ValueError(
            f"`losses` must be one number for each of {members.shape[0]} members, shape ({members.shape[0]},); "
            f"got {tuple(losses.shape)}."
        )
    if losses.is_complex():
        raise TypeError(f"`losses` must be real; got {losses.dtype}.")
    losses = losses.detach()
    return losses if losses.is_floating_point() else losses.to(members.dtype)


def _best(members: Tensor, losses: Tensor, best: Tensor, best_loss: Tensor) -> tuple[Tensor, Tensor]:
    lowest, index = torch.where(losses.isfinite(), losses, math.inf).min(dim=0)
    lowest = lowest.to(best_loss.dtype)
    member = members.index_select(0, index.reshape(1)).squeeze(0)
    better = lowest < best_loss
    return torch.where(better, member, best), torch.where(better, lowest, best_loss)
