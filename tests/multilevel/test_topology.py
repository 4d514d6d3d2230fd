import functools

import pytest
import torch

from diffopt.linalg import CG
from diffopt.multilevel import Edge, Level, graph
from diffopt.optimizers import sgd


def level(*reads):
    return Level(lambda *args: args[0].sum(), sgd(0.1), reads=reads)


@pytest.mark.parametrize(
    ("levels", "edges", "message"),
    [
        ({}, [], "at least one level"),
        ({"a": level("x")}, [], "'a' reads 'x', which is no level; the levels are 'a'"),
        ({"a": level("a")}, [], "'a' reads itself"),
        ({"a": level("b"), "b": level("a")}, [("a", "x")], "'x' is no level"),
        ({"a": level("b"), "b": level("a")}, [], "'a' reads 'b', but no edge says which"),
        ({"a": level("b"), "b": level("a")}, [("a", "b"), ("a", "b")], "two edges from 'a' to 'b'"),
        ({"a": level("b"), "b": level("a")}, [("a", "b"), ("b", "a")], "a cycle, a > b > a"),
        ({"a": level("b"), "b": level("a"), "c": level()}, [("a", "b")], "'c' is joined to no other"),
        ({"a": level(), "b": level("a")}, [("a", "b")], "neither 'a' nor a level below it reads 'b'"),
        ({"a": level("b"), "b": level()}, [("a", "b")], "reads neither 'a' nor a level between them"),
    ],
)
def test_programs_that_mean_nothing_are_refused(levels, edges, message):
    with pytest.raises(ValueError, match=message):
        graph(levels, [Edge(upper, lower) for upper, lower in edges])


def test_levels_that_are_none_are_refused():
    with pytest.raises(TypeError, match="Level; got function"):
        graph({"a": lambda x: x})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"steps": 0}, ValueError, "`steps` must be at least 1"),
        ({"accumulate": True}, TypeError, "`accumulate` must be an int"),
        ({"start": "cold"}, ValueError, "start must be"),
        ({"precision": "bf16"}, ValueError, "precision must be"),
        ({"clip": 0.0}, ValueError, "clip must be positive"),
        ({"reads": "ab"}, TypeError, "reads must be a tuple of names"),
        ({"reads": ("a", "a")}, ValueError, "twice"),
    ],
)
def test_options_of_levels(options, kind, message):
    with pytest.raises(kind, match=message):
        Level(lambda *args: args[0].sum(), sgd(0.1), **options)


def test_options_of_edges():
    with pytest.raises(TypeError, match="method must be an adjoint"):
        Edge("a", "b", CG())
    with pytest.raises(ValueError, match="joins two levels"):
        Edge("a", "a")
    with pytest.raises(ValueError, match="response must be"):
        Edge("a", "b", response="none")
    with pytest.raises(ValueError, match="coupling must be positive"):
        Edge("a", "b", coupling=-1.0)


PAIR = {"a": level("b"), "b": level("a")}


@pytest.mark.parametrize(
    "loss", [lambda b, a: b.sum(), lambda b, a, c, batch: b.sum(), lambda b, a, batch, *, k: b.sum()]
)
def test_a_loss_that_takes_other_arguments_is_named(loss):
    with pytest.raises(TypeError, match=r"loss of level 'b' is called with 3 arguments, \(b, a, batch\), but"):
        graph({**PAIR, "b": Level(loss, sgd(0.1), reads=("a",))}, [Edge("a", "b")])


@pytest.mark.parametrize(
    "loss", [lambda b, *rest, power=2: b.sum(), torch.dist, functools.partial(lambda k, b, a, batch: b.sum(), 2.0)]
)
def test_losses_may_take_more_or_not_say(loss):
    assert graph({**PAIR, "b": Level(loss, sgd(0.1), reads=("a",))}, [Edge("a", "b")]).counts == {"a": 1, "b": 1}


def test_programs_are_made_of_levels_and_edges():
    with pytest.raises(TypeError, match="levels must be a dict from names to Level; got list"):
        graph(list(PAIR.values()))
    with pytest.raises(TypeError, match="from names to Level; got Level for 1"):
        graph({1: level()})
    with pytest.raises(ValueError, match=r"no '\+'"):
        graph({"a+b": level()})
    for edges in (Edge("a", "b"), [("a", "b")]):
        with pytest.raises(TypeError, match="edges must be a sequence of Edge"):
            graph(PAIR, edges)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"reads": None}, "reads must be a tuple"),
        ({"project": 3}, "project must be a function"),
        ({"clip": "1"}, "clip"),
    ],
)
def test_options_of_levels_have_types(option, message):
    with pytest.raises(TypeError, match=message):
        Level(lambda w, batch: w.sum(), sgd(0.1), **option)


def test_constants_of_edges_are_numbers():
    with pytest.raises(TypeError, match="coupling must be a number"):
        Edge("a", "b", coupling="1")
