"""diffopt.nn.functional: a module as a function, with its own tensors."""

import pytest
import torch
from torch import nn
from torch.func import vmap

import diffopt
from diffopt.nn import MetaOptimizer, functional
from nn.problems import F64, leaf, numbers


def test_gradients_flow_into_the_module_and_through_its_steps():
    torch.manual_seed(0)
    net = nn.Linear(2, 1).double()
    rate, start, x = leaf(0.1), net.weight, numbers(4, 2)
    MetaOptimizer(net, diffopt.sgd(rate)).step(net(x).square().mean())
    function, params, buffers = functional(net)
    assert params["weight"] is net.weight
    outputs = vmap(lambda row: function(params, buffers, row)[0])(x)
    torch.testing.assert_close(outputs, net(x))
    found = torch.autograd.grad(outputs.sum(), (start, rate), retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(net(x).sum(), (start, rate)))


def test_buffers_come_back_and_the_module_keeps_its_own():
    net = nn.BatchNorm1d(2).double()
    function, params, buffers = functional(net)
    x = numbers(4, 2)
    _, new = function(params, buffers, x)
    torch.testing.assert_close(new["running_mean"], 0.1 * x.mean(0))
    assert torch.equal(net.running_mean, torch.zeros(2, dtype=F64))
    with pytest.raises(TypeError, match="got builtin"):
        functional(torch.sin)
    with pytest.raises(ValueError, match="missing"):
        function({}, buffers, x)
