"""MAML for reinforcement learning on tabular MDPs: a policy from which one policy gradient finds the goal.

A world is a random graph of 12 states, each with 4 actions that lead to random neighbours, mostly as intended. Its
tasks differ in where the reward is: one of six states, unknown to the agent, pays in each step spent there. The policy
is a softmax of a table. From 32 sampled games of ten steps the agent takes one policy gradient step, and then should
do well. MAML differentiates the return after that step with respect to where it starts:

    max_theta  E_task J_task(theta'),   theta' = theta + a grad J_task(theta)

Both gradients come from games alone: `dice` makes the inner one differentiable again, so that the outer one also knows
how the start changes what is explored. The rivals start from the uniform policy, and from the policy that does best on
the average over tasks without adapting, trained on as many games. Returns are judged exactly, by dynamic programming,
on new games and all goals. `vmap` runs goals and worlds at once.

Run it: python examples/maml_rl.py
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap
from tqdm import tqdm

from diffopt import random
from diffopt.meta import dice
from diffopt.optimizers import adam
from diffopt.transforms import step

STATES, ACTIONS, GOALS, HORIZON, GAMES = 12, 4, 6, 10, 32
INNER_RATE = 10.0


class Result(NamedTuple):
    """Mean returns a game after 0, 1, 2, ... steps by start, (worlds, steps + 1), and the best there is, (worlds,)."""

    returns: dict[str, Tensor]
    best: Tensor


def draw_world(key: Tensor) -> Tensor:
    """Transition probabilities, (states, actions, states): 0.9 to one random state, the rest to any."""
    targets = (STATES * random.uniform(key, (STATES, ACTIONS))).long()
    return 0.9 * (targets[..., None] == torch.arange(STATES)).float() + 0.1 / STATES


def rewards_of(goal: Tensor) -> Tensor:
    """1 in the goal, which is one of the last states; a game starts in the first."""
    return (torch.arange(STATES) == STATES - GOALS + goal).float()


def expected_return(logits: Tensor, world: Tensor, goal: Tensor) -> Tensor:
    """The return of a policy (states, actions) in a game, exactly."""
    moves = (logits.softmax(1)[..., None] * world).sum(1)
    values = torch.zeros(STATES)
    for _ in range(HORIZON):
        values = moves @ (rewards_of(goal) + values)
    return values[0]


def best_return(world: Tensor, goal: Tensor) -> Tensor:
    """The return of the best policy that may depend on the time."""
    values = torch.zeros(STATES)
    for _ in range(HORIZON):
        values = (world @ (rewards_of(goal) + values)).amax(1)
    return values[0]


def sampled_loss(logits: Tensor, world: Tensor, goal: Tensor, key: Tensor, games: int = GAMES) -> Tensor:
    """Minus the return of sampled games, with derivatives of every order."""
    act, move = random.split(key, 2)
    policy, odds = logits.detach().softmax(1).cumsum(1), world.cumsum(2)
    # what would be done in every state, so that the loop below only looks up
    actions = (random.uniform(act, (games, HORIZON, STATES, 1)) > policy[:, :-1]).sum(-1)
    draws, state, path = random.uniform(move, (HORIZON, games, 1)), torch.zeros(games, dtype=torch.long), []
    for t in range(HORIZON):
        action = actions[:, t].gather(1, state[:, None])[:, 0]
        following = (draws[t] > odds[state, action, :-1]).sum(1)
        path.append((state, action, following))
        state = following
    states, chosen, ends = (torch.stack(part, 1) for part in zip(*path, strict=True))
    return dice(logits.log_softmax(1)[states, chosen], -rewards_of(goal)[ends], baseline="leave_one_out")


def adapt(logits: Tensor, world: Tensor, goal: Tensor, key: Tensor, steps: int = 1) -> list[Tensor]:
    """The policies before and after each policy gradient step on games of one task."""
    path = [logits]
    for k in range(steps):
        logits = logits - INNER_RATE * grad(sampled_loss)(logits, world, goal, random.fold_in(key, k))
        path.append(logits)
    return path


def maml_loss(logits: Tensor, world: Tensor, key: Tensor) -> Tensor:
    """The mean loss over goals, in new games, after one step."""

    def of_task(goal, key):
        inner, outer = random.split(key, 2)
        return sampled_loss(adapt(logits, world, goal, inner)[-1], world, goal, outer)

    return vmap(of_task)(torch.arange(GOALS), random.split(key, GOALS)).mean()


def average_loss(logits: Tensor, world: Tensor, key: Tensor) -> Tensor:
    """The mean loss over goals without adaptation, in as many games as MAML plays before and after its step."""
    losses = vmap(functools.partial(sampled_loss, games=2 * GAMES), in_dims=(None, None, 0, 0))
    return losses(logits, world, torch.arange(GOALS), random.split(key, GOALS)).mean()


def train(loss, worlds: Tensor, keys: Tensor, steps: int, name: str, *, quiet: bool) -> Tensor:
    """Train a start in each world, (worlds, states, actions)."""
    optimizer, logits = adam(lambda count: 0.1 * (1 - count / steps)), torch.zeros(len(worlds), STATES, ACTIONS)
    state = optimizer.init(logits)
    for t in tqdm(range(steps), desc=name, disable=quiet):
        grads = vmap(grad(loss))(logits, worlds, vmap(random.fold_in, (0, None))(keys, t))
        logits, state = step(optimizer, grads, state, logits)
    return logits


def curve(logits: Tensor, world: Tensor, key: Tensor, steps: int, repeats: int = 20) -> Tensor:
    """The expected return before and after each step, the mean over goals and draws of games, (steps + 1,)."""

    def of_task(goal, key):
        return torch.stack([expected_return(policy, world, goal) for policy in adapt(logits, world, goal, key, steps)])

    keys = random.split(key, GOALS * repeats)
    return vmap(of_task)(torch.arange(GOALS).repeat(repeats), keys).mean(0)


def run(seeds: Sequence[int] = range(4), steps: int = 150, shown_steps: int = 3, *, quiet: bool = False) -> Result:
    """Train the starts in a world for each seed, and adapt them to every goal."""
    keys = torch.stack([random.split(random.key(seed), 4) for seed in seeds])
    worlds = vmap(draw_world)(keys[:, 0])
    starts = {
        "MAML": train(maml_loss, worlds, keys[:, 1], steps, "MAML", quiet=quiet),
        "best on average": train(average_loss, worlds, keys[:, 2], steps, "rival", quiet=quiet),
        "uniform": torch.zeros(len(worlds), STATES, ACTIONS),
    }
    judge = vmap(lambda logits, world, key: curve(logits, world, key, shown_steps))
    returns = {name: judge(logits, worlds, keys[:, 3]) for name, logits in starts.items()}
    best = vmap(vmap(best_return, in_dims=(None, 0)), in_dims=(0, None))(worlds, torch.arange(GOALS)).mean(1)
    return Result(returns, best)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = run()
    print(f"return a game, mean over {len(result.best)} worlds and {GOALS} goals; the best policy has", end=" ")
    print(f"{result.best.mean():.2f}")
    for name, returns in result.returns.items():
        print(f"{name:16s} after 0, 1, 2, ... steps: " + " ".join(f"{value:.2f}" for value in returns.mean(0)))
