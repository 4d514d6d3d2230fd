"""Meta-gradient reinforcement learning on a two-state chain: the discount and the trace decay, learned online.

A round goes A -> B -> end. Leaving A pays about 1; leaving B pays 1 on the average, with a lot of noise. An agent
learns what A and B are worth by TD(lambda): each update moves the values a little to the returns of a round. A discount
below 1 makes the target of A wrong, but quieter. Which is best? Not 1, though the returns that count are undiscounted.

An update at rate a moves a value v to v + a (g - v). Seen K updates ahead, the squared error of the value of A is least
where the discount is

    gamma = m^2 / (m^2 + s^2 rho),   rho = a / (2 - a) (1 + (1 - a)^K)

with the mean m and the deviation s of what B pays; for many updates rho is a / (2 - a). `mgrl` finds it without
knowing, from the derivative of the error in the next rounds. With K = 1, the published method, it is too cautious:
it sees the noise of one update, and not that the next ones average it. The trace decay is learned in the same way, at
discount 1: bootstrapping from the value of B, itself an average, is quieter than the reward of B.

Run it: python examples/meta_gradient_rl.py
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from tqdm import tqdm

from diffopt import random
from diffopt.meta import lambda_return, mgrl
from diffopt.optimizers import sgd

RATE, MEAN, SPREAD = 0.3, 1.0, 1.5


class Result(NamedTuple):
    """What was learned after each window, (seeds, windows), and where it should come to rest."""

    learned: Tensor
    known: float


def best_discount(window: float) -> float:
    """The discount of least error as seen some updates ahead; `float("inf")` for good."""
    noise = RATE / (2 - RATE) * (1 + (1 - RATE) ** window)
    return MEAN**2 / (MEAN**2 + SPREAD**2 * noise)


def best_trace_decay() -> float:
    """Where the meta-gradient of one update is zero on the average, at discount 1.

    With x = cov(v_A, v_B) and v = var(v_B) in the long run, relative to the variance of the reward:
    x = (1-a)^2 x + a (1-a) (1-l) v + a^2 l, and the meta-gradient a^2 l - a^2 (1-l) v - a (1-a) x is zero.
    """
    v, keep = RATE / (2 - RATE), 1 - RATE
    # x = p + q l; inserted into the second equation
    scale = RATE / (1 - keep**2)
    p, q = scale * keep * v, scale * (RATE - keep * v)
    return (RATE * v + keep * p) / (RATE + RATE * v - keep * q)


def draw_rounds(key: Tensor, count: int) -> Tensor:
    """Rewards of rounds, (count, 2)."""
    noise = random.normal(key, (count, 2))
    return torch.stack([1 + 0.1 * noise[:, 0], MEAN + SPREAD * noise[:, 1]], 1)


def td_loss(values: Tensor, frozen: Tensor, meta: dict[str, Tensor], rewards: Tensor) -> Tensor:
    """The squared distance of both values to the returns of a round, which bootstrap from frozen values."""
    followers = torch.stack([frozen[1], torch.zeros_like(frozen[1])])
    returns = lambda_return(rewards, followers, meta["discount"], meta["trace_decay"])
    return ((returns - values) ** 2).sum() / 2


def outer_loss(values: Tensor, rounds: Tensor) -> Tensor:
    """The squared distance of the value of A to undiscounted returns of other rounds."""
    return ((rounds.sum(1) - values[0]) ** 2).mean() / 2


def learn(name: str, seeds: Sequence[int], windows: int, window: int, meta_rate: float, *, quiet: bool) -> Tensor:
    """Learn one of the two meta-parameters, from 0.5, and keep the other at 1; (seeds, windows)."""
    fixed = {"discount": torch.tensor(1.0), "trace_decay": torch.tensor(1.0)}
    learner = mgrl(
        lambda values, frozen, meta, rewards: td_loss(values, frozen, fixed | meta, rewards),
        outer_loss,
        sgd(RATE),
        sgd(lambda count: meta_rate * (1 - count / windows)),
    )
    keys = torch.stack([random.key(seed) for seed in seeds])
    state = vmap(lambda key: learner.init(random.uniform(key, (2,)), {name: torch.tensor(0.5)}))(keys)

    def advance(state, key):
        rounds = draw_rounds(key, window + 16)
        return learner.step(state, rounds[:window], rounds[window:])[0]

    history = []
    for t in tqdm(range(windows), desc=f"learning the {name}, {window} ahead", disable=quiet):
        state = vmap(advance)(state, vmap(random.fold_in, (0, None))(keys, t))
        history.append(state.meta[name])
    return torch.stack(history, 1)


def errors(discounts: Tensor, updates: int = 60, agents: int = 4000, key: Tensor | None = None) -> Tensor:
    """The mean squared error of the value of A, by simulating many agents at each discount, (discounts,)."""
    rewards = draw_rounds(random.key(7) if key is None else key, updates * agents).reshape(updates, agents, 2)
    values = torch.full((len(discounts), agents), 1.0 + MEAN)
    for now in rewards:
        values = values + RATE * (now[:, 0] + discounts[:, None] * now[:, 1] - values)
    return ((values - 1 - MEAN) ** 2).mean(1)


def run(seeds: Sequence[int] = range(16), windows: int = 400, *, quiet: bool = False) -> dict[str, Result]:
    """Learn the discount one and eight updates ahead, and the trace decay."""
    results = {
        f"discount, {k} ahead": Result(learn("discount", seeds, windows, k, 0.3, quiet=quiet), best_discount(k))
        for k in (1, 8)
    }
    decays = learn("trace_decay", seeds, windows, 1, 1.0, quiet=quiet)
    return results | {"trace decay, 1 ahead": Result(decays, best_trace_decay())}


def table(results: dict[str, Result]) -> str:
    """What was learned, the mean and the deviation over seeds of the last quarter's mean, and what is known."""
    lines = [f"{'':24s}{'learned':>16s}{'known':>8s}"]
    for name, result in results.items():
        last = result.learned[:, -result.learned.shape[1] // 4 :].mean(1)
        lines.append(f"{name:24s}{f'{last.mean():.3f} +- {last.std():.3f}':>16s}{result.known:8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(run()))
    grid = torch.linspace(0, 1, 101)
    best = grid[errors(grid).argmin()]
    print(f"best of a grid, in the long run: {best:.2f}; known: {best_discount(float('inf')):.3f}")
