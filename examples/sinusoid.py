"""Sinusoid regression (Finn, Abbeel and Levine 2017): six ways to learn to learn, against a pre-trained network.

A task is one wave y = A sin(x - p), its amplitude A in [0.1, 5] and its phase p in [0, pi]. A network of two hidden
layers of 40 sees 5 or 10 points of it, x in [-5, 5], takes a gradient step of rate 0.01, and should then know the wave.

    maml      min_theta E L_query(theta - a grad L_support(theta))
    fomaml    the same, its inner gradient a constant
    anil      the same, only the last layer adapts
    meta_sgd  the same, with a learned rate for each weight
    reptile   theta moves towards where steps on a task lead
    imaml     min_theta E L_query(argmin_phi L_support(phi) + s/2 |phi - theta|^2)
    plain     min_theta E L(theta), the pre-trained net: no inner step

All train with Adam on batches of 25 tasks, for all seeds at once: the whole outer step is one compiled program. What is
tested is the running average of its iterates, on new waves. There the pre-trained net, which is shown all 20 points of
each of its waves, steps at the best rate of a grid on the test waves themselves, in its favour; the others take the
rate of their training, and iMAML the steps of its own minimization, by L-BFGS.

Run it: python examples/sinusoid.py --shots 5 --method maml --iterations 70000 [--folder CHECKPOINTS]
The figures of all methods are in examples/results/sinusoid.json; a run adds its own to them.
"""

import argparse
import functools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from tqdm import tqdm

import diffopt
from diffopt import random, tree
from diffopt.implicit import Implicit
from diffopt.linalg import CG, ConvergenceWarning
from diffopt.meta import adapt, adapt_proximal, anil, fomaml, imaml, maml, meta_sgd, reptile
from diffopt.solvers import LBFGS
from diffopt.transforms import GradientTransformation
from diffopt.typing import Tree

FIGURES = Path(__file__).parent / "results" / "sinusoid.json"
NETWORKS = FIGURES.with_suffix(".pt")
TASKS, QUERIES, INNER_RATE, BLOCK = 25, 10, 0.01, 500
OUTER, AVERAGE = diffopt.adam(0.001), 0.999
RATES = (0.0003, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
METHODS = ("plain", "maml", "fomaml", "anil", "meta_sgd", "reptile", "imaml")
HEAD = [False, False, True]
PROXIMAL = {"strength": 0.5, "solver": LBFGS(), "throw": False}


class Waves(NamedTuple):
    """Points of waves: x and y, each (..., points, 1)."""

    x: Tensor
    y: Tensor


def draw_tasks(key: Tensor, count: int, shots: int, queries: int = QUERIES) -> tuple[Waves, Waves]:
    """Draw waves, and points of each to adapt to and others to judge by."""
    of_waves, of_points = random.split(key)
    amplitude, phase = random.uniform(of_waves, (2, count, 1, 1))
    x = 10 * random.uniform(of_points, (count, shots + queries, 1)) - 5
    y = (0.1 + 4.9 * amplitude) * torch.sin(x - torch.pi * phase)
    return Waves(x[:, :shots], y[:, :shots]), Waves(x[:, shots:], y[:, shots:])


def init_params(key: Tensor, width: int = 40) -> list[dict[str, Tensor]]:
    """A network 1 - width - width - 1, of weights that the inner rate can move, its kinks spread out."""
    sizes = {(1, width): 0.3, (width, width): 0.2, (width, 1): 0.1}
    *keys, at = random.split(key, 4)
    weights = [std * random.normal(k, size) for k, (size, std) in zip(keys, sizes.items(), strict=True)]
    layers = [{"weight": weight, "bias": torch.zeros(weight.shape[1])} for weight in weights]
    layers[0]["bias"] = weights[0][0] * (10 * random.uniform(at, (width,)) - 5)
    return layers


def network(params: Tree, x: Tensor) -> Tensor:
    """Values (n, 1) at points (n, 1)."""
    for layer in params[:-1]:
        x = torch.relu(x @ layer["weight"] + layer["bias"])
    return x @ params[-1]["weight"] + params[-1]["bias"]


def loss(params: Tree, points: Waves) -> Tensor:
    """The mean squared error."""
    return ((network(params, points.x) - points.y) ** 2).mean()


def start(method: str, key: Tensor) -> Tree:
    """What a method learns: where to start, and the rates of Meta-SGD."""
    params = init_params(key)
    rates = tree.map(lambda p: torch.full_like(p, INNER_RATE), params) if method == "meta_sgd" else []
    return {"params": params, "rates": rates}


def objective(method: str) -> Callable[[Tree, tuple[Waves, Waves]], Tensor]:
    """The meta-loss of a method, a function of what it learns and of tasks."""
    sgd = diffopt.sgd(INNER_RATE)
    of_params = {
        "plain": lambda params, tasks: loss(params, both(tasks)),
        "maml": maml(loss, sgd, 1),
        "fomaml": fomaml(loss, sgd, 1),
        "anil": anil(loss, sgd, 1, HEAD),
        "imaml": imaml(loss, **PROXIMAL, adjoint=Implicit(CG(max_steps=5)), max_steps=10),
    }
    if method == "meta_sgd":
        return lambda values, tasks: maml(loss, meta_sgd(values["rates"]), 1)(values["params"], tasks)
    return lambda values, tasks: of_params[method](values["params"], tasks)


def meta_gradient(method: str) -> Callable[[Tree, tuple[Waves, Waves]], Tree]:
    """The direction that the outer optimizer is given, a tree like what the method learns."""
    if method == "reptile":
        moves = reptile(loss, diffopt.sgd(2 * INNER_RATE), 5)
        return lambda values, tasks: {"params": moves(values["params"], both(tasks)), "rates": []}
    slope = diffopt.grad(objective(method))
    return without_warnings(slope) if method == "imaml" else slope


def without_warnings(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """Do not say that five steps of CG, which are those of the paper, leave the linear system unsolved."""

    @functools.wraps(function)
    def silent(*args: Tree) -> Tree:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return function(*args)

    return silent


def both(tasks: tuple[Waves, Waves]) -> Waves:
    """All points of tasks, for the methods that do not tell the two kinds apart."""
    return Waves(*(torch.cat(parts, -2) for parts in zip(*tasks, strict=True)))


class Progress(NamedTuple):
    """What training goes on from: the learned values and Adam's state, for each seed, and the values' average."""

    values: Tree
    state: Tree
    average: Tree
    iteration: Tensor


def begin(method: str, seeds: Sequence[int]) -> Progress:
    """The progress before the first step."""
    values = vmap(functools.partial(start, method))(torch.stack([random.key(seed) for seed in seeds]))
    values = tree.map(torch.clone, tree.map(Tensor.contiguous, values))
    return Progress(values, OUTER.init(values), values, torch.tensor(0))


def outer_step(method: str) -> Callable[[Progress, tuple[Waves, Waves]], Progress]:
    """One step of Adam on the meta-gradient and of the running average of its iterates, for all seeds at once."""
    slopes = vmap(meta_gradient(method))

    def advance(progress: Progress, tasks: tuple[Waves, Waves]) -> Progress:
        values, state = diffopt.step(OUTER, slopes(progress.values, tasks), progress.state, progress.values)
        share = torch.clamp(1 / (1 + progress.iteration), min=1 - AVERAGE)
        average = tree.map(lambda old, new: old + share * (new - old), progress.average, values)
        return Progress(values, state, average, progress.iteration + 1)

    return advance


def advance_block(advance: Callable, progress: Progress, seeds: Sequence[int], shots: int) -> Progress:
    """So many outer steps on fresh tasks, all drawn beforehand, which is quicker."""
    block = int(progress.iteration) // BLOCK
    keys = torch.stack([random.fold_in(random.split(random.key(seed), 2)[1], block) for seed in seeds])
    drawn = vmap(functools.partial(draw_tasks, count=BLOCK * TASKS, shots=shots))(keys)
    drawn = tree.map(lambda x: x.unflatten(1, (BLOCK, TASKS)).transpose(0, 1).contiguous(), drawn)
    for i in range(BLOCK):
        progress = advance(progress, tree.map(lambda x, i=i: x[i], drawn))
    return progress


def errors(values: Tree, tasks: tuple[Waves, Waves], optimizer: GradientTransformation, steps: int = 10) -> Tensor:
    """The mean squared error after 0, 1, 2, ... steps on each task, the mean over tasks, (steps + 1,)."""

    def of_task(task: tuple[Waves, Waves]) -> Tensor:
        params, path = values["params"], []
        for _ in range(steps):
            path.append(loss(params, task[1]))
            params = adapt(loss, params, task[0], optimizer, 1).params
        return torch.stack([*path, loss(params, task[1])])

    return vmap(of_task)(tasks).mean(0)


def minimization_errors(values: Tree, tasks: tuple[Waves, Waves], steps: int = 10) -> Tensor:
    """The mean squared error after 0, 1, 2, ... steps of iMAML's own minimization, the mean over tasks."""

    def of_task(task: tuple[Waves, Waves]) -> Tensor:
        start = values["params"]
        ends = [adapt_proximal(loss, start, task[0], **PROXIMAL, max_steps=k) for k in range(1, steps + 1)]
        return torch.stack([loss(params, task[1]) for params in (start, *ends)])

    return vmap(of_task)(tasks).mean(0)


def judge(method: str, values: Tree, seeds: Sequence[int], shots: int, count: int = 600) -> Tensor:
    """The errors after 0 to 10 steps on 600 new waves, at 100 points of each, (seeds, 11)."""
    keys = torch.stack([random.fold_in(random.key(seed), 1000) for seed in seeds])
    tasks = vmap(functools.partial(draw_tasks, count=count, shots=shots, queries=100))(keys)
    if method == "meta_sgd":
        return vmap(lambda v, t: errors(v, t, meta_sgd(v["rates"])))(values, tasks)
    if method == "imaml":
        return vmap(minimization_errors)(values, tasks)
    rates = RATES if method == "plain" else (INNER_RATE,)
    found = torch.stack([vmap(lambda v, t, r=r: errors(v, t, diffopt.sgd(r)))(values, tasks) for r in rates])
    return found[found[:, :, 1].argmin(0), torch.arange(len(seeds))]


def train(
    method: str, shots: int, iterations: int, seeds: Sequence[int] = (0, 1, 2), *,
    folder: Path | None = None, every: int = 5000, compiled: bool = True, quiet: bool = False,
) -> tuple[Tree, dict[str, list]]:  # fmt: skip
    """Train one method, for all seeds at once; where there is a folder, go on from the checkpoint in it.

    Returns the averages of the learned values, and the errors after so many iterations and 0 to 10 inner steps.
    """
    advance, progress, record = outer_step(method), begin(method, seeds), {"iterations": [], "errors": []}
    advance = diffopt.compile(advance) if compiled else advance
    drawn = 10 if method == "plain" else shots
    place = None if folder is None else folder / f"{method}_{shots}.pt"
    if place is not None and place.exists():
        progress, record = torch.load(place, weights_only=False)
    bar = tqdm(total=iterations, initial=int(progress.iteration), desc=f"{method}, {shots} shots", disable=quiet)
    while progress.iteration < iterations:
        progress = advance_block(advance, progress, seeds, drawn)
        bar.update(BLOCK)
        if progress.iteration % every == 0 or progress.iteration >= iterations:
            record["iterations"].append(int(progress.iteration))
            record["errors"].append(judge(method, progress.average, seeds, shots).tolist())
            if place is not None:
                torch.save((progress, record), place)
    return progress.average, record


def store(method: str, shots: int, values: Tree, record: dict[str, list]) -> None:
    """Put the figures of a run, and the network of its first seed, beside those of the others."""
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    rounded = [[[round(value, 4) for value in row] for row in rows] for rows in record["errors"]]
    figures.setdefault(f"{shots} shots", {})[method] = {"iterations": record["iterations"], "errors": rounded}
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(figures, sort_keys=True) + "\n")
    if method in ("maml", "plain"):
        networks = torch.load(NETWORKS) if NETWORKS.exists() else {}
        networks[f"{method}, {shots} shots"] = tree.map(lambda x: x[0].clone(), values["params"])
        torch.save(networks, NETWORKS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Learn waves from few points.")
    parser.add_argument("--method", choices=METHODS, default="maml")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=70000)
    parser.add_argument("--folder", type=Path, help="where checkpoints go, to be gone on from")
    args = parser.parse_args()
    values, record = train(
        args.method, args.shots, args.iterations, folder=args.folder, compiled=args.method != "imaml"
    )
    store(args.method, args.shots, values, record)
    for iteration, rows in zip(record["iterations"], record["errors"], strict=True):
        ends = "  ".join(f"{row[0]:.2f} {row[1]:.2f} {row[10]:.2f}" for row in rows)
        print(f"{iteration:6d} iterations: error after 0, 1 and 10 steps, by seed: {ends}")
