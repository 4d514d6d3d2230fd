"""diffopt.transforms.weight_decay: masks of every form, and their errors."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch.func import grad, vmap

from diffopt import tree
from diffopt.transforms import add_decayed_weights


class Pair(NamedTuple):
    first: object
    second: object


PARAMS = {"layers": [torch.ones(2, 2), torch.ones(2)], "head": Pair(torch.ones(3), torch.ones(())), "none": None}


def decayed(mask, params=PARAMS):
    transformation = add_decayed_weights(0.5, mask)
    updates, _ = transformation.update(tree.zeros_like(params), transformation.init(params), params)
    return [bool(leaf.any()) for leaf in tree.leaves(updates)]


@pytest.mark.parametrize(
    ("mask", "want"),
    [
        (None, [True, True, True, True]),
        (True, [True, True, True, True]),
        (False, [False, False, False, False]),
        ({"layers": True, "head": False, "none": None}, [False, False, True, True]),
        ({"layers": [True, False], "head": Pair(True, False), "none": True}, [True, False, True, False]),
        (OrderedDict(none=None, head=(False, True), layers=(False, True)), [False, True, False, True]),
        (lambda params: tree.map(lambda p: p.ndim > 1, params), [False, False, True, False]),
        (lambda params: {"layers": False, "head": True, "none": None}, [True, True, False, False]),
    ],
)
def test_masks(mask, want):
    assert decayed(mask) == want


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        ({"layers": True}, ValueError, r"keys \['head', 'layers', 'none'\]; `mask` has \['layers'\]"),
        ({"layers": [True], "head": True, "none": None}, ValueError, r"`params\['layers'\]` has the keys \[0, 1\]"),
        ({"layers": True, "head": True, "none": None, "more": True}, ValueError, "more"),
        ({"layers": [[True], True], "head": True, "none": None}, TypeError, r"`mask\['layers'\]\[0\]` must be a bool"),
        ({"layers": 1, "head": True, "none": None}, TypeError, r"`mask\['layers'\]` must be a bool .*got int: 1"),
        (torch.tensor(True), TypeError, "`mask` must be a bool or a tree of bools; got Tensor"),
        (lambda params: params, TypeError, r"`mask\['head'\]\[0\]` must be a bool; got Tensor"),
    ],
)
def test_wrong_masks_raise(mask, error, match):
    with pytest.raises(error, match=match):
        add_decayed_weights(0.5, mask).init(PARAMS)


def test_missing_and_mismatched_params_raise():
    transformation = add_decayed_weights(0.5)
    grads = tree.zeros_like(PARAMS)
    with pytest.raises(ValueError, match=r"needs the parameters: call update\(grads, state, params\)"):
        transformation.update(grads, transformation.init(PARAMS))
    with pytest.raises(ValueError, match="`params` must have the structure of `updates`"):
        transformation.update(grads, transformation.init(PARAMS), [torch.ones(2)])
    with pytest.raises(ValueError, match="`weight_decay` must be at least 0"):
        add_decayed_weights(-0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_dtype_gradient_and_vmap(dtype, shape):
    x = torch.ones(shape, dtype=dtype)

    def total(weight_decay):
        transformation = add_decayed_weights(weight_decay)
        updates, _ = transformation.update(x, transformation.init(x), x)
        assert updates.dtype == dtype
        return updates.sum()

    rates = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert torch.equal(vmap(grad(total))(rates), x.sum().double().expand(2))
