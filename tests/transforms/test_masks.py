"""diffopt.transforms.masks: a tree, a prefix of it and a function say the same, for every tree and transformation."""

import dataclasses
import pickle
from typing import Any

import hypothesis
import hypothesis.strategies as st
import optree
import pytest
import torch
from torch.testing import assert_close

from diffopt import tree
from diffopt.transforms import add_decayed_weights, freeze, masked, partition, scale, step, trace


@dataclasses.dataclass(frozen=True)
class Spot:
    """A leaf of a prefix: what it says, and the subtree of leaves (their numbers of dimensions) in its place."""

    holds: bool
    subtree: Any


def nested(leaves):
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
        ),
        max_leaves=5,
    )


PREFIXES = nested(st.builds(Spot, st.booleans(), nested(st.integers(0, 2))))


def build(prefix):
    """The parameters, and the mask as a prefix and as a tree of their structure."""
    sizes = iter(range(1, 100))
    params = tree.map(
        lambda spot: tree.map(lambda ndim: torch.full((2,) * ndim, float(next(sizes))), spot.subtree), prefix
    )
    short = tree.map(lambda spot: spot.holds, prefix)
    full = tree.map(lambda spot: tree.map(lambda _: spot.holds, spot.subtree), prefix)
    return params, short, full


def updated(transformation, params):
    out, state = transformation.update(params, transformation.init(params), params)
    tree.check_like(transformation.update(params, state, params)[0], params)
    return tree.leaves(out)


def by_label(mask):
    def named(entry):
        return "yes" if entry else "no"

    labels = (lambda params: tree.map(named, mask(params))) if callable(mask) else tree.map(named, mask)
    return partition({"yes": scale(3.0), "no": scale(1.0)}, labels)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(prefix=PREFIXES)
def test_trees_prefixes_and_functions_say_the_same(prefix):
    params, short, full = build(prefix)
    leaves, holds = tree.leaves(params), tree.leaves(full)
    cases = [
        (lambda mask: masked(scale(3.0), mask), 3.0),
        (lambda mask: add_decayed_weights(2.0, mask), 3.0),
        (freeze, 0.0),
        (by_label, 3.0),
    ]
    for make, factor in cases:
        want = [factor * leaf if chosen else leaf for leaf, chosen in zip(leaves, holds, strict=True)]
        for mask in (short, full, lambda params: short, lambda params: full):
            assert all(map(torch.equal, updated(make(mask), params), want))


def matrices(params, yes: Any = True, no: Any = False):
    return optree.tree_map(lambda p: yes if p.ndim == 2 else no, params)


@pytest.mark.parametrize(
    "transformation",
    [
        masked(scale(3.0), matrices),
        freeze(matrices),
        partition({"a": scale(3.0), "b": scale(1.0)}, lambda params: matrices(params, "a", "b")),
    ],
)
def test_functions_of_the_parameters_compile(transformation):
    params = {"w": torch.ones(2, 2), "b": (torch.ones(2), torch.ones(()))}
    state = transformation.init(params)
    torch._dynamo.reset()
    compiled = torch.compile(lambda p: step(transformation, p, state, p)[0], backend="eager", fullgraph=True)
    want = step(transformation, params, state, params)[0]
    assert all(map(torch.equal, tree.leaves(compiled(params)), tree.leaves(want)))


@pytest.mark.parametrize(
    "transformation",
    [
        masked(trace(0.9), {"x": False, "y": True}),
        partition({"a": trace(0.9), "b": scale(1.0)}, {"x": "b", "y": "a"}),
    ],
)
def test_dicts_of_which_nothing_is_seen_compile_and_map(transformation):
    params = {name: {"w": torch.ones(2, 2), "b": torch.ones(2)} for name in "xy"}
    state = transformation.init(params)
    torch._dynamo.reset()
    whole = lambda p, s: step(transformation, p, s, p)  # noqa: E731
    compiled = torch.compile(whole, backend="eager", fullgraph=True)
    params, state = whole(params, state)
    want = whole(params, state)
    assert_close(tree.leaves(compiled(params, state)), tree.leaves(want))
    several = tree.map(lambda t: torch.stack([t, 2 * t]), (params, state))
    got = tree.map(lambda t: t[0], torch.func.vmap(whole)(*several))
    tree.check_same_structure(got, want)
    assert_close(tree.leaves(got), tree.leaves(want))
    tree.check_same_structure(pickle.loads(pickle.dumps(state)), state)
