"""diffopt.nn.zero_order_module: estimated gradients of modules."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from diffopt import random
from diffopt.nn import ZeroOrderModule, functional
from diffopt.zero_order import rademacher, smoothed
from nn.problems import F64, numbers

KEY = torch.tensor([7, 1])


X = numbers(5, 2)


def linear():
    torch.manual_seed(0)
    return nn.Linear(2, 1).double()


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x).square().sum()


class Rounded(nn.Linear):
    def forward(self, x):
        return torch.tensor(round(super().forward(x).mean().item(), 3), dtype=F64)


@pytest.mark.parametrize("options", [{}, {"value": "smoothed"}, {"method": "naive"}, {"sampler": rademacher()}])
def test_equals_smoothed_of_the_function(options):
    net = ZeroOrderModule(linear(), 0.1, 16, **options)
    function, params, buffers = functional(net.module)
    value = lambda p: function(p, buffers, X)[0]  # noqa: E731
    F = smoothed(value, 0.1, 16, **({"value": "f"} | options))
    torch.testing.assert_close(net(KEY, X), F(KEY, params))
    expected = grad(lambda p: F(KEY, p).square().sum())({n: p.detach() for n, p in params.items()})
    net(KEY, X).square().sum().backward()
    torch.testing.assert_close({n: p.grad for n, p in net.module.named_parameters()}, expected, rtol=1e-10, atol=1e-10)


def test_the_value_is_the_module_s_own():
    module = linear()
    torch.testing.assert_close(ZeroOrderModule(module, 0.1, 8)(KEY, X), module(X))


def test_the_mean_over_keys_is_the_gradient():
    """A linear module is its own smoothing; a gradient of norm 6 by 10 000 pairs has a spread of 0.06."""
    module = linear()
    expected = torch.autograd.grad(module(X).sum(), list(module.parameters()))
    found = torch.autograd.grad(ZeroOrderModule(module, 0.1, 20_000)(KEY, X).sum(), list(module.parameters()))
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * 0.06)


@pytest.mark.parametrize("training", [True, False])
def test_a_module_without_derivatives_trains(training):
    first = nn.BatchNorm1d(2, track_running_stats=False) if training else nn.Dropout(0.9)
    torch.manual_seed(0)
    module = nn.Sequential(first, Rounded(2, 1)).double()
    net = ZeroOrderModule(module, 0.1, 8, batching="sequential").train(training)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    key, losses = random.key(0), []
    for step in range(40):
        optimizer.zero_grad()
        loss = (net(random.fold_in(key, step), X) - 3.0).square()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_works_under_transforms():
    net = ZeroOrderModule(linear(), 0.1, 8)
    function, params, buffers = functional(net)
    keys = random.split(KEY, 3)
    slope = grad(lambda p, key: function(p, buffers, key, X)[0].sum())
    mapped = vmap(slope, in_dims=(None, 0))(params, keys)
    for i, key in enumerate(keys):
        torch.testing.assert_close({n: g[i] for n, g in mapped.items()}, slope(params, key))


def test_frozen_parameters_and_arguments():
    module, x = linear(), X.clone().requires_grad_()
    module.bias.requires_grad_(False)
    net = ZeroOrderModule(module, 0.1, 8, value="smoothed")
    net(KEY, x).sum().backward()
    assert module.bias.grad is None
    assert module.weight.grad.norm() > 0
    assert x.grad.norm() > 0


def test_a_learned_sigma():
    sigma = nn.Parameter(torch.tensor(0.3, dtype=F64))
    net = ZeroOrderModule(Squared(2, 1).double(), sigma, 4000, value="smoothed")
    assert sigma in set(net.parameters())
    net(KEY, X).backward()
    expected = 2 * 0.3 * (X.square().sum() + len(X))  # of E |x (w + sigma u)|^2
    torch.testing.assert_close(sigma.grad, expected, rtol=0.2, atol=0.0)  # 2000 pairs


def test_refuses_what_has_no_estimate():
    with pytest.raises(TypeError, match="must be a module"):
        ZeroOrderModule(torch.sin, 0.1, 8)
    with pytest.raises(TypeError, match="`has_aux` has no meaning"):
        ZeroOrderModule(linear(), 0.1, 8, has_aux=True)
    with pytest.raises(ValueError, match="sigma"):
        ZeroOrderModule(linear(), -0.1, 8)
    with pytest.raises(ValueError, match="requires grad"):
        ZeroOrderModule(linear().requires_grad_(False), 0.1, 8)(KEY, X)
    dropped = ZeroOrderModule(nn.Sequential(linear(), nn.Dropout(0.5)), 0.1, 8)
    with pytest.raises(ValueError, match="submodule '1' drops out"):
        dropped(KEY, X)
    assert dropped.eval()(KEY, X).shape == (5, 1)
    normed = ZeroOrderModule(nn.Sequential(linear(), nn.BatchNorm1d(1).double()), 0.1, 8)
    with pytest.raises(ValueError, match="submodule '1' tracks running statistics"):
        normed(KEY, X)
    assert normed.eval()(KEY, X).shape == (5, 1)
