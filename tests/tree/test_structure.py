"""diffopt.tree.structure: flatten, map, paths and the checks."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffopt import tree

Pair = namedtuple("Pair", ["left", "right"])

numbers = st.integers(-5, 5)
trees = st.recursive(
    numbers | st.none(),
    lambda kids: (
        st.lists(kids, max_size=3)
        | st.tuples(kids, kids)
        | st.dictionaries(st.sampled_from("abcd"), kids, max_size=3)
        | st.builds(Pair, kids, kids)
    ),
    max_leaves=12,
)


def follow(value, path):
    return eval("value" + path, {"value": value})


@given(trees)
def test_unflatten_undoes_flatten(value):
    leaves, treespec = tree.flatten(value)
    assert tree.unflatten(treespec, leaves) == value
    assert tree.leaves(value) == leaves


@given(trees)
def test_paths_reach_the_leaves(value):
    assert [follow(value, path) for path in tree.paths(value)] == tree.leaves(value)


@given(trees)
def test_map_is_leafwise(value):
    doubled = tree.map(lambda x, y: x + y, value, value)
    assert tree.leaves(doubled) == [2 * leaf for leaf in tree.leaves(value)]
    tree.check_same_structure(doubled, value)


@given(trees, trees)
def test_structures_agree_or_the_error_names_a_path(value, other):
    if tree.flatten(value)[1] == tree.flatten(other)[1]:
        tree.check_same_structure(value, other)
    else:
        with pytest.raises(ValueError, match=r"`x` must have the structure of `y`. At `x"):
            tree.check_same_structure(value, other, name="x", reference_name="y")


def test_dict_order_does_not_matter():
    assert tree.leaves({"b": 2, "a": 1}) == tree.leaves({"a": 1, "b": 2}) == [1, 2]
    tree.check_same_structure({"b": 2, "a": 1}, {"a": 1, "b": 2})


def test_a_tensor_is_a_tree():
    x = torch.ones(2)
    assert tree.paths(x) == [""]
    assert tree.map(lambda x: 2 * x, x).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("value", "reference", "message"),
    [
        ({"a": 1}, {"a": 1, "b": 2}, r"At `tree`: keys missing \['b'\]"),
        ({"a": 1, "c": 2}, {"a": 1, "b": 2}, r"keys missing \['b'\] and unexpected \['c'\]"),
        ({"a": [1, 2]}, {"a": [1]}, r"At `tree\['a'\]`: expected a list of 1, got a list of 2"),
        ({"a": (1,)}, {"a": [1]}, r"At `tree\['a'\]`: expected a list of 1, got a tuple of 1"),
        ({"a": None}, {"a": 1}, r"At `tree\['a'\]`: expected a leaf, got None"),
        ({"a": 1}, {"a": None}, r"At `tree\['a'\]`: expected None, got a leaf"),
        (Pair(1, (2,)), Pair(1, 2), r"At `tree.right`: expected a leaf, got a tuple of 1"),
        (OrderedDict(a=1), {"a": 1}, "expected a dict of 1, got a OrderedDict of 1"),
        ([[1], [[2, {"k": 3}]]], [[1], [[2, {"j": 3}]]], r"At `tree\[1\]\[0\]\[1\]`: keys"),
    ],
)
def test_structure_errors_name_the_path(value, reference, message):
    with pytest.raises(ValueError, match=message):
        tree.check_same_structure(value, reference)


def test_map_names_the_tree_that_differs():
    with pytest.raises(ValueError, match=r"`rest\[1\]` must have the structure of `tree`. At `rest\[1\]\['a'\]`"):
        tree.map(lambda *xs: sum(xs), {"a": 1}, {"a": 1}, {"a": [1]})


def test_unflatten_checks_the_number_of_leaves():
    _, treespec = tree.flatten((1, 2))
    with pytest.raises(ValueError, match="needs 2 leaves"):
        tree.unflatten(treespec, [1])


def test_check_like_accepts_its_like():
    value = {"a": torch.ones(2), "b": (torch.ones((), dtype=torch.float64),)}
    tree.check_like(tree.map(lambda x: x + 1, value), value)


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (torch.ones(3), ValueError, r"`x\['a'\]` must have shape \(2,\), as `y\['a'\]` has; got \(3,\)"),
        (torch.ones(2, dtype=torch.float64), TypeError, "dtype torch.float32, .* got torch.float64"),
        (torch.ones(2, device="meta"), ValueError, "device cpu, .* got meta"),
        (1.5, TypeError, r"`x\['a'\]` must be a tensor, got float: 1.5"),
        ([torch.ones(2)], ValueError, "expected a leaf, got a list of 1"),
    ],
)
def test_check_like_names_the_path(leaf, error, message):
    with pytest.raises(error, match=message):
        tree.check_like({"a": leaf}, {"a": torch.ones(2)}, name="x", reference_name="y")


@pytest.mark.parametrize("leaf", [1.0, True, np.ones(2), "text"])
def test_check_tensors_names_the_path(leaf):
    with pytest.raises(TypeError, match=r"`params\['a'\]\[1\]` must be a tensor, got "):
        tree.check_tensors({"a": (torch.ones(()), leaf)}, name="params")


def test_trees_compile():
    def double(value, other):
        tree.check_like(value, other)
        total = sum(leaf.sum() for leaf in tree.leaves(value))
        return tree.map(lambda x, y: x + total * y, value, other)

    value = {"a": torch.ones(2), "b": (torch.ones(()), {"c": Pair(torch.ones(1), [torch.ones(3)])})}
    compiled = torch.compile(double, backend="eager", fullgraph=True)
    torch.testing.assert_close(tree.leaves(compiled(value, value)), tree.leaves(double(value, value)))
