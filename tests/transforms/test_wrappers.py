"""diffopt.transforms.wrappers, masked and inject: what they do to the transformation inside."""

import pytest
import torch
from torch.func import grad, vmap

from diffopt import tree
from diffopt.optimizers import adam, adamw, sgd
from diffopt.transforms import (
    EmptyState,
    accumulate,
    add_noise,
    apply_if_finite,
    chain,
    flatten,
    freeze,
    inject_hyperparams,
    keep_params_nonnegative,
    lookahead,
    masked,
    named_chain,
    partition,
    polyak_average,
    scale,
    scale_by_polyak,
    scale_by_trust_ratio,
    step,
    trace,
)
from optimizers.problems import loss, start


def run(optimizer, params, steps, fn=loss):
    state, out = optimizer.init(params), []
    for _ in range(steps):
        params, state = step(optimizer, grad(fn)(params), state, params)
        out.append(params)
    return out, state


def assert_close(got, want):
    for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_flatten_changes_nothing():
    assert_close(run(flatten(adam(0.1)), start(), 5)[0], run(adam(0.1), start(), 5)[0])


def test_accumulate_steps_with_the_mean():
    optimizer, x = accumulate(adam(0.1), 3), torch.ones(2, dtype=torch.float64)
    state, inner = optimizer.init(x), adam(0.1)
    grads = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inner_state = inner.init(x)
    for i, g in enumerate(grads):
        updates, state = optimizer.update(g, state, x)
        if (i + 1) % 3:
            assert torch.equal(updates, torch.zeros_like(x))
        else:
            want, inner_state = inner.update(grads[i - 2 : i + 1].mean(0), inner_state, x)
            torch.testing.assert_close(updates, want)
    assert state.gradient_step == 2
    assert state.mini_step == 0


def test_apply_if_finite_skips_and_gives_up():
    optimizer, x = apply_if_finite(sgd(0.1, 0.9), 2), torch.ones(2)
    good, bad = torch.ones(2), torch.tensor([1.0, torch.nan])
    _, state = optimizer.update(good, optimizer.init(x), x)
    kept = state.inner_state
    for i in range(2):
        updates, state = optimizer.update(bad, state, x)
        assert torch.equal(updates, torch.zeros(2))
        assert_close(state.inner_state, kept)
        assert state.notfinite_count == i + 1
        assert not state.last_finite
    assert optimizer.update(good, state, x)[1].notfinite_count == 0
    assert optimizer.update(bad, state, x)[0].isnan().any()


def test_a_skipped_step_leaves_hypergradients_finite():
    bad = torch.tensor([[1.0, torch.inf], [torch.nan, 1.0], [1.0, 2.0]])

    def after(rate, g):
        optimizer = apply_if_finite(adam(rate, eps_root=1e-8), 2)
        return optimizer.update(g, optimizer.init(g), g)[0].sum()

    slopes = vmap(grad(after), in_dims=(None, 0))(torch.tensor(0.1), bad)
    assert torch.equal(slopes[:2], torch.zeros(2))
    torch.testing.assert_close(slopes[2], torch.tensor(-2.0))


def test_lookahead_of_the_paper():
    got, state = run(lookahead(sgd(0.1), 3, 0.4), start(), 6)
    slow = fast = start()
    for t in range(6):
        fast = tree.axpy(-0.1, grad(loss)(fast), fast)
        if t % 3 == 2:
            slow = fast = tree.axpy(0.4, tree.sub(fast, slow), slow)
        assert_close(got[t], fast)
    assert_close(state.slow, slow)


def test_polyak_average_is_the_mean_or_the_decaying_mean():
    path, state = run(chain(sgd(0.1), polyak_average()), start(), 5)
    assert_close(state[-1].average, tree.scale(tree.map(lambda *xs: sum(xs), *path), 0.2))
    path, state = run(chain(sgd(0.1), polyak_average(0.7)), start(), 3)
    want = start()
    for params in path:
        want = tree.axpy(0.7, want, tree.scale(params, 0.3))
    assert_close(state[-1].average, want)


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, {"w": True, "b": (False, False)}, None])
def test_masks_are_trees_prefixes_or_functions(mask):
    mask = (lambda params: tree.map(lambda p: p.ndim == 2, params)) if mask is None else mask
    got, _ = run(chain(masked(trace(0.9), mask), scale(-0.1)), start(), 3)
    want, _ = run(partition({"m": sgd(0.1, 0.9), "s": sgd(0.1)}, {"w": "m", "b": "s"}), start(), 3)
    assert_close(got, want)


def test_partition_is_one_optimizer_a_leaf():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    optimizer = partition({"a": adamw(0.1), "b": sgd(0.5)}, lambda params: {"x": "a", "y": "b"})
    params = {"x": x, "y": y}
    got, _ = step(optimizer, params, optimizer.init(params), params)
    assert_close(got["x"], step(adamw(0.1), x, adamw(0.1).init(x), x)[0])
    assert_close(got["y"], y - 0.5 * y)


def test_frozen_leaves_stay():
    got, _ = run(chain(adam(0.1), freeze({"w": True, "b": False})), start(), 2)
    assert torch.equal(got[-1]["w"], start()["w"])
    assert not torch.equal(got[-1]["b"][0], start()["b"][0])


def test_bad_masks_and_labels_raise():
    with pytest.raises(TypeError, match="must be a bool"):
        masked(scale(1.0), {"w": 1, "b": True}).init(start())
    with pytest.raises(ValueError, match="be a prefix of it"):
        masked(scale(1.0), {"w": True}).init(start())
    with pytest.raises(ValueError, match="must name transformations"):
        partition({"a": scale(1.0)}, {"w": "a", "b": "c"}).init(start())


def test_injected_hyperparameters_are_the_same_numbers_and_can_be_batched():
    factory = inject_hyperparams(adam)
    got, state = run(factory(0.05, b2=0.9), start(), 3)
    assert_close(got, run(adam(0.05, b2=0.9), start(), 3)[0])
    assert set(state.hyperparams) == {"learning_rate", "b1", "b2", "eps", "eps_root"}
    optimizer, params = factory(0.05), start()
    state, rates = optimizer.init(params), torch.tensor([0.01, 0.1], dtype=torch.float64)

    def after(rate):
        own = state._replace(hyperparams=state.hyperparams | {"learning_rate": rate})
        return step(optimizer, grad(loss)(params), own, params)[0]["w"]

    want = torch.stack([run(adam(rate), start(), 1)[0][0]["w"] for rate in rates])
    torch.testing.assert_close(vmap(after)(rates), want)


def test_injected_schedules_are_seen_in_the_state():
    optimizer = inject_hyperparams(sgd)(lambda count: 0.1 / (1 + count.double()), 0.9)
    got, state = run(optimizer, start(), 3)
    assert_close(got, run(sgd(lambda count: 0.1 / (1 + count.double()), 0.9), start(), 3)[0])
    torch.testing.assert_close(state.hyperparams["learning_rate"], torch.tensor(0.1 / 3, dtype=torch.float64))


def test_injection_keeps_static_arguments_outside_and_checks_ranges():
    mask = {"w": True, "b": False}
    optimizer = inject_hyperparams(adamw, static_args=["mask"])(0.1, mask=lambda params: mask, nesterov=True)
    assert_close(run(optimizer, start(), 2)[0], run(adamw(0.1, mask=mask, nesterov=True), start(), 2)[0])
    with pytest.raises(ValueError, match="`b1` must be"):
        inject_hyperparams(adam)(0.1, b1=1.0)
    with pytest.raises(TypeError, match="has no"):
        inject_hyperparams(adam, static_args=["mask"])


def test_named_chain_is_a_chain():
    named = named_chain(("momentum", trace(0.9)), ("rate", scale(-0.1)))
    got, state = run(named, start(), 3)
    assert_close(got, run(sgd(0.1, 0.9), start(), 3)[0])
    assert list(state) == ["momentum", "rate"]
    with pytest.raises(ValueError, match="different names"):
        named_chain(("a", scale(1.0)), ("a", scale(1.0)))


def test_noise_is_a_function_of_key_and_step():
    x = torch.zeros(4000, dtype=torch.float64)
    noise = add_noise(torch.tensor([42, 0]), 0.25, 1.0)
    first, state = noise.update(x, noise.init(x))
    second, _ = noise.update(x, state)
    assert torch.equal(first, noise.update(x, noise.init(x))[0])
    # Four standard errors of a standard deviation from 4000 draws are 4.5 %.
    assert abs(first.std() - 0.5) < 0.0225
    assert abs(second.std() - 0.5 / 2**0.5) < 0.016
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.07


def test_polyak_step_solves_a_quadratic_cone():
    x = torch.tensor([3.0, 4.0], dtype=torch.float64)
    updates, _ = scale_by_polyak(max_learning_rate=10.0).update(x / x.norm(), EmptyState(), value=x.norm())
    torch.testing.assert_close(updates, x)  # the step to the minimum of |x|
    assert torch.equal(scale_by_polyak().update(0 * x, EmptyState(), value=1.0)[0], 0 * x)
    with pytest.raises(ValueError, match="needs the loss"):
        scale_by_polyak().update(x, EmptyState())


def test_trust_ratio_leaves_what_has_no_norm():
    x = torch.tensor([3.0, 4.0])
    ratio = scale_by_trust_ratio()
    assert torch.equal(ratio.update(x, EmptyState(), 0 * x)[0], x)
    slope = grad(lambda g: ratio.update(g, EmptyState(), x)[0].sum())(0 * x)
    assert torch.isfinite(slope).all()


def test_nonnegative_parameters_stay_so():
    x = torch.tensor([0.5, 2.0])
    optimizer = chain(sgd(1.0), keep_params_nonnegative())
    assert torch.equal(step(optimizer, torch.ones(2), optimizer.init(x), x)[0], torch.tensor([0.0, 1.0]))


def test_counts_are_ints():
    with pytest.raises(ValueError, match="`every` must be at least 1; got 0"):
        accumulate(scale(1.0), 0)
    with pytest.raises(TypeError, match="`sync_period` must be an int; got float"):
        lookahead(scale(1.0), 1.5)
