"""Functions whose Gaussian smoothings are known in closed form, and statistics of estimates over many keys."""

import math
import threading
from typing import NamedTuple

import torch
from torch.func import vmap

from diffopt import random

SIGMA = 0.4


def f64(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


X = f64(0.5, -0.4, 0.8)
H = f64([[2.0, 0.3, -0.5], [0.3, 1.0, 0.2], [-0.5, 0.2, 1.5]])
B = f64(0.4, -0.7, 0.9)


class Smoothing(NamedTuple):
    f: object
    value: object
    """The smoothed function of x and sigma, differentiable."""


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def smooth_abs(x, s):
    return x * torch.erf(x / (s * math.sqrt(2))) + s * math.sqrt(2 / math.pi) * (-0.5 * (x / s) ** 2).exp()


def quadratic(x):
    return 0.5 * x @ H @ x + B @ x


SMOOTHINGS = {
    "quadratic": Smoothing(quadratic, lambda x, s: quadratic(x) + 0.5 * s**2 * H.trace()),
    "sin": Smoothing(lambda x: x.sin().sum(), lambda x, s: ((-0.5 * s**2).exp() * x.sin()).sum()),
    "step": Smoothing(lambda x: (x > 0).sum(), lambda x, s: normal_cdf(x / s).sum()),
    "abs": Smoothing(lambda x: x.abs().sum(), lambda x, s: smooth_abs(x, s).sum()),
}


def keys(count, seed=7):
    return random.split(random.key(seed), count)


def check_mean(estimate, exact, count=2000, seed=7):
    """The mean over keys lies within four standard errors of the exact answer, in each entry."""
    found = vmap(estimate)(keys(count, seed)).reshape(count, -1)
    error = found.std(0) / math.sqrt(count)
    # where an estimate is exact its error is rounding
    assert ((found.mean(0) - exact.reshape(-1)).abs() <= 4 * error + 1e-12).all(), (found.mean(0) - exact) / error


def trace_of_variance(estimate, count=20_000, seed=11):
    found = vmap(estimate)(keys(count, seed))
    return found.var(0).sum()


class Ranks:
    """Ranks in threads: `reduce` sums over them, as a collective does."""

    def __init__(self, count):
        self.count, self.barrier, self.parts = count, threading.Barrier(count, timeout=20), [None] * count
        self.local = threading.local()

    def reduce(self, x):
        self.parts[self.local.rank] = x.clone()
        self.barrier.wait()
        total = torch.stack(self.parts).sum(0)
        self.barrier.wait()
        return total

    def run(self, fn):
        """What `fn(rank)` returns on each rank."""
        found, errors = [None] * self.count, []

        def work(rank):
            self.local.rank = rank
            try:
                found[rank] = fn(rank)
            except Exception as error:
                self.barrier.abort()
                errors.append(error)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found
