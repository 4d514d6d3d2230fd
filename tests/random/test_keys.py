"""diffopt.random.keys: seeds, split and fold_in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from diffopt import random

seeds = st.integers(-(2**63), 2**64 - 1)
KEY = random.key(42)


@given(seeds)
def test_a_key_holds_the_words_of_its_seed(seed):
    low, high = random.key(seed).tolist()
    assert (high << 32) | low == seed % 2**64


@given(seeds, st.integers(0, 20), st.integers(0, 20))
def test_children_do_not_depend_on_their_number(seed, few, more):
    key = random.key(seed)
    few, more = sorted((few, more))
    assert torch.equal(random.split(key, few), random.split(key, more)[:few])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_fold_in_of_a_tensor_equals_the_loop_and_vmap(data):
    column = torch.tensor(data)
    loop = torch.stack([random.fold_in(KEY, value) for value in data])
    assert torch.equal(random.fold_in(KEY, column), loop)
    assert torch.equal(vmap(random.fold_in, in_dims=(None, 0))(KEY, column), loop)
    assert torch.equal(random.fold_in(KEY, column[:, None]), loop[:, None])


def test_keys_and_draws_are_distinct():
    derived = [*random.split(KEY, 1000), *(random.fold_in(KEY, i) for i in range(1000))]
    words = random.bits(KEY, (1000, 4))
    pairs = {tuple(row.tolist()) for row in derived}
    pairs |= {tuple(row.tolist()) for row in words[:, :2]} | {tuple(row.tolist()) for row in words[:, 2:]}
    assert len(pairs) == 4000


def test_split_under_vmap_equals_the_loop():
    keys = random.split(KEY, 3)
    batched = vmap(lambda key: random.split(key, 12))(keys)
    assert torch.equal(batched, torch.stack([random.split(key, 12) for key in keys]))


def test_split_compiles():
    compiled = torch.compile(lambda key: random.fold_in(random.split(key)[1], 3), backend="eager", fullgraph=True)
    assert torch.equal(compiled(KEY), random.fold_in(random.split(KEY)[1], 3))


def test_fold_in_takes_every_integer_dtype():
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert torch.equal(random.fold_in(KEY, torch.tensor(5, dtype=dtype)), random.fold_in(KEY, 5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random.key(1.5), TypeError, "`seed` must be an int; got float"),
        (lambda: random.key(2**64), ValueError, "must be in"),
        (lambda: random.split(KEY, -1), ValueError, "`num` must be at least 0; got -1"),
        (lambda: random.split(KEY, 2.0), TypeError, "`num` must be an int; got float"),
        (lambda: random.fold_in(KEY, 0.5), TypeError, "`data` must be an int or an integer tensor; got float"),
        (lambda: random.fold_in(KEY, torch.ones(2)), TypeError, "`data` must hold integers; got torch.float32"),
        (lambda: random.fold_in(KEY, 2**63), ValueError, "`data` must be in"),
        (lambda: random.split(KEY.int()), TypeError, "`key` must be an int64 tensor .* got torch.int32"),
        (lambda: random.split(42), TypeError, "`key` must be an int64 tensor .* got int"),
        (lambda: random.split(random.split(KEY, 3)), ValueError, r"must have shape \(2,\); got \(3, 2\)"),
    ],
)
def test_bad_inputs(call, error, message):
    with pytest.raises(error, match=message):
        call()
