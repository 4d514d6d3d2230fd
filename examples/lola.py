"""Opponent shaping in the iterated prisoner's dilemma: naive learners defect, LOLA learns tit for tat.

Two players choose again and again whether to cooperate (C) or to defect (D), knowing the choices of the round before.
A policy is five probabilities to cooperate: at the start, and after CC, CD, DC and DD, the own choice first. With it
the expected discounted return is known in closed form, a linear solve of four equations. Each round pays

              C         D
    C      -1, -1    -3, 0
    D       0, -3    -2, -2

Players who follow the gradients of their own returns both end up at -2 a round. `lola` gives each the gradient through
the other's next step, so that it learns to answer defection with defection and cooperation with cooperation; then
cooperation pays for both, -1 a round. The second run does the same from sampled games alone, by `dice`; the noise
leaves some pairs behind.

Run it: python examples/lola.py
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from diffopt import random, tree
from diffopt.meta import dice, lola

DISCOUNT = 0.96
REWARDS = torch.tensor([[-1.0, -3.0, 0.0, -2.0], [-1.0, 0.0, -3.0, -2.0]])  # of both players, after CC, CD, DC, DD
AS_SEEN_BY_SECOND = torch.tensor([0, 1, 3, 2, 4])  # start, CC, DC, CD, DD
NAMES = ("start", "CC", "CD", "DC", "DD")

Players = tuple[Tensor, Tensor]


class Result(NamedTuple):
    """Returns a round (seeds, steps + 1, 2), and the last probabilities to cooperate (seeds, 2, 5), of both players."""

    returns: Tensor
    cooperation: Tensor


def losses(players: Players) -> Tensor:
    """Minus the expected discounted returns of two policies, each five logits, in closed form."""
    x, y = torch.sigmoid(players[0]), torch.sigmoid(players[1])[AS_SEEN_BY_SECOND]
    outcomes = torch.stack([x * y, x * (1 - y), (1 - x) * y, (1 - x) * (1 - y)], 1)
    first, transitions = outcomes[0], outcomes[1:]
    visits = first @ torch.linalg.inv(torch.eye(4).to(x) - DISCOUNT * transitions)
    return -(REWARDS.to(x) @ visits)


def play(players: Players, key: Tensor, games: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sample games: states (games, rounds), log-probabilities of both choices together, and rewards (2, ...)."""
    logits = torch.stack([players[0], players[1][AS_SEEN_BY_SECOND]])
    draws = random.uniform(key, (2, games, rounds, 1))
    choices = draws < torch.sigmoid(logits.detach())[:, None, None, :]  # what each would do in each state
    outcome = 3 - 2 * choices[0].long() - choices[1].long()
    state, path = torch.zeros(games, 1, dtype=torch.long), []
    for t in range(rounds):
        path.append(state)
        state = 1 + outcome[:, t].gather(1, state)
    states = torch.cat(path, 1)
    chosen = outcome.gather(2, states[..., None])[..., 0]
    cooperated = torch.stack([chosen < 2, chosen % 2 == 0])
    logits = logits[:, states]
    log_probs = torch.where(cooperated, logsigmoid(logits), logsigmoid(-logits)).sum(0)
    return states, log_probs, REWARDS[:, chosen]


def sampled_losses(players: Players, *, key: Tensor, games: int = 512, rounds: int = 50) -> tuple[Tensor, Tensor]:
    """Estimates of the losses, and by their derivatives of all derivatives, from games alone."""
    states, log_probs, rewards = play(players, key, games, rounds)
    mine, yours = (dice(log_probs, -r, DISCOUNT, baseline=baseline(states, -r)) for r in rewards.unbind())
    return mine, yours


def baseline(states: Tensor, costs: Tensor) -> Tensor:
    """The expected cost from a round on, by the mean over all games and rounds in the same state."""
    times = torch.arange(costs.shape[1])
    lags = times[:, None] - times
    to_go = costs @ (DISCOUNT ** lags.clamp(min=0)).tril()
    left = 1 - DISCOUNT ** (len(times) - times)  # of a game that goes on for ever
    is_in = (states[..., None] == torch.arange(5)).float()
    means = torch.einsum("gts,gt->s", is_in, to_go / left) / is_in.sum((0, 1)).clamp(min=1)
    return is_in @ means * left


def learn(gradients: Callable, seeds: Sequence[int], steps: int, rate: float, *, sampled: bool, quiet: bool) -> Result:
    """Let both players follow their gradients, for all seeds at once."""
    keys = torch.stack([random.split(random.key(seed), 3) for seed in seeds])
    players: Players = (
        vmap(lambda k: random.normal(k, (5,)))(keys[:, 0]),
        vmap(lambda k: random.normal(k, (5,)))(keys[:, 1]),
    )
    returns = [vmap(losses)(players)]
    for t in tqdm(range(steps), desc="iterated prisoner's dilemma", disable=quiet):
        if sampled:
            grads = vmap(lambda p, k: gradients(p, key=k))(players, vmap(random.fold_in, (0, None))(keys[:, 2], t))
        else:
            grads = vmap(gradients)(players)
        players = tree.axpy(-rate, grads, players)
        returns.append(vmap(losses)(players))
    return Result(-(1 - DISCOUNT) * torch.stack(returns, 1), torch.sigmoid(torch.stack(players, 1)))


def run(seeds: Sequence[int] = range(20), steps: int = 400, *, quiet: bool = False) -> dict[str, Result]:
    """Naive learners, and LOLA with the rates of both 1, from the same starts."""
    rates = {"naive": 0.0, "LOLA": 1.0}
    return {name: learn(lola(losses, r), seeds, steps, 1.0, sampled=False, quiet=quiet) for name, r in rates.items()}


def run_sampled(seeds: Sequence[int] = range(8), steps: int = 80, *, quiet: bool = False) -> Result:
    """LOLA from sampled games."""
    return learn(lola(sampled_losses, 1.0), seeds, steps, 1.0, sampled=True, quiet=quiet)


def table(results: dict[str, Result]) -> str:
    """A line each: the mean return a round, in how many seeds it is above -1.2, and the median policy."""
    lines = [f"{'':16s}{'return':>8s}{'above -1.2':>12s}   probability to cooperate at {', '.join(NAMES)} (median)"]
    for name, result in results.items():
        last = result.returns[:, -1].mean(1)
        policy = " ".join(f"{p:.2f}" for p in result.cooperation.flatten(0, 1).median(0).values)
        lines.append(f"{name:16s}{last.mean():8.2f}{f'{(last > -1.2).sum()} of {len(last)}':>12s}   {policy}")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(run() | {"LOLA, sampled": run_sampled()}))
