"""Few-shot learning of new characters: MAML on classes that training never saw, against a plain loop.

Training draws tasks from 200 characters of an invented script (strokes.py), testing from 100 others. A task shows 1 or
5 examples each of 5 characters; a conv net with group norm takes three gradient steps on them and names new examples.
MAML learns where the steps start, so that they suffice:

    min_theta  E_task L_query(theta_3),   theta_(k+1) = theta_k - a grad L_support(theta_k)

`diffopt.meta.maml` runs all tasks of a batch at once. The reference is what one writes by hand: a loop over tasks,
`torch.autograd.grad(..., create_graph=True)` for the steps, `backward` and `torch.optim.Adam`; the same start, the same
tasks, the same rates. The same network without a learned start, and the nearest support image, say what the task is
worth.

Run it: python examples/few_shot_strokes.py --shots 1
The figures are in examples/results/few_shot_strokes.json; a run replaces its own.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from strokes import Tasks, draw_script, draw_tasks
from torch import Tensor
from torch.func import vmap
from torch.nn.functional import conv2d, cross_entropy, group_norm
from tqdm import tqdm

import diffopt
from diffopt import random, tree
from diffopt.meta import adapt, maml
from diffopt.typing import Tree

RESULTS = Path(__file__).parent / "results" / "few_shot_strokes.json"
WAYS, TASKS, INNER_STEPS, INNER_RATE, OUTER_RATE, HELD_OUT = 5, 4, 3, 0.2, 0.003, 100


class Labelled(NamedTuple):
    """Images (..., n, 1, size, size) and their labels (..., n)."""

    images: Tensor
    labels: Tensor


class Result(NamedTuple):
    """The query losses in training, (iterations,), and accuracy on unseen classes after 0, 1, 2, ... inner steps."""

    losses: Tensor
    accuracy: Tensor
    seconds: float


def init_params(key: Tensor, width: int = 16) -> list[dict[str, Tensor]]:
    """Three blocks of stride 2, He-initialized, and a last layer of zeros."""
    sizes = [(width, channels, 3, 3) for channels in (1, width, width)]
    weights = [random.normal(k, s) * (2 / (9 * s[1])) ** 0.5 for k, s in zip(random.split(key, 3), sizes, strict=True)]
    blocks = [{"weight": w, "scale": torch.ones(width), "shift": torch.zeros(width)} for w in weights]
    return [*blocks, {"weight": torch.zeros(WAYS, 9 * width), "bias": torch.zeros(WAYS)}]


def network(params: Tree, images: Tensor) -> Tensor:
    """Logits (n, ways) of images (n, 1, 20, 20)."""
    x = images
    for block in params[:-1]:
        x = conv2d(x, block["weight"], stride=2, padding=1)
        x = torch.relu(group_norm(x, 4, block["scale"], block["shift"]))
    return x.flatten(1) @ params[-1]["weight"].T + params[-1]["bias"]


def loss(params: Tree, data: Labelled) -> Tensor:
    """The cross-entropy of the network."""
    return cross_entropy(network(params, data.images), data.labels)


def halves(tasks: Tasks) -> tuple[Labelled, Labelled]:
    """Support and query."""
    return Labelled(tasks.support, tasks.support_labels), Labelled(tasks.query, tasks.query_labels)


def train(params: Tree, batches: Iterator[tuple[Labelled, Labelled]]) -> tuple[Tree, list[float]]:
    """MAML by `diffopt.meta`."""
    gradient = diffopt.value_and_grad(maml(loss, diffopt.sgd(INNER_RATE), INNER_STEPS))
    outer, losses = diffopt.adam(OUTER_RATE), []
    state = outer.init(params)
    for tasks in batches:
        value, slope = gradient(params, tasks)
        params, state = diffopt.step(outer, slope, state, params)
        losses.append(value.item())
    return params, losses


def reference_loss(params: Tree, support: Labelled, query: Labelled) -> Tensor:
    """The query loss of one task, as one writes it by hand."""
    for _ in range(INNER_STEPS):
        leaves = tree.leaves(params)
        slopes = torch.autograd.grad(loss(params, support), leaves, create_graph=True)
        moved = [p - INNER_RATE * g for p, g in zip(leaves, slopes, strict=True)]
        params = tree.unflatten(tree.flatten(params)[1], moved)
    return loss(params, query)


def train_reference(params: Tree, batches: Iterator[tuple[Labelled, Labelled]]) -> tuple[Tree, list[float]]:
    """MAML by a plain loop over tasks."""
    params = tree.map(lambda p: p.clone().requires_grad_(), params)
    outer, losses = torch.optim.Adam(tree.leaves(params), OUTER_RATE), []
    for support, query in batches:
        outer.zero_grad()
        each = [
            reference_loss(params, tree.map(lambda x, i=i: x[i], support), tree.map(lambda x, i=i: x[i], query))
            for i in range(len(support.labels))
        ]
        value = torch.stack(each).mean()
        value.backward()
        outer.step()
        losses.append(value.item())
    return tree.map(Tensor.detach, params), losses


def accuracy(params: Tree, tasks: Tasks, steps: int = INNER_STEPS) -> Tensor:
    """The mean accuracy on query images after 0, 1, 2, ... inner steps, (steps + 1,)."""

    def of_task(support: Labelled, query: Labelled) -> Tensor:
        moved, hits = params, []
        for k in range(steps + 1):
            moved = adapt(loss, moved, support, diffopt.sgd(INNER_RATE), 1).params if k else moved
            hits.append((network(moved, query.images).argmax(-1) == query.labels).float().mean())
        return torch.stack(hits)

    return vmap(of_task, chunk_size=20)(*halves(tasks)).mean(0)


def nearest_accuracy(tasks: Tasks) -> float:
    """The accuracy of the label of the support image with the nearest pixels."""
    distances = torch.cdist(tasks.query.flatten(2), tasks.support.flatten(2))
    found = tasks.support_labels.gather(1, distances.argmin(-1))
    return (found == tasks.query_labels).float().mean().item()


def run(
    shots: int, iterations: int = 400, seed: int = 0, *, test_tasks: int = 500, quiet: bool = False
) -> tuple[dict[str, Result], dict[str, float]]:
    """Train both from the same start on the same tasks; also the accuracies of an untrained start and of pixels."""
    script, init, training, testing = random.split(random.key(seed), 4)
    images = draw_script(script)
    params = init_params(init)
    test = draw_tasks(testing, images[-HELD_OUT:], test_tasks, shots, queries=10)

    def batches(name: str) -> Iterator[tuple[Labelled, Labelled]]:
        for key in tqdm(random.split(training, iterations), desc=f"{shots} shots: {name}", disable=quiet):
            yield halves(draw_tasks(key, images[:-HELD_OUT], TASKS, shots))

    def result(name: str, train: Callable) -> Result:
        begin = time.perf_counter()
        learned, losses = train(params, batches(name))
        seconds = time.perf_counter() - begin
        return Result(torch.tensor(losses), accuracy(learned, test), seconds)

    results = {"diffopt": result("diffopt", train), "plain loop": result("plain loop", train_reference)}
    untrained = accuracy(params, test)[-1].item()
    return results, {"untrained start": untrained, "nearest image": nearest_accuracy(test)}


def store(shots: int, seed: int, results: dict[str, Result], others: dict[str, float]) -> None:
    """Put the figures of a run beside those of the others."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rounded = {
        name: {
            "accuracy": [round(value, 4) for value in r.accuracy.tolist()],
            "losses": [round(value, 3) for value in r.losses.tolist()],
        }
        for name, r in results.items()
    }
    stored[f"{shots} shots, seed {seed}"] = rounded | {name: round(value, 4) for name, value in others.items()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(stored, indent=None, sort_keys=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Learn new characters from few examples.")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results, others = run(args.shots, args.iterations, args.seed)
    store(args.shots, args.seed, results, others)
    for name, r in results.items():
        print(f"{name}: accuracy (%) after 0, 1, 2, ... steps {(100 * r.accuracy).numpy().round(1)}, {r.seconds:.0f} s")
    print(", ".join(f"{name}: {100 * value:.1f} %" for name, value in others.items()))
