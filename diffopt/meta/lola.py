r"""Learning with opponent-learning awareness: each player's gradient through the next step of the others.

.. math:: g_i = \nabla_{\theta_i} L_i(\theta_i, \theta_{-i}'(\theta_i)), \qquad
          \theta_j'(\theta_i) = \theta_j - \alpha_j\, \nabla_{\theta_j} L_j(\theta_1, \dots, \theta_n)
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from diffopt import random, tree
from diffopt.autodiff import grad
from diffopt.schedules.hyperparameters import check_count, check_hyperparameter
from diffopt.transforms.leaves import flatten_floating
from diffopt.typing import Numeric, Tree

__all__ = ["lola"]

Loss = Callable[[tuple[Tree, ...]], Tensor]


def lola(
    losses: Callable[..., Sequence[Tensor]],
    learning_rate: Numeric | Sequence[Numeric],
    *,
    steps: int = 1,
    taylor: bool = False,
) -> Callable[..., tuple[Tree, ...]]:
    r"""Make a function that gives every player its gradient in a game, with the others' learning foreseen.

    .. math:: g_i = \nabla_{\theta_i} L_i(\theta_i, \theta_{-i}'(\theta_i)), \qquad
              \theta_j'(\theta_i) = \theta_j - \alpha_j\, \nabla_{\theta_j} L_j(\theta_1, \dots, \theta_n)

    The others are taken for naive learners, who take plain gradient steps on their own losses; the gradient passes
    through these steps, and so shapes them. It is not the gradient of one function: there is nothing to line-search.

    Args:
        losses: `losses(players, *args)`, one scalar a player; of a sampled game, `losses(players, *args, key=key)`,
            scalars whose derivatives are estimates of every order, as those of `dice` are.
        learning_rate: The rate :math:`\alpha` at which the others are taken to learn, a number or a 0-d tensor, or one
            for each player. With 0 the gradients are those of naive learners.
        steps: How many steps of the others to foresee.
        taylor: Whether to take the first-order formula of the paper,
            :math:`\nabla_i L_i - \sum_{j \ne i} \alpha_j\, \nabla_i \nabla_j L_j \nabla_j L_i`, which leaves out that
            the others' step also moves the point where :math:`\nabla_i L_i` is taken, and all of second order.

    Returns:
        `gradients(players, *args, key=None)`, of a sequence with a tree of parameters for each player: a tuple with a
        gradient for each, to be given to an optimizer. With a key, `losses` gets a new one in every evaluation.

    Raises:
        TypeError: If a rate is neither a number nor a floating-point tensor, parameters are not floating-point
            tensors, or losses are not scalars.
        ValueError: If there are fewer than two players, not one loss or rate for each, steps is below 1, or `taylor`
            is asked for more than one step.

    Example:
        >>> import torch
        >>> losses = lambda players: (players[0] * players[1], -players[0] * players[1])
        >>> x, y = torch.tensor(1.0), torch.tensor(0.5)
        >>> lola(losses, 0.1)((x, y))  # x sees y rise by 0.1 x: the derivative of x (y + 0.1 x)
        (tensor(0.7000), tensor(-0.9000))

    References:
        Foerster et al. (2018), Learning with opponent-learning awareness, eq. 4.4 to 4.6. Foerster et al. (2018),
        DiCE: the infinitely differentiable Monte Carlo estimator, section 5.2, for more steps and sampled games.
    """
    _check_options(losses, learning_rate, steps, taylor)

    def gradients(players: Sequence[Tree], *args: Any, key: Tensor | None = None) -> tuple[Tree, ...]:
        players = _check_players(players)
        rates = _rates(learning_rate, len(players))
        keys = [None] * len(players) if key is None else random.split(key, len(players)).unbind()
        direction = _first_order if taylor else _through_steps
        found = []
        for i, own_key in enumerate(keys):
            games = [_evaluations(losses, args, len(players), own_key, k) for k in range(steps + 1)]
            found.append(direction(i, players, rates, games))
        return tuple(found)

    return gradients


def _through_steps(i: int, players: tuple[Tree, ...], rates: list[Numeric], games: list[list[Loss]]) -> Tree:
    """The derivative of a player's loss after the others' steps, the last of the games, in its own parameters."""

    def ahead(own: Tree) -> Tensor:
        now = _replaced(players, i, own)
        for game in games[:-1]:
            moves = [now[j] if j == i else _descend(game[j], j, now, rates[j]) for j in range(len(now))]
            now = tuple(moves)
        return games[-1][i](now)

    return grad(ahead)(players[i])


def _first_order(i: int, players: tuple[Tree, ...], rates: list[Numeric], games: list[list[Loss]]) -> Tree:
    others = [j for j in range(len(players)) if j != i]
    # taken outside of the derivative below, in which it is a constant
    effects = {j: _own_gradient(games[-1][i], j, players) for j in others}

    def expanded(own: Tree) -> Tensor:
        now = _replaced(players, i, own)
        shaping = [rates[j] * tree.vdot(effects[j], _own_gradient(games[0][j], j, now)) for j in others]
        return games[-1][i](now) - sum(shaping)

    return grad(expanded)(players[i])


def _descend(loss: Loss, j: int, players: tuple[Tree, ...], rate: Numeric) -> Tree:
    return tree.axpy(-rate, _own_gradient(loss, j, players), players[j])


def _own_gradient(loss: Loss, j: int, players: tuple[Tree, ...]) -> Tree:
    """The gradient of a loss in the parameters of one player."""
    return grad(lambda params: loss(_replaced(players, j, params)))(players[j])


def _replaced(players: tuple[Tree, ...], i: int, params: Tree) -> tuple[Tree, ...]:
    return (*players[:i], params, *players[i + 1 :])


def _evaluations(losses: Callable, args: tuple, count: int, key: Tensor | None, k: int) -> list[Loss]:
    """The loss of each player as a function of all parameters alone, in the k-th evaluation of a game."""
    options = {} if key is None else {"key": random.fold_in(key, k)}

    def loss_of(i: int) -> Loss:
        return lambda players: _one_each(losses(players, *args, **options), count)[i]

    return [loss_of(i) for i in range(count)]


def _one_each(values: Any, count: int) -> Any:
    several = isinstance(values, (tuple, list)) or (isinstance(values, Tensor) and values.ndim > 0)
    if not several or len(values) != count:
        found = f"{len(values)} of them" if several else type(values).__name__
        raise ValueError(f"`losses` must return one scalar for each of the {count} players; got {found}.")
    return values


def _rates(learning_rate: Numeric | Sequence[Numeric], count: int) -> list[Numeric]:
    if not isinstance(learning_rate, (tuple, list)):
        return [learning_rate] * count  # pyright: ignore[reportReturnType]
    if len(learning_rate) != count:
        raise ValueError(f"`learning_rate` must be one rate, or one for each of {count} players; got {learning_rate}.")
    return list(learning_rate)


def _check_players(players: Sequence[Tree]) -> tuple[Tree, ...]:
    if not isinstance(players, (tuple, list)) or len(players) < 2:
        found = f"{len(players)} of them" if isinstance(players, (tuple, list)) else type(players).__name__
        raise ValueError(f"`players` must be a tuple of the parameters of two players or more; got {found}.")
    flatten_floating(tuple(players), "players")
    return tuple(players)


def _check_options(losses: Any, learning_rate: Any, steps: Any, taylor: bool) -> None:
    if not callable(losses):
        raise TypeError(f"`losses` must be a function of the players' parameters; got {type(losses).__name__}.")
    for rate in learning_rate if isinstance(learning_rate, (tuple, list)) else [learning_rate]:
        check_hyperparameter("learning_rate", rate)
    check_count("steps", steps)
    if taylor and steps > 1:
        raise ValueError(f"the first-order formula is for one step; got steps={steps}. Use taylor=False.")
