"""diffopt.transforms.base: the grammar, identity, apply_updates and step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from diffopt import tree
from diffopt.optimizers import adamw, sgd
from diffopt.transforms import (
    EmptyState,
    GradientTransformation,
    apply_updates,
    identity,
    scale,
    step,
)

LEAF = st.sampled_from([(), (1,), (2, 3), (0,), (2, 0)]).map(lambda shape: torch.full(shape, 1.5))
TREES = st.recursive(
    LEAF,
    lambda sub: (
        st.lists(sub, max_size=3)
        | st.lists(sub, max_size=2).map(tuple)
        | st.dictionaries(st.sampled_from("abc"), sub, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(TREES)
def test_any_tree_takes_a_step_of_its_own_shape(params):
    optimizer = adamw(0.1, weight_decay=0.01)
    new, state = step(optimizer, params, optimizer.init(params), params)
    tree.check_like(new, params)
    tree.check_like(state, optimizer.init(params))
    for p, q in zip(tree.leaves(params), tree.leaves(new), strict=True):
        torch.testing.assert_close(q, p - 0.1 * (1 + 0.01 * p))


def test_identity_returns_the_updates():
    updates = {"w": torch.randn(2)}
    out, state = identity().update(updates, identity().init(updates))
    assert out is updates
    assert state == EmptyState()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_apply_updates_keeps_the_dtype_of_params(dtype, shape):
    params = torch.ones(shape, dtype=dtype)
    new = apply_updates(params, torch.full(shape, 0.5, dtype=torch.float64))
    assert new.dtype == dtype
    assert torch.equal(new, torch.full(shape, 1.5, dtype=dtype))


def test_apply_updates_names_the_path_of_a_mismatch():
    params = {"w": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="missing"):
        apply_updates(params, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"`updates\['b'\]` must have shape \(1,\)"):
        apply_updates(params, {"w": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(ValueError, match="got None"):
        apply_updates(params, {"w": torch.ones(2), "b": None})


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        (torch.tensor(1), r"`params\['w'\]` must be a floating-point tensor; got torch.int64"),
        (torch.tensor(1j), "view_as_real"),
        (1.0, r"`params\['w'\]` must be a tensor, got float"),
    ],
)
def test_leaves_that_cannot_be_optimized_raise(leaf, match):
    with pytest.raises(TypeError, match=match):
        apply_updates({"w": leaf}, {"w": leaf})
    for optimizer in (sgd(0.1), sgd(0.1, momentum=0.9), adamw(0.1)):
        with pytest.raises(TypeError, match=match):
            optimizer.init({"w": leaf})


def test_step_equals_update_then_apply():
    params, grads = torch.randn(3), torch.randn(3)
    optimizer = adamw(0.1)
    state = optimizer.init(params)
    updates, want_state = optimizer.update(grads, state, params)
    got, got_state = step(optimizer, grads, state, params)
    torch.testing.assert_close(got, params + updates)
    assert torch.equal(got_state[0].count, want_state[0].count)
    torch.testing.assert_close(tree.leaves(got_state), tree.leaves(want_state))


def test_step_prefers_the_transformations_own():
    def own(grads, state, params, **extra):
        return tree.map(lambda p, g: p - extra["rate"] * g, params, grads), state

    transformation = GradientTransformation(scale(1.0).init, scale(1.0).update, own)
    new, _ = step(transformation, torch.ones(2), EmptyState(), torch.ones(2), rate=0.25)
    assert torch.equal(new, torch.full((2,), 0.75))


def test_step_differentiates_and_vmaps():
    params, optimizer = torch.randn(4, 3, dtype=torch.float64), sgd(0.1)

    def after(p):
        return step(optimizer, p**3, optimizer.init(p), p)[0].sum()

    torch.testing.assert_close(vmap(grad(after))(params), 1 - 0.3 * params**2)
