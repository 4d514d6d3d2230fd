"""Where batches come from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffopt import random
from diffopt.multilevel import Edge, Level, graph, minibatches, train
from diffopt.multilevel.sources import Sources
from diffopt.optimizers import sgd
from multilevel.small_runs import DATA, program, same


def test_iterables_begin_anew_where_they_end():
    two, state = program()
    found = train(two, state, {"b": list(DATA[:4]), "a": list(DATA[:2])}, updates=4, quiet=True)
    sources = {"b": lambda i: DATA[i % 4], "a": lambda i: DATA[i % 2]}
    assert same(found.state, train(two, state, sources, updates=4, quiet=True).state)
    with pytest.raises(ValueError, match="the iterable of 'b' has no batches left"):
        train(two, state, {"b": iter(DATA[:4]), "a": lambda i: DATA[0]}, updates=4, quiet=True)


@given(length=st.integers(1, 30), size=st.integers(1, 30), epoch=st.integers(0, 3))
@settings(max_examples=25)
def test_minibatches_see_each_entry_once_an_epoch(length, size, epoch):
    if size > length:
        with pytest.raises(ValueError, match="size must be an int between 1 and"):
            minibatches(random.key(0), torch.arange(length), size)
        return
    batch, count = minibatches(random.key(0), {"x": torch.arange(length)}, size), length // size
    seen = torch.cat([batch(epoch * count + i)["x"] for i in range(count)])
    assert len(seen.unique()) == len(seen) == count * size
    assert torch.equal(batch(epoch * count)["x"], seen[:size])  # also when asked again, later


def test_iterables_that_are_to_outlive_a_kill_need_a_state():
    two, _ = program()
    with pytest.raises(TypeError, match="with state_dict"):
        Sources({"b": [DATA]}, two, lasting=True)


@pytest.mark.parametrize("batch", [(torch.ones(3), torch.ones(3)), {"x": torch.ones(3)}], ids=["tuple", "dict"])
def test_one_batch_is_not_taken_for_several(batch):
    alone = graph({"w": Level(lambda w, batch: (w**2).sum(), sgd(0.1))})
    with pytest.raises(TypeError, match="would be taken for the batches one by one"):
        Sources({"w": batch}, alone, lasting=False)


def test_batches_of_an_update_have_one_shape():
    alone = graph(
        {
            "v": Level(lambda v, w, batch: (w**2).sum() + v, sgd(0.1), reads=("w",)),
            "w": Level(lambda w, v, batch: (w**2).sum() + v, sgd(0.1), reads=("v",), steps=2),
        },
        [Edge("v", "w")],
    )
    with pytest.raises(ValueError, match="Leave out a last one that is smaller"):
        Sources({"w": [torch.ones(3), torch.ones(2)]}, alone, lasting=False)(0)
