"""The problem of problems.py as parameters with gradients, for training loops in torch's manner."""

import torch

from diffopt import random, tree
from diffopt.optimizers import adamw, muon, nadam, prodigy, rmsprop, schedule_free, sgd
from diffopt.transforms import add_noise, chain, trace
from optimizers.problems import loss, start

FACTORIES = {
    "adamw": (adamw, {"lr": 0.05}),
    "momentum": (sgd, {"lr": 0.05, "momentum": 0.9}),
    "sgd": (sgd, {"lr": 0.05}),
    "nadam": (nadam, {"lr": 0.05}),
    "muon": (muon, {"lr": 0.05}),
    "prodigy": (prodigy, {"d0": 1e-3}),
    "rmsprop": (rmsprop, {"lr": 0.05}),
    "schedule_free": (schedule_free, {"lr": 0.05}),
    "noise": (chain(add_noise(random.key(0), 0.01), trace(0.9), sgd(0.05)), {}),
}


def parameters(dtype=torch.float64):
    """The leaves of the problem as parameters: b[0], b[1] and w."""
    return [torch.nn.Parameter(leaf) for leaf in tree.leaves(start(dtype))]


def problem(params):
    return loss({"w": params[2], "b": (params[0], params[1])})


def train(optimizer, params, steps, scheduler=None, silent=lambda i, j: False):
    """Step on the problem; `silent` says which parameter has no gradient at which step."""
    for i in range(steps):
        optimizer.zero_grad()
        problem(params).backward()
        for j, p in enumerate(params):
            if silent(i, j):
                p.grad = None
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same(params, others, tolerance=1e-12):
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def clone_of(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]
