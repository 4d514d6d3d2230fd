import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

from diffopt import random
from diffopt.zero_order import (
    coordinate,
    es_grad,
    gaussian,
    guided,
    low_rank,
    noise,
    orthogonal,
    rademacher,
    smoothed,
    sphere,
    spsa_grad,
)
from zero_order.smoothings import SIGMA, SMOOTHINGS, B, H, Ranks, X, check_mean, f64, keys, quadratic, trace_of_variance

KEY = random.key(3)
SAMPLERS = [gaussian(), rademacher(), sphere(), orthogonal(), coordinate(), low_rank(1), guided(torch.eye(3, 1))]
OPTIONS = {
    "antithetic": {},
    "forward": {"method": "forward"},
    "naive": {"method": "naive"},
    "leave one out": {"method": "naive", "baseline": "leave_one_out"},
    "clip": {"clip": 0.3},
    "sign": {"sign": True},
    "sigma of each number": {"sigma": f64(0.3, 0.5, 0.7)},
}


def both(f=quadratic, num_samples=12, x=X, key=KEY, sigma=SIGMA, **options):
    """The gradient of es_grad, and of smoothed."""
    found, _ = es_grad(f, sigma, num_samples, **options)(key, x)
    return found, grad(smoothed(f, sigma, num_samples, **options), argnums=1)(key, x)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_it_is_the_gradient_of_the_smoothed_function(options, chunk_size):
    torch.testing.assert_close(*both(chunk_size=chunk_size, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_it_is_so_with_every_sampler(sampler):
    torch.testing.assert_close(*both(sampler=sampler, chunk_size=6), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SMOOTHINGS)
def test_it_is_unbiased(name):
    f, value = SMOOTHINGS[name]
    g = es_grad(f, SIGMA, 8)
    check_mean(lambda key: g(key, X)[0], grad(value)(X, f64(SIGMA)))
    check_mean(lambda key: g(key, X)[1].loss, value(X, f64(SIGMA)))


@pytest.mark.parametrize("options", [{}, {"method": "naive"}, {"sampler": rademacher()}])
def test_the_variance_of_the_estimate_is_unbiased(options):
    g = es_grad(quadratic, SIGMA, 16, **options)
    found = vmap(lambda key: g(key, X)[1].variance)(keys(2000))
    expected = trace_of_variance(lambda key: g(key, X)[0], count=7000)
    torch.testing.assert_close(found.mean(), expected, rtol=0.06, atol=0)


def test_the_variance_law_and_the_signal_to_noise():
    slope = H @ X + B
    gradient, info = es_grad(quadratic, SIGMA, 20_000, chunk_size=4000)(KEY, X)
    # of 10,000 directions, the squares of whose estimates have a heavy tail: 10% is three standard errors
    torch.testing.assert_close(info.variance, 4 * slope @ slope / 10_000, rtol=0.1, atol=0)
    torch.testing.assert_close(info.signal_to_noise, gradient.norm() / info.variance.sqrt())
    assert es_grad(quadratic, SIGMA, 2)(KEY, X)[1].variance.isnan()  # one direction tells nothing


@settings(max_examples=15, deadline=None)
@given(
    chunk=st.integers(1, 15),
    name=st.sampled_from(sorted(OPTIONS)),
    batching=st.sampled_from(["vmap", "batched", "sequential"]),
)
def test_chunks_and_batching_change_nothing(chunk, name, batching):
    def f(x):
        return (x * x.sin()).sum(-1)

    options = {"sigma": SIGMA, **OPTIONS[name]}
    found = es_grad(f, num_samples=14, chunk_size=chunk, batching=batching, **options)(KEY, X)
    torch.testing.assert_close(found, es_grad(f, num_samples=14, **options)(KEY, X), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_shards_make_the_whole(options):
    options = {"sigma": SIGMA, **options}
    whole = es_grad(quadratic, num_samples=12, **options)(KEY, X)
    ranks = Ranks(3)
    for part in ranks.run(
        lambda r: es_grad(quadratic, num_samples=4, start=4 * r, reduce=ranks.reduce, **options)(KEY, X)
    ):
        torch.testing.assert_close(part, whole, rtol=1e-11, atol=1e-11)


def test_vmap_over_keys_and_points_is_the_loop():
    g = es_grad(lambda x: x.abs().sum(), SIGMA, 8)
    batch, points = keys(3), torch.stack([X, B, X - B])
    mapped = vmap(g)(batch, points)
    for i in range(3):
        expected = g(batch[i], points[i])
        torch.testing.assert_close((mapped[0][i], mapped[1].loss[i]), (expected[0], expected[1].loss))


def test_trees_and_other_arguments():
    def f(x, scale, *, shift):
        return scale * quadratic(torch.cat([x["a"], x["b"]])) + shift

    found, _ = es_grad(f, SIGMA, 12)(KEY, {"a": X[:1], "b": X[1:]}, 2.0, shift=f64(0.3))
    expected = 2 * es_grad(quadratic, SIGMA, 12)(KEY, X)[0]
    torch.testing.assert_close(torch.cat([found["a"], found["b"]]), expected)
    found, _ = es_grad(lambda a, b: a @ b, SIGMA, 12, argnums=(0, 1))(KEY, X, B)
    assert [g.shape for g in found] == [(3,), (3,)]


def test_it_builds_no_graph():
    x, w = X.clone().requires_grad_(), B.clone().requires_grad_()
    for batching in ("vmap", "sequential"):
        found, info = es_grad(lambda x: (w * x).sum(), SIGMA, 4, batching=batching)(KEY, x)
        assert not found.requires_grad
        assert not any(value.requires_grad for value in info)


def test_a_derivative_of_it_raises_under_transforms():
    g = es_grad(lambda x, a: (a * x * x).sum(), SIGMA, 4)
    for outer in (
        lambda: grad(lambda x: g(KEY, x, B)[0].sum())(X),
        lambda: grad(lambda a: g(KEY, X, a)[0].sum())(B),
        lambda: grad(lambda a: g(KEY, X, a)[1].loss)(B),
        lambda: jvp(lambda x: g(KEY, x, B)[0], (X,), (B,)),
        lambda: grad(lambda s: es_grad(quadratic, s, 4)(KEY, X)[0].sum())(f64(0.4)),
        lambda: grad(lambda w: es_grad(lambda x: (w * x).sum(), 0.4, 4)(KEY, X)[0].sum())(B),
    ):
        with pytest.raises(RuntimeError, match="use `smoothed`"):
            outer()


def test_numpy_and_training_inside():
    def f(x):
        w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        ((w - x) ** 2).sum().backward()
        return np.sum(w.grad.numpy() * x.numpy()).item()

    found, _ = es_grad(f, SIGMA, 6, batching="sequential")(KEY, X)
    torch.testing.assert_close(found, es_grad(lambda x: -2 * x @ x, SIGMA, 6)(KEY, X)[0])


def test_nan_policies():
    def holes(x):
        return torch.where(x[0] > 0.6, torch.inf, 1.0) * (x * x).sum()

    assert not es_grad(holes, SIGMA, 20)(KEY, X)[0].isfinite().all()
    with pytest.raises(FloatingPointError, match="drop"):
        es_grad(holes, SIGMA, 20, nan="raise")(KEY, X)
    found, info = es_grad(holes, SIGMA, 20, nan="drop", chunk_size=6)(KEY, X)
    torch.testing.assert_close(found, grad(smoothed(holes, SIGMA, 20, nan="drop"), argnums=1)(KEY, X))
    assert info.loss.isfinite()


def test_memory_does_not_grow_with_the_samples():
    sizes = []

    def f(x):
        sizes.append(x.shape[0])
        return (x * x).sum(1)

    es_grad(f, SIGMA, 100, chunk_size=10, batching="batched")(KEY, torch.ones(50))
    assert sizes == [10] * 10


def test_spsa_is_two_values_and_the_signs():
    count = []

    def f(x):
        count.append(x)
        return (x * x).sum().item()

    found, _ = spsa_grad(f, 0.1, batching="sequential")(KEY, X)
    u = noise(KEY, 3, 1, dtype=torch.float64, distribution="rademacher")[0]
    assert len(count) == 2
    torch.testing.assert_close(found, 2 * (X @ u) * u)


def test_spsa_is_unbiased_and_of_the_published_variance():
    """On a quadratic, n - 1 times the squared norm for each pair."""
    slope = H @ X + B
    check_mean(lambda key: spsa_grad(quadratic, SIGMA, 4)(key, X)[0], slope)
    found = trace_of_variance(lambda key: spsa_grad(quadratic, SIGMA, 4)(key, X)[0])
    torch.testing.assert_close(found, 2 * slope @ slope / 2, rtol=0.05, atol=0)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled(backend):
    g = es_grad(quadratic, SIGMA, 8)
    torch._dynamo.reset()
    found = torch.compile(lambda x: g(KEY, x), backend=backend, fullgraph=True)(X)
    torch.testing.assert_close(found, g(KEY, X))


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "one number; got 3", lambda: es_grad(torch.sin, SIGMA, 4)(KEY, X)),
        (TypeError, "floating-point", lambda: es_grad(torch.sum, SIGMA, 4)(KEY, torch.tensor([1, 2]))),
        (ValueError, "positive", lambda: es_grad(quadratic, -SIGMA, 4)),
        (ValueError, "positive", lambda: es_grad(quadratic, f64(0.0), 4)),
        (ValueError, "finite", lambda: es_grad(quadratic, math.nan, 4)),
        (ValueError, "even; got 5", lambda: es_grad(quadratic, SIGMA, 5)),
        (ValueError, "even; got 1", lambda: spsa_grad(quadratic, SIGMA, 1)),
        (ValueError, "two directions", lambda: es_grad(quadratic, SIGMA, 1, method="naive", baseline="leave_one_out")),
        (TypeError, "key", lambda: es_grad(quadratic, SIGMA, 4)(X, X)),
    ],
)
def test_bad_input_is_refused(error, match, call):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("seed", range(6))
def test_one_direction_has_no_variance(seed):
    _, info = es_grad(lambda x: (x**3).sum(), 0.1, 2)(random.key(seed), torch.tensor([0.3, 1.7, -2.9]))
    assert info.variance.isnan()
    assert info.signal_to_noise.isnan()
