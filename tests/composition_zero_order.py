"""Rows of the composition matrix: the noise of zero-order methods, and estimators."""

import torch

from diffopt import random
from diffopt.zero_order import accumulate, gaussian, noise, orthogonal, perturb, score_function, smoothed

__all__ = ["ZERO_ORDER_ROWS"]

KEY = random.key(5)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def perturb_row(scale):
    """A perturbed vector, through a nonlinear function of it."""
    member = noise(KEY, 3, 1, start=4, dtype=torch.float64)[0]
    return (
        lambda x, sigma: torch.tanh(perturb(KEY, x, sigma, 4)),
        (f64(0.5, -0.4, 0.8), scale),
        lambda x, sigma: torch.tanh(x + sigma * member),
        None,
    )


def accumulate_row():
    """A weighted sum of noises, through a nonlinear function of it."""
    members = noise(KEY, 3, 2, start=4, dtype=torch.float64)
    return (
        lambda weights: torch.tanh(accumulate(KEY, weights, 3, start=4)),
        (f64(0.5, -0.4),),
        lambda weights: torch.tanh(weights @ members),
        None,
    )


# the derivative of an estimator is an estimate: that of its value with the same noise is another
NOT_THE_DIFFERENCE = dict.fromkeys(("gradcheck", "gradgradcheck"), "Jacobian mismatch")


def shaken(x, a):
    return torch.tanh((x * f64(0.8, -0.5, 0.3)).sum() + a * x[0]) + a * (x**2).sum()


def smoothed_row(sampler=None, baseline=None, **options):
    """A smoothed function, in x, another argument and sigma, against likelihood ratios of the same members."""
    sampler = gaussian() if sampler is None else sampler
    directions = sampler.draw(KEY, [(3,)], 3, 0, torch.float64)

    def estimate(x, a, sigma):
        return smoothed(shaken, sigma, 6, sampler=sampler, baseline=baseline, **options)(KEY, x, a)

    def reference(x, a, sigma):
        total = 0.0
        pairs = [[x.detach() + s * sigma.detach() * u for s in (1, -1)] for u in directions]
        values = [[shaken(point, a) for point in pair] for pair in pairs]
        for i, pair in enumerate(pairs):
            for point, value in zip(pair, values[i], strict=True):
                log = -(((point - x) / sigma) ** 2).sum() / 2 - 3 * sigma.log()
                others = [v.detach() for j, both in enumerate(values) for v in both if j != i]
                base = 0.0 if baseline is None else sum(others) / len(others)
                total = total + (value - base) * (log - log.detach()).exp() + base
        return total / 6

    return estimate, (f64(0.5, -0.4, 0.8), f64(0.7)[0], f64(0.4)[0]), reference, NOT_THE_DIFFERENCE


def score_function_row():
    """The expected cost of a few coins, against the likelihood ratio of each sample, written out."""
    coins, costs = f64(1.0, 0.0, 0.0, 1.0), f64(0.3, -0.4, 0.8, 0.5)

    def log_prob(logit):
        return coins * logit - torch.nn.functional.softplus(logit)

    def estimate(logit, scale):
        return score_function(log_prob(logit), scale**2 * costs)

    def reference(logit, scale):
        chance = torch.sigmoid(logit)
        of_each = coins * chance + (1 - coins) * (1 - chance)
        return (of_each / of_each.detach() * scale**2 * costs).mean()

    return estimate, (f64(0.4)[0], f64(0.9)[0]), reference, NOT_THE_DIFFERENCE


ZERO_ORDER_ROWS = {
    "smoothed": smoothed_row,
    "smoothed, chunks": lambda: smoothed_row(chunk_size=2),
    "smoothed, leave one out": lambda: smoothed_row(baseline="leave_one_out"),
    "smoothed, orthogonal": lambda: smoothed_row(orthogonal()),
    "smoothed, sequential": lambda: smoothed_row(batching="sequential"),
    "score_function": score_function_row,
    "perturb": lambda: perturb_row(f64(0.3)[0]),
    "perturb, sigma of each element": lambda: perturb_row(f64(0.3, 0.2, 0.7)),
    "accumulate": accumulate_row,
}
