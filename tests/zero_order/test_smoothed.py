import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacrev, vmap
from torch.testing import assert_close

from diffopt import random
from diffopt.zero_order import (
    noise,
    orthogonal,
    rademacher,
    smoothed,
    zero_order,
)
from zero_order.smoothings import SIGMA, SMOOTHINGS, B, H, X, check_mean, f64, keys, quadratic, trace_of_variance

KEY = random.key(3)
ESTIMATORS = {
    "antithetic": {"method": "antithetic"},
    "forward": {"method": "forward"},
    "naive": {"method": "naive"},
    "leave one out": {"method": "naive", "baseline": "leave_one_out"},
    "antithetic, leave one out": {"baseline": "leave_one_out"},
    "orthogonal": {"sampler": orthogonal()},
    "orthogonal, forward": {"sampler": orthogonal(), "method": "forward"},
    "value f": {"value": "f"},
    "chunked": {"chunk_size": 4},
}


def classic(f, key, x, sigma, pairs):
    u = noise(key, x.numel(), pairs, dtype=x.dtype)
    differences = vmap(f)(x + sigma * u) - vmap(f)(x - sigma * u)
    return (differences[:, None] * u).mean(0) / (2 * sigma)


@pytest.mark.parametrize("options", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("name", SMOOTHINGS)
def test_gradient_is_unbiased(name, options):
    f, value = SMOOTHINGS[name]
    F = smoothed(f, SIGMA, 8, **options)
    check_mean(lambda key: grad(F, argnums=1)(key, X), grad(value)(X, f64(SIGMA)))


@pytest.mark.parametrize("options", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("name", ["quadratic", "sin", "step"])
def test_hessian_is_unbiased(name, options):
    f, value = SMOOTHINGS[name]
    F = smoothed(f, SIGMA, 8, **options)
    check_mean(lambda key: hessian(F, argnums=1)(key, X), hessian(value)(X, f64(SIGMA)))


@pytest.mark.parametrize("name", SMOOTHINGS)
def test_value_is_unbiased(name):
    f, value = SMOOTHINGS[name]
    check_mean(lambda key: smoothed(f, SIGMA, 8)(key, X), value(X, f64(SIGMA)))
    assert torch.equal(smoothed(f, SIGMA, 8, value="f")(KEY, X), f(X).to(torch.float64))


@pytest.mark.parametrize("value", ["smoothed", "f"])
@pytest.mark.parametrize("method", ["antithetic", "forward", "naive"])
def test_other_arguments_have_the_mean_of_the_samples_derivatives(method, value):
    """Of a function linear in them and in x: that at x itself, but for the mean of the noise in one sided samples."""
    scale = f64([0.5, -2.0, 3.0])[: X.numel()].requires_grad_()
    F = smoothed(lambda x, a: (x * a * scale).sum(), SIGMA, 8, method=method, value=value)
    members = smoothed(lambda x: x, SIGMA, 8, method=method)(KEY, X)
    a = torch.ones_like(X)
    assert_close(grad(F, argnums=2)(KEY, X, a), members * scale.detach())
    assert_close(torch.autograd.grad(F(KEY, X, a), scale)[0], members)


@pytest.mark.parametrize("options", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("name", ["quadratic", "sin", "abs"])
def test_gradient_of_sigma_is_unbiased(name, options):
    f, value = SMOOTHINGS[name]
    check_mean(
        lambda key: grad(lambda s: smoothed(f, s, 8, **options)(key, X))(f64(SIGMA)), grad(value, 1)(X, f64(SIGMA))
    )


def test_gradient_of_a_sigma_for_each_number_and_each_leaf():
    scales = f64(0.3, 0.5, 0.7)

    def exact(s):
        return quadratic(X) + 0.5 * (s**2 * H.diagonal()).sum()

    check_mean(lambda key: grad(lambda s: smoothed(quadratic, s, 8)(key, X))(scales), grad(exact)(scales))

    def leaves(x):
        return quadratic(torch.cat([x["a"], x["b"]]))

    def by_leaf(s, key):
        return smoothed(leaves, {"a": s[0], "b": s[1]}, 8)(key, {"a": X[:1], "b": X[1:]})

    expected = grad(lambda s: exact(torch.stack([s[0], s[1], s[1]])))(f64(0.3, 0.6))
    check_mean(lambda key: grad(by_leaf)(f64(0.3, 0.6), key), expected)


def test_antithetic_is_the_classic_estimator():
    for f in (quadratic, lambda x: x.abs().sum()):
        found = grad(smoothed(f, 0.3, 20), argnums=1)(KEY, X)
        torch.testing.assert_close(found, classic(f, KEY, X, 0.3, 10), rtol=1e-12, atol=0)


def test_a_small_sigma_loses_no_digits_of_the_directions():
    x = torch.tensor([1000.0, -300.0])
    found = grad(smoothed(lambda x: 3 * x.sum(), 0.5, 2), argnums=1)(KEY, x)
    u = noise(KEY, 2, 1)[0]
    torch.testing.assert_close(found, 3 * u.sum() * u, rtol=1e-3, atol=0)


@pytest.mark.parametrize("x", [X, f64(2.0, -0.3, 0.1)])
def test_variance_of_an_antithetic_pair_on_a_quadratic(x):
    """The trace is (d + 1) |g|^2, for any Hessian and sigma."""
    g = H @ x + B
    found = trace_of_variance(lambda key: grad(smoothed(quadratic, SIGMA, 2), argnums=1)(key, x))
    torch.testing.assert_close(found, 4 * (g @ g), rtol=0.05, atol=0)


def test_baselines_and_controls_lower_the_variance():
    def f(x):
        return quadratic(x) + 10 + 0.1 * x.sin().sum()

    def of(fn=f, **options):
        F = smoothed(fn, SIGMA, 8, **options)
        return trace_of_variance(lambda key: grad(F, argnums=1)(key, X), count=2000).item()

    naive, forward, out = of(method="naive"), of(method="forward"), of(method="naive", baseline="leave_one_out")
    control = of(control=(quadratic, lambda x: SMOOTHINGS["quadratic"].value(x, f64(SIGMA))))
    assert naive > 30 * max(forward, out)
    assert of() > 100 * control
    curved = [
        trace_of_variance(lambda key, b=b: hessian(smoothed(f, SIGMA, 8, baseline=b), argnums=1)(key, X), count=1000)
        for b in (None, "leave_one_out")
    ]
    assert curved[0] > 10 * curved[1]


def test_a_control_variate_keeps_the_mean():
    f, value = SMOOTHINGS["abs"]
    F = smoothed(f, SIGMA, 8, control=(quadratic, lambda x: SMOOTHINGS["quadratic"].value(x, f64(SIGMA))))
    check_mean(lambda key: grad(F, argnums=1)(key, X), grad(value)(X, f64(SIGMA)))
    check_mean(lambda key: F(key, X), value(X, f64(SIGMA)))


def test_other_arguments_get_the_mean_of_the_derivatives():
    def f(x, a, *, b):
        return (a * x.sin()).sum() * b + (x > 0).sum()

    F, (a, b) = smoothed(f, SIGMA, 6), (f64(0.7, -0.4, 0.9), f64(1.3))
    u = noise(KEY, 3, 3, dtype=torch.float64)
    members = torch.cat([X + SIGMA * u, X - SIGMA * u])
    expected = vmap(grad(lambda a, x: f(x, a, b=b)), in_dims=(None, 0))(a, members).mean(0)
    torch.testing.assert_close(grad(lambda a: F(KEY, X, a, b=b))(a), expected)
    torch.testing.assert_close(grad(lambda b: F(KEY, X, a, b=b))(b), (a * members.sin()).sum(1).mean())
    mixed = math.exp(-0.5 * SIGMA**2) * torch.diag(X.cos()) * b
    check_mean(lambda key: jacrev(grad(lambda x, a: F(key, x, a, b=b)), 1)(X, a), mixed)


@settings(max_examples=12, deadline=None)
@given(
    chunk=st.integers(1, 13),
    options=st.sampled_from(sorted(ESTIMATORS)),
    batching=st.sampled_from(["vmap", "batched", "sequential"]),
)
def test_chunks_and_batching_change_nothing(chunk, options, batching):
    def f(x):
        return (x * x.sin()).sum(-1)

    options = {**ESTIMATORS[options], "chunk_size": chunk}
    whole = {**options, "chunk_size": None}

    def derivatives(**options):
        F = smoothed(f, SIGMA, 12, **options)
        return F(KEY, X), grad(F, argnums=1)(KEY, X), hessian(F, argnums=1)(KEY, X)

    torch.testing.assert_close(derivatives(**options, batching=batching), derivatives(**whole), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}, {"batching": "sequential"}, {"sampler": rademacher()}])
def test_vmap_over_keys_is_the_loop(options):
    F = smoothed(lambda x: x.abs().sum(), SIGMA, 8, **options)
    batch = keys(3)
    mapped = vmap(lambda key: grad(F, argnums=1)(key, X))(batch)
    torch.testing.assert_close(mapped, torch.stack([grad(F, argnums=1)(key, X) for key in batch]))


def saved(F):
    """How many numbers the graph of F holds."""
    sizes = {}
    x = torch.linspace(0.1, 1.0, 1000, dtype=torch.float64, requires_grad=True)

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F(KEY, x)
    return sum(sizes.values())


def test_in_chunks_directions_are_not_kept_for_the_backward_pass():
    def of(samples, chunk):
        return saved(smoothed(lambda x: (x * x).sum(), SIGMA, samples, chunk_size=chunk))

    assert of(40, None) > 20 * 1000
    assert of(40, 8) < 10 * 1000
    assert of(80, 16) - of(40, 8) < 1000


def test_the_decorator():
    @zero_order(SIGMA, 8, method="forward", batching="batched")
    def f(x):
        """The sum of signs."""
        return x.sign().sum(1)

    assert f.__doc__ == "The sum of signs."
    same = smoothed(lambda x: x.sign().sum(), SIGMA, 8, method="forward")
    torch.testing.assert_close(grad(f, argnums=1)(KEY, X), grad(same, argnums=1)(KEY, X))


def test_half_precision():
    F = smoothed(lambda x: (x * x).sum(), 0.5, 64)
    x = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    found = grad(F, argnums=1)(KEY, x)
    assert found.dtype == torch.bfloat16
    expected = grad(F, argnums=1)(KEY, x.double())
    assert (found - expected).abs().max() < 1.0  # the draws differ by their rounding
