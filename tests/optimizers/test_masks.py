"""Masks of optimizers, trees of several dtypes: each leaf goes its own way."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from diffopt import tree
from diffopt.optimizers import adadelta, adamw, adan, lamb, lars, lion, muon, sgd
from diffopt.transforms import step
from optimizers.problems import start
from optimizers.test_contract import OPTIMIZERS

MASKED = {
    "adamw": lambda **options: adamw(0.1, **options),
    "adadelta": lambda **options: adadelta(0.5, eps=1e-2, **options),
    "lion": lambda **options: lion(0.1, **options),
    "lamb": lambda **options: lamb(0.1, **options),
    "lars": lambda **options: lars(0.1, trust_coefficient=0.5, **options),
    "adan": lambda **options: adan(0.1, **options),
}
MASKS = {
    "prefix": ({"w": False, "b": True}, [True, True, False]),
    "tree": ({"w": True, "b": (False, True)}, [False, True, True]),
    "function": (lambda params: tree.map(lambda p: p.ndim == 1, params), [True, False, False]),
    "function to a prefix": (lambda params: {"w": True, "b": False}, [False, False, True]),
    "all": (True, [True, True, True]),
    "none": (False, [False, False, False]),
}


def leaves_after(optimizer, params, steps=3):
    """With gradients that do not couple the leaves."""
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(optimizer, tree.map(torch.sin, params), state, params)
    return tree.leaves(params)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("mask", MASKS)
def test_masked_leaves_decay_and_the_others_do_not(name, mask):
    mask, holds = MASKS[mask]
    make, params = MASKED[name], start()
    got = leaves_after(make(weight_decay=0.5, mask=mask), params)
    decayed, plain = (leaves_after(make(weight_decay=decay), params) for decay in (0.5, 0.0))
    assert not all(map(torch.equal, decayed, plain))
    for leaf, with_decay, without, held in zip(got, decayed, plain, holds, strict=True):
        assert torch.equal(leaf, with_decay if held else without)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_lars_ratios(mask):
    mask, holds = MASKS[mask]
    params = start()
    got = leaves_after(lars(0.1, trust_coefficient=0.5, trust_ratio_mask=mask), params)
    scaled, plain = leaves_after(lars(0.1, trust_coefficient=0.5), params), leaves_after(sgd(0.1, 0.9), params)
    for leaf, with_ratio, without, held in zip(got, scaled, plain, holds, strict=True):
        torch.testing.assert_close(leaf, with_ratio if held else without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["prefix", "none"])
def test_matrices_left_to_adamw(mask):
    params, mask = {"w": start()["w"], "b": start()["w"] + 1}, {"w": False, "b": True} if mask == "prefix" else False
    got = leaves_after(muon(0.1, matrices=mask), params)
    by_muon = leaves_after(muon(0.1), params)
    by_adamw = leaves_after(adamw(0.1, b2=0.95, weight_decay=0.1), params)
    for leaf, one, other, held in zip(got, by_muon, by_adamw, [bool(mask), False], strict=True):
        torch.testing.assert_close(leaf, one if held else other, rtol=1e-12, atol=1e-12)


LEAFWISE = [
    name for name in OPTIMIZERS if name not in ("adamw", "lars", "sam", "adaptive sam", "prodigy", "prodigy, b3")
]
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
SHAPES = st.lists(st.integers(1, 3), max_size=2).map(tuple)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(name=st.sampled_from(LEAFWISE), leaves=st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=4))
def test_leaves_of_any_dtypes_go_as_they_would_alone(name, leaves):
    make, values = OPTIMIZERS[name]
    params = [
        torch.linspace(0.5, 1.5, shape.numel()).reshape(shape).to(d) for s, d in leaves for shape in [torch.Size(s)]
    ]
    together = leaves_after(make(**values), params)
    for leaf, (shape, dtype), alone in zip(together, leaves, params, strict=True):
        assert leaf.dtype == dtype
        assert leaf.shape == shape
        torch.testing.assert_close(leaf, leaves_after(make(**values), [alone])[0])
