"""Kill a training run at random moments, start it again each time, and compare its end with an undisturbed one.

A script, since it forks: python killed_runs.py FOLDER KILLS prints how many kills there were, and of those how many
hit while a file was being written.
"""

import os
import random as chance
import signal
import sys
import time
from pathlib import Path

import torch

from diffopt import random, tree
from diffopt.linalg import CG
from diffopt.multilevel import Edge, Implicit, Level, graph, load, minibatches, train
from diffopt.optimizers import adam

UPDATES, BAD = 120, 50


class Stream:
    """Batches with a position, which draw from torch's own generator as well."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        while self.place < 7:
            self.place += 1
            yield self.place + torch.rand(4, dtype=torch.float64)
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def program():
    levels = {
        "rate": Level(lambda r, w, x: ((w - x) ** 2).mean(), adam(0.03), reads=("weights",)),
        "weights": Level(lambda w, r, x: ((w - x) ** 2).mean() + r.exp() * (w**2).sum(), adam(0.1), reads=("rate",),
                         steps=3),
    }  # fmt: skip
    two = graph(levels, [Edge("rate", "weights", Implicit(CG(max_steps=2)))])
    start = {"rate": torch.tensor(-1.0, dtype=torch.float64), "weights": torch.ones(4, dtype=torch.float64)}
    return two, two.init(random.key(0), start)


def run(file):
    two, state = program()
    data = random.normal(random.key(1), (50, 4), dtype=torch.float64)
    batch = minibatches(random.key(2), data, 5)
    torch.manual_seed(0)
    sources = {"rate": Stream(), "weights": lambda step: batch(step).mean(0) * (torch.nan if step == 3 * BAD else 1)}
    return train(
        two, state, sources, updates=UPDATES, checkpoint=file, resume=True, save_every=4, average={"weights": 0.9},
        on_nan="rollback", validate=lambda t: (t.state.params["weights"] ** 2).sum(), validate_every=5, quiet=True,
    )  # fmt: skip


def started(file):
    """A run in a process of its own."""
    child = os.fork()
    if child == 0:
        run(file)
        os._exit(0)
    return child


def ended(child, seconds):
    """Whether a run ended by itself within a time; else it is killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.WIFEXITED(os.waitpid(child, 0)[1])


def main(folder, kills):
    file, moments, landed, halfway = folder / "run.pt", chance.Random(0), 0, 0
    begin = time.monotonic()
    whole = run(folder / "whole.pt")
    took = time.monotonic() - begin
    while landed < kills:
        if ended(started(file), moments.uniform(0, 2 * took / max(kills, 4))):
            file.unlink()
            continue
        landed += 1
        halfway += (folder / ".run.pt.new").exists()
        if file.exists():
            load(file, whole)
    os.waitpid(started(file), 0)
    found, _ = load(file, whole)
    same = [torch.equal(a, b) for a, b in zip(tree.leaves(found), tree.leaves(whole), strict=True)]
    assert all(same), same
    assert whole.faults == 1
    assert whole.state.updates == UPDATES
    print(landed, halfway)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
