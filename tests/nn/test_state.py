"""diffopt.nn.state: what is taken out comes back, by reference, copy and deep copy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import diffopt
from diffopt import tree
from diffopt.nn import MetaOptimizer, extract_state, recover_state, stop_gradient
from nn.problems import F64, numbers

WAYS = ["reference", "copy", "deepcopy"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()


def inputs():
    return numbers(5, 2, seed=1)


def values(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def adapt(module, inner, steps=2):
    for _ in range(steps):
        inner.step(module(inputs()).square().sum())


@pytest.mark.parametrize("by", WAYS)
def test_rolls_back_any_number_of_times(by):
    module = net()
    inner = MetaOptimizer(module, diffopt.adam(0.1))
    start, inner_start, expected = extract_state(module, by), extract_state(inner, by), values(module)
    ends = []
    for _ in range(3):
        adapt(module, inner)
        ends.append(values(module))
        recover_state(module, start, by)
        recover_state(inner, inner_start)
        torch.testing.assert_close(values(module), expected, rtol=0, atol=0)
        assert int(tree.leaves(inner.state)[0].sum()) == 0
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=0)


def test_a_reference_is_the_tensor_itself():
    module = net()
    start = dict(module.named_parameters())
    state = extract_state(module)
    adapt(module, MetaOptimizer(module, diffopt.sgd(0.1)))
    recover_state(module, state)
    assert all(value is start[name] for name, value in module.named_parameters())


def test_a_state_in_the_graph_is_gone_back_to_in_the_graph():
    module = net()
    start = module[0].weight
    inner = MetaOptimizer(module, diffopt.sgd(0.1))
    adapt(module, inner)
    middle, mean = extract_state(module), module[1].running_mean.clone()
    (expected,) = torch.autograd.grad(module(inputs())[:1].sum(), start, retain_graph=True)
    adapt(module, inner)
    assert not torch.equal(module[1].running_mean, mean)
    recover_state(module, middle)
    torch.testing.assert_close(module[1].running_mean, mean, rtol=0, atol=0)
    (found,) = torch.autograd.grad(module(inputs())[:1].sum(), start)
    torch.testing.assert_close(found, expected)


def test_a_copy_is_in_the_graph_and_a_deep_copy_is_not():
    module = net()
    start = module[0].weight
    copied, deep = extract_state(module, by="copy"), extract_state(module, by="deepcopy")
    with torch.no_grad():
        start.add_(1.0)
    assert copied.params["0.weight"].grad_fn is not None
    recover_state(module, copied)
    torch.testing.assert_close(module[0].weight, start - 1.0)
    module(inputs())[:1].sum().backward()
    assert start.grad is not None
    recover_state(module, deep)
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in module.parameters())
    torch.testing.assert_close(module[0].weight, start - 1.0)


def test_a_deep_copy_stays_as_it_is_when_the_module_is_trained_in_place():
    module = net()
    state, expected = extract_state(module, by="deepcopy"), values(module)
    for _ in range(2):
        recover_state(module, state, by="deepcopy")
        module(inputs()).sum().backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
    recover_state(module, state)
    torch.testing.assert_close(values(module), expected, rtol=0, atol=0)


def test_frozen_parameters_stay_frozen():
    module = net()
    module[0].requires_grad_(False)
    for by in WAYS:
        recover_state(module, extract_state(module, by), by)
        assert [p.requires_grad for p in module.parameters()] == [False, False, True, True, True, True]


def test_tied_parameters_and_buffers_stay_tied():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)).double()
    module[1].weight = module[0].weight
    module[3].running_mean = module[2].running_mean
    for by in WAYS:
        recover_state(module, extract_state(module, by), by)
        assert module[0].weight is module[1].weight
        assert module[2].running_mean is module[3].running_mean


def test_plain_tensors_are_part_of_the_state_of_their_optimizer():
    w = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    inner = MetaOptimizer(w, diffopt.sgd(0.1))
    start = extract_state(inner)
    inner.step(inner.params.square().sum())
    torch.testing.assert_close(inner.params, 0.8 * w)
    recover_state(inner, start)
    assert inner.params is w
    inner.step(inner.params.square().sum())
    stop_gradient(inner)
    assert inner.params.is_leaf
    assert inner.params.requires_grad


def test_stop_gradient_keeps_what_carries_no_graph():
    module = net()
    start = dict(module.named_parameters())
    assert stop_gradient(module) is module
    assert all(value is start[name] for name, value in module.named_parameters())
    inner = MetaOptimizer(module, diffopt.adam(0.1))
    adapt(module, inner)
    expected = values(module)
    assert stop_gradient(inner) is inner
    stop_gradient(module)
    torch.testing.assert_close(values(module), expected, rtol=0, atol=0)
    assert all(isinstance(p, nn.Parameter) and p.is_leaf and p.requires_grad for p in module.parameters())
    assert not any(t.requires_grad for t in tree.leaves(inner.state))
    adapt(module, inner)
    assert not any(p.is_leaf for p in module.parameters())


def test_stop_gradient_of_a_tree_is_a_new_tree():
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    given_tree = {"leaf": a, "result": a**2, "constant": torch.ones(2)}
    stopped = stop_gradient(given_tree)
    assert stopped["leaf"] is a
    assert stopped["constant"] is given_tree["constant"]
    assert stopped["result"].is_leaf
    assert stopped["result"].requires_grad
    assert given_tree["result"].grad_fn is not None
    with pytest.raises(TypeError, match="must be a tensor"):
        stop_gradient({"a": 1.0})


@settings(max_examples=20)
@given(by=st.sampled_from(WAYS), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_a_state_goes_into_another_module_like_it(by, sizes):
    make = lambda: nn.ModuleList(nn.Linear(n, 2) for n in sizes)  # noqa: E731
    first, second = make(), make()
    recover_state(second, extract_state(first, by))
    torch.testing.assert_close(values(second), values(first), rtol=0, atol=0)


def test_refuses_what_does_not_fit():
    module = net()
    inner = MetaOptimizer(module, diffopt.sgd(0.1, momentum=0.9))
    with pytest.raises(ValueError, match="deepcopy"):
        extract_state(module, by="value")
    with pytest.raises(ValueError, match="deepcopy"):
        recover_state(module, extract_state(module), by="value")
    with pytest.raises(TypeError, match="module or a MetaOptimizer"):
        extract_state({"a": torch.ones(1)})
    with pytest.raises(TypeError, match="same kind"):
        recover_state(module, extract_state(inner))
    with pytest.raises(TypeError, match="same kind"):
        recover_state(inner, module.state_dict())
    with pytest.raises(ValueError, match="structure"):
        recover_state(nn.Linear(2, 2), extract_state(module))
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        recover_state(nn.Linear(2, 1), extract_state(nn.Linear(3, 1)))
    with pytest.raises(ValueError, match="structure"):
        recover_state(inner, extract_state(MetaOptimizer(module, diffopt.adam(0.1))))
