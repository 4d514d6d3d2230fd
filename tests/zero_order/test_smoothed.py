import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from diffopt import autodiff, random
from diffopt.zero_order import (
    gaussian,
    guided,
    noise,
    orthogonal,
    rademacher,
    smoothed,
    sphere,
    zero_order,
)
from zero_order.smoothings import SIGMA, SMOOTHINGS, B, H, Ranks, X, check_mean, f64, keys, quadratic, trace_of_variance

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


@pytest.mark.parametrize("batching", ["vmap", "sequential"])
def test_captured_tensors_get_the_mean_of_the_derivatives(batching):
    u = noise(KEY, 3, 2, dtype=torch.float64)
    members = torch.cat([X + SIGMA * u, X - SIGMA * u])

    def outer(w):
        return smoothed(lambda x: (w * x.sin()).sum(), SIGMA, 4, batching=batching)(KEY, X)

    torch.testing.assert_close(grad(outer)(B), members.sin().mean(0))
    w = B.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(outer(w), w)[0], members.sin().mean(0))
    torch.testing.assert_close(jvp(outer, (B,), (X,))[1], X @ members.sin().mean(0))
    # the argument itself, captured: its own derivative, beside the estimate
    both = grad(lambda x: smoothed(lambda y: (x * y).sum(), SIGMA, 4, batching=batching)(KEY, x))(X)
    estimate = grad(smoothed(lambda y: (X * y).sum(), SIGMA, 4), argnums=1)(KEY, X)
    torch.testing.assert_close(both, estimate + members.mean(0))


def test_outputs_may_be_tensors_and_trees():
    def f(x):
        return {"v": torch.outer(x, x.sin()), "n": (x > 0).sum(), "p": 2.0}

    F = smoothed(f, SIGMA, 6)
    out, pull = vjp(lambda x: F(KEY, x), X)
    assert out["v"].shape == (3, 3)
    assert out["n"].dtype == out["p"].dtype == torch.float64
    single = grad(lambda x: smoothed(lambda x: f(x)["v"][1, 2], SIGMA, 6)(KEY, x))(X)
    seed = {"v": torch.zeros(3, 3, dtype=torch.float64), "n": f64(0.0), "p": f64(0.0)}
    seed["v"][1, 2] = 1
    torch.testing.assert_close(pull(seed)[0], single)
    torch.testing.assert_close(jacfwd(lambda x: F(KEY, x))(X)["v"], jacrev(lambda x: F(KEY, x))(X)["v"])


def test_trees_and_argnums():
    def f(scale, x, y):
        return scale * quadratic(torch.cat([x["a"], x["b"], y]))

    F = smoothed(f, SIGMA, 10, argnums=(1, 2))
    x, y = {"a": X[:1], "b": X[1:2]}, X[2:]
    found = grad(lambda x, y: F(KEY, f64(2.0), x, y), argnums=(0, 1))(x, y)
    flat = 2 * grad(smoothed(quadratic, SIGMA, 10), argnums=1)(KEY, X)
    torch.testing.assert_close(torch.cat([found[0]["a"], found[0]["b"], found[1]]), flat)
    check_mean(lambda key: grad(lambda y: smoothed(f, SIGMA, 8, argnums=-1)(key, 1.0, x, y))(y), (H @ X + B)[2:])


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


RANKED = ("antithetic", "forward", "leave one out", "antithetic, leave one out", "orthogonal", "chunked")


@pytest.mark.parametrize("name", RANKED)
def test_shards_make_the_whole(name):
    options = ESTIMATORS[name]

    def f(x, a):
        return (a * x.sin()).sum() + (x * x).sum()

    def all_of(F):
        loss = lambda x, a, s: F(s)(KEY, x, a).cos()  # noqa: E731
        args = X, B, f64(SIGMA)
        mixed = jacrev(grad(loss), 1)(*args)
        return loss(*args), grad(loss, argnums=(0, 1, 2))(*args), jacrev(jacrev(loss))(*args), mixed

    whole = all_of(lambda s: smoothed(f, s, 12, **options))
    ranks = Ranks(3)
    parts = ranks.run(lambda rank: all_of(lambda s: smoothed(f, s, 4, start=4 * rank, reduce=ranks.reduce, **options)))
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"method": "forward"}, {"sampler": rademacher()}])
def test_derivatives_pass_the_sum_over_ranks(options):
    """Three ranks that do the same: their sum is three times what one has."""

    def f(x, a):
        return (a * x.sin()).sum() + (x * x).sum()

    def all_of(**more):
        F = smoothed(f, SIGMA, 8, **options, **more)
        loss = lambda x, a: F(KEY, x, a).cos()  # noqa: E731
        second = grad(lambda a: grad(loss)(X, a) @ B)(B), jvp(lambda a: grad(loss)(X, a), (B,), (X,))[1]
        mapped = vmap(grad(lambda x: F(KEY, x, B)))(torch.stack([X, B]))
        return jvp(loss, (X, B), (B, X))[1], jacfwd(grad(loss), 1)(X, B), second, mapped

    torch.testing.assert_close(all_of(reduce=lambda x: 3 * x), all_of())


def test_a_captured_gradient_and_reduce_are_refused():
    w = B.clone().requires_grad_()
    F = smoothed(lambda x: (w * x).sum(), SIGMA, 4, reduce=lambda x: x)
    with pytest.raises(ValueError, match="Pass them as arguments"):
        F(KEY, X)


def test_numpy_under_transforms():
    def black_box(x):
        return np.abs(x.numpy()).sum().item()

    F = smoothed(black_box, SIGMA, 8, batching="sequential")
    same = smoothed(lambda x: x.abs().sum(), SIGMA, 8)
    for transform in (
        lambda F: F(KEY, X),
        lambda F: grad(F, argnums=1)(KEY, X),
        lambda F: hessian(F, argnums=1)(KEY, X),
        lambda F: jvp(lambda x: F(KEY, x), (X,), (B,))[1],
        lambda F: vmap(grad(F, argnums=1), in_dims=(0, None))(keys(2), X),
        lambda F: vmap(hessian(lambda x: F(KEY, x)))(torch.stack([X, B])),
    ):
        torch.testing.assert_close(transform(F), transform(same))
    x = X.clone().requires_grad_()
    F(KEY, x).backward()
    torch.testing.assert_close(x.grad, grad(same, argnums=1)(KEY, X))


def test_an_argument_that_a_loop_disconnects_is_refused():
    F = smoothed(lambda x, a: float(x.sum()) * a.item(), SIGMA, 4, batching="sequential")
    with pytest.raises(RuntimeError, match="argnums"):
        grad(lambda a: F(KEY, X, a))(f64(1.0))
    with pytest.raises(RuntimeError, match="argnums"):
        jvp(lambda a: F(KEY, X, a), (f64(1.0),), (f64(1.0),))
    torch.testing.assert_close(grad(F, argnums=1)(KEY, X, f64(1.0)).shape, X.shape)


def test_a_loop_may_train_inside():
    def f(x):
        w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        ((w - x) ** 2).sum().backward()
        return -(w.grad * x).sum().item()

    found = grad(smoothed(f, SIGMA, 4, batching="sequential"), argnums=1)(KEY, X)
    torch.testing.assert_close(found, grad(smoothed(lambda x: 2 * x @ x, SIGMA, 4), argnums=1)(KEY, X))


def test_aux_comes_back_from_all_members():
    for options in ({}, {"chunk_size": 2}, {"batching": "sequential"}):
        F = smoothed(lambda x: (x.sum(), {"x": x, "name": "m"}), SIGMA, 6, has_aux=True, **options)
        u = noise(KEY, 3, 3, dtype=torch.float64)
        value, aux = F(KEY, X)
        torch.testing.assert_close(aux["x"], torch.cat([X + SIGMA * u, X - SIGMA * u]))
        torch.testing.assert_close(value, aux["x"].sum(1).mean())
        assert aux["name"] == "m"
        slope, aux = autodiff.grad(F, argnums=1, has_aux=True)(KEY, X)
        assert slope.shape == (3,)
    with pytest.raises(TypeError, match="has_aux"):
        smoothed(torch.sum, SIGMA, 2, has_aux=True)(KEY, X)


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


def test_clipped_differences_and_signs():
    def f(x):
        return 3 * x.exp().sum()

    u = noise(KEY, 3, 10, dtype=torch.float64)
    difference = vmap(f)(X + SIGMA * u) - vmap(f)(X - SIGMA * u)
    for options, shape in (({"clip": 1.5}, lambda d: d.clamp(-1.5, 1.5)), ({"sign": True}, torch.sign)):
        F = smoothed(f, SIGMA, 20, **options)
        expected = (shape(difference)[:, None] * u).mean(0) / (2 * SIGMA)
        torch.testing.assert_close(grad(F, argnums=1)(KEY, X), expected)
        torch.testing.assert_close(F(KEY, X), smoothed(f, SIGMA, 20)(KEY, X))
        with pytest.raises(RuntimeError, match="no second derivative"):
            hessian(F, argnums=1)(KEY, X)
        with pytest.raises(RuntimeError, match="no derivative in sigma"):
            grad(lambda s, o=options: smoothed(f, s, 4, **o)(KEY, X))(f64(0.3))


@pytest.mark.parametrize("sampler", [rademacher(), sphere(), guided(torch.eye(3, 1, dtype=torch.float64))])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_derivative_that_the_directions_do_not_have_raises(sampler, chunk_size):
    def f(x, a):
        return a * (x * x).sum()

    F = smoothed(f, SIGMA, 8, sampler=sampler, chunk_size=chunk_size)
    a = f64(0.7)
    for second in (hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f))):
        with pytest.raises(RuntimeError, match="no second derivative in x"):
            second(lambda x: F(KEY, x, a))(X)
        with pytest.raises(RuntimeError, match="no second derivative in x"):
            vmap(second(lambda x: F(KEY, x, a)))(torch.stack([X, B]))
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F(KEY, x, a), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in x"):
        slope.sum().backward()
    slope = grad(lambda x, a: F(KEY, x, a))(X, a)
    for outer in (jacrev, jacfwd):  # in x and then in another argument
        torch.testing.assert_close(outer(grad(lambda x, a: F(KEY, x, a)), 1)(X, a), slope / a)
    with pytest.raises(RuntimeError, match="no derivative in sigma"):
        grad(lambda s: smoothed(f, s, 8, sampler=sampler)(KEY, X, a))(f64(0.3))


def test_a_subspace_has_no_derivative():
    U = torch.eye(3, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="a tensor of its sampler"):
        grad(lambda U: smoothed(quadratic, SIGMA, 4, sampler=guided(U))(KEY, X))(U)


def test_compiled_directions_without_a_second_derivative():
    F = smoothed(quadratic, SIGMA, 8, sampler=rademacher())
    torch._dynamo.reset()
    slope = grad(lambda x: F(KEY, x))
    both = torch.compile(lambda x: (slope(x), grad(lambda x: slope(x) @ B)(x)), backend="aot_eager", fullgraph=True)
    first, second = both(X)
    torch.testing.assert_close(first, slope(X))
    assert second.isnan().all()  # compiled code cannot raise


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
