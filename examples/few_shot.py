"""Few-shot adaptation by unrolled differentiation: an initialization from which three gradient steps suffice.

A task shows digits in a way of its own, one of 16 (turned, mirrored, inverted), and gives the ten classes names of
its own. From one example a class, a small network has to name new images. MAML differentiates the loss after the
inner steps with respect to where they start, and to their learning rate a:

    min_(theta, a)  E_task L_query(theta_3),   theta_(k+1) = theta_k - a grad L_support(theta_k)

Test tasks are made of images that training never saw. The rival is the usual way to start: the same network trained
for as many steps on the true labels of the same images in the same 16 views, then given a new head and the same
inner steps. In its favour the head starts from zero (a random one did worse by 20 points) and its inner learning
rate is the best one on the test tasks themselves. Its features know the digits; MAML's also know how they will be
used. `vmap` runs all tasks and all seeds at once.

Run it: python examples/few_shot.py
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from digit_tasks import Tasks, batches, draw_tasks, split
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from diffopt import random, tree
from diffopt.meta import adapt, maml
from diffopt.optimizers import adam, sgd
from diffopt.transforms import step
from diffopt.typing import Tree

INNER_STEPS, TASKS = 3, 16
RATES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.4)


class Result(NamedTuple):
    """Accuracy on unseen tasks after each inner step, (seeds, steps + 1), and the meta-loss, (seeds, steps)."""

    maml: Tensor
    baseline: Tensor
    losses: Tensor


def init_params(key: Tensor, width: int = 64) -> list[dict[str, Tensor]]:
    """A network 64 - width - width - 10, He-initialized."""
    sizes = [(64, width), (width, width), (width, 10)]
    weights = [random.normal(k, s) * (2 / s[0]) ** 0.5 for k, s in zip(random.split(key, 3), sizes, strict=True)]
    return [{"weight": weight, "bias": torch.zeros(weight.shape[1])} for weight in weights]


def network(params: Tree, x: Tensor) -> Tensor:
    """Logits (n, 10) of images (n, 64)."""
    for layer in params[:-1]:
        x = torch.relu(x @ layer["weight"] + layer["bias"])
    return x @ params[-1]["weight"] + params[-1]["bias"]


def loss(params: Tree, labeled: tuple[Tensor, Tensor]) -> Tensor:
    """The cross-entropy of the network on images and labels."""
    return cross_entropy(network(params, labeled[0]), labeled[1])


def maml_loss(meta: Tree, tasks: Tasks) -> Tensor:
    """The mean query loss after adaptation."""
    support, query = (tasks.support, tasks.support_names), (tasks.query, tasks.query_names)
    return maml(loss, sgd(meta["log_rate"].exp()), INNER_STEPS)(meta["params"], (support, query))


def pretraining_loss(params: Tree, tasks: Tasks) -> Tensor:
    """The loss on the true labels of the same images in the same views."""
    return loss(params, (tasks.query.flatten(0, 1), tasks.query_labels.flatten()))


def accuracy(params: Tree, rate: Tensor, tasks: Tasks, steps: int) -> Tensor:
    """The mean accuracy on query images before and after each inner step, (steps + 1,)."""

    def of_task(task):
        path, data = [params], (task.support, task.support_names)
        for _ in range(steps):
            path.append(adapt(loss, path[-1], data, sgd(rate), 1).params)
        return torch.stack([(network(p, task.query).argmax(-1) == task.query_names).float().mean() for p in path])

    return vmap(of_task)(tasks).mean(0)


def optimize(
    objective: Callable[[Tree, Tasks], Tensor], values: Tree, tasks: Iterator[Tasks], steps: int, bar: Callable
) -> tuple[Tree, Tensor]:
    """Minimize an objective of (values, tasks) for all seeds at once; also returns the losses, (seeds, steps)."""
    optimizer = adam(lambda count: 0.03 * (1 - count / steps), eps_root=1e-16)
    state = optimizer.init(values)
    losses = []
    for batch in bar(itertools.islice(tasks, steps), total=steps):
        grads, value = vmap(grad_and_value(objective))(values, batch)
        values, state = step(optimizer, grads, state, values)
        losses.append(value)
    return values, torch.stack(losses, 1)


def run(seeds: Sequence[int] = (0, 1, 2), steps: int = 400, shown_steps: int = 6, *, quiet: bool = False) -> Result:
    """Train both for several seeds at once and adapt them to 100 unseen tasks."""
    train, test = (torch.stack(parts) for parts in zip(*map(split, seeds), strict=True))
    init_keys, train_keys, test_keys = torch.stack([random.split(random.key(s), 3) for s in seeds]).unbind(1)
    params = vmap(init_params)(init_keys)
    meta = {"params": params, "log_rate": torch.full((len(seeds),), -1.0)}
    bars = [functools.partial(tqdm, disable=quiet, desc=f"few-shot: {name}") for name in ("MAML", "rival")]
    meta, losses = optimize(maml_loss, meta, batches(train_keys, train, TASKS), steps, bars[0])
    pretrained, _ = optimize(pretraining_loss, params, batches(train_keys, train, TASKS), steps, bars[1])
    pretrained = [*pretrained[:-1], tree.zeros_like(pretrained[-1])]
    tasks = vmap(functools.partial(draw_tasks, count=100, queries=10))(test_keys, test)
    evaluate = vmap(functools.partial(accuracy, steps=shown_steps))
    tried = [evaluate(pretrained, torch.full((len(seeds),), rate), tasks) for rate in RATES]
    best = torch.stack(tried)[:, :, INNER_STEPS].argmax(0)
    baseline = torch.stack(tried)[best, torch.arange(len(seeds))]
    return Result(evaluate(meta["params"], meta["log_rate"].exp(), tasks), baseline, losses)


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = run()
    for name, rows in (("MAML", result.maml), ("pre-trained", result.baseline)):
        print(f"{name}: accuracy (%) after 0, 1, 2, ... inner steps, a row a seed")
        print((100 * rows).numpy().round(1))
