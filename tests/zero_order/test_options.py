import math

import pytest
import torch
from torch.func import grad, vmap

from diffopt import random
from diffopt.zero_order import (
    gaussian,
    noise,
    orthogonal,
    smoothed,
)
from zero_order.smoothings import SIGMA, X, f64, quadratic

KEY = random.key(3)


def holes(x):
    return torch.where(x[0] > 0.6, torch.nan, 1.0) * (x * x).sum()


def test_nan_policies():
    assert smoothed(holes, SIGMA, 20)(KEY, X).isnan()
    with pytest.raises(FloatingPointError, match="smaller sigma"):
        smoothed(holes, SIGMA, 20, nan="raise")(KEY, X)
    u = noise(KEY, 3, 10, dtype=torch.float64)
    fine = (X[0] + SIGMA * u[:, 0].abs()) <= 0.6
    assert 0 < fine.sum() < 10
    for options in ({}, {"chunk_size": 6}):
        F = smoothed(holes, SIGMA, 20, nan="drop", **options)
        sides = [((X + s * SIGMA * u[fine]) ** 2).sum(1) for s in (1, -1)]
        torch.testing.assert_close(F(KEY, X), (sides[0] + sides[1]).mean() / 2)
        expected = ((sides[0] - sides[1])[:, None] * u[fine]).mean(0) / (2 * SIGMA)
        torch.testing.assert_close(grad(F, argnums=1)(KEY, X), expected)
    assert smoothed(lambda x: x.sum() * torch.inf, SIGMA, 4, nan="drop")(KEY, X).isnan()
    assert smoothed(quadratic, SIGMA, 4, nan="raise")(KEY, X) == smoothed(quadratic, SIGMA, 4)(KEY, X)


BAD = {
    "sigma 0": (ValueError, "positive", {"sigma": 0.0}),
    "sigma negative": (ValueError, "positive", {"sigma": -1}),
    "sigma infinite": (ValueError, "finite", {"sigma": math.inf}),
    "sigma a string": (TypeError, "number", {"sigma": "small"}),
    "sigma an int tensor": (TypeError, "floating-point", {"sigma": torch.tensor(1)}),
    "odd": (ValueError, "even; got 3", {"num_samples": 3}),
    "odd start": (ValueError, "even", {"start": 1}),
    "none": (ValueError, "at least 1", {"num_samples": 0}),
    "float samples": (TypeError, "an int", {"num_samples": 4.0}),
    "chunk 0": (ValueError, "chunk_size", {"chunk_size": 0}),
    "method": (ValueError, "antithetic", {"method": "central"}),
    "batching": (ValueError, "batched", {"batching": "loop"}),
    "nan": (ValueError, "propagate", {"nan": "ignore"}),
    "value": (ValueError, "smoothed", {"value": "g"}),
    "baseline": (ValueError, "leave_one_out", {"baseline": "mean"}),
    "sampler": (TypeError, r"gaussian\(\)", {"sampler": gaussian}),
    "clip": (ValueError, "positive", {"clip": -1.0}),
    "clip and sign": (ValueError, "one of them", {"clip": 1.0, "sign": True}),
    "leave one out of one": (ValueError, "two directions", {"num_samples": 2, "baseline": "leave_one_out"}),
    "leave one out, orthogonal": (
        ValueError,
        "independent directions",
        {"sampler": orthogonal(), "baseline": "leave_one_out"},
    ),
    "leave one out, forward": (ValueError, "as its baseline", {"method": "forward", "baseline": "leave_one_out"}),
}


@pytest.mark.parametrize(("error", "match", "options"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_at_once(error, match, options):
    with pytest.raises(error, match=match):
        smoothed(quadratic, **{"sigma": SIGMA, "num_samples": 4, **options})


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "must be floating-point to be perturbed", lambda F: F(KEY, torch.tensor([1, 2, 3]))),
        (TypeError, "must be floating-point to be perturbed", lambda F: F(KEY, X > 0)),
        (TypeError, "must be floating-point to be perturbed", lambda F: F(KEY, X.to(torch.complex128))),
        (TypeError, "must be a tensor", lambda F: F(KEY, [1.0])),
        (TypeError, "random.key", lambda F: F(3, X)),
        (ValueError, "argnums", lambda F: F(KEY)),
        (TypeError, "real numbers", lambda F: smoothed(lambda x: x * 1j, SIGMA, 2)(KEY, X)),
        (TypeError, "got nothing", lambda F: smoothed(lambda x: None, SIGMA, 2)(KEY, X)),
        (ValueError, "different arguments", lambda F: smoothed(torch.add, SIGMA, 2, argnums=(0, -2))(KEY, X, X)),
        (
            ValueError,
            "one value for each of the 2",
            lambda F: smoothed(torch.sum, SIGMA, 2, batching="batched")(KEY, X),
        ),
        (ValueError, "must be positive", lambda F: smoothed(quadratic, f64(-0.1), 2)(KEY, X)),
        (ValueError, "must be positive", lambda F: vmap(lambda s: smoothed(quadratic, s, 2)(KEY, X))(f64(0.1, 0.0))),
        (ValueError, "does not expand", lambda F: smoothed(quadratic, f64(0.1, 0.2), 2)(KEY, X)),
        (ValueError, "structure", lambda F: smoothed(quadratic, {"a": 0.1}, 2)(KEY, X)),
    ],
)
def test_bad_calls_are_refused(error, match, call):
    with pytest.raises(error, match=match):
        call(smoothed(quadratic, SIGMA, 2))
