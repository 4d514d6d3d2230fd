"""diffopt.nn.meta_optimizer: steps in place equal the functional path, and gradients flow through them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap

import diffopt
from diffopt import schedules, tree
from diffopt.nn import MetaOptimizer, extract_state, functional, recover_state, stop_gradient
from diffopt.optimizers import adagrad, rmsprop, sam, schedule_free
from diffopt.transforms import (
    accumulate,
    add_decayed_weights,
    clip_by_global_norm,
    inject_hyperparams,
    lookahead,
    scale_by_polyak,
)
from nn.problems import F64, leaf, mlp, numbers

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # the same float64 operations, in another order
SLOPES = {"rtol": 1e-6, "atol": 1e-8}  # central differences of width 1e-5


X, Y, X_NEW, Y_NEW = numbers(6, 3), numbers(6, 1, seed=1), numbers(5, 3, seed=2), numbers(5, 1, seed=3)


def inner_loss(net):
    return ((net(X) - Y) ** 2).mean()


def outer_loss(net):
    return ((net(X_NEW) - Y_NEW) ** 2).mean()


def unrolled(module, make, rate, steps=3):
    """The same by diffopt.step: the outer loss as a function of the start and of the rate."""
    function, params, buffers = tree.from_module(module)

    def run(params, rate):
        optimizer = make(rate)
        state = optimizer.init(params)
        for _ in range(steps):
            value = lambda p: ((function(p, buffers, X)[0] - Y) ** 2).mean()  # noqa: E731
            params, state = diffopt.step(
                optimizer, grad(value)(params), state, params, value=value(params), grad_fn=grad(value)
            )
        return ((function(params, buffers, X_NEW)[0] - Y_NEW) ** 2).mean()

    return torch.func.grad_and_value(run, argnums=(0, 1))(params, rate)


OPTIMIZERS = {
    "sgd": lambda rate: diffopt.sgd(rate, momentum=0.9),
    "adam": lambda rate: diffopt.adam(rate, eps_root=1e-8),
    "adamw": lambda rate: diffopt.adamw(rate, weight_decay=0.1, eps_root=1e-8),
    "rmsprop": lambda rate: rmsprop(rate, eps_root=1e-8),
    "adagrad": lambda rate: adagrad(rate, 0.1),
    "clipped": lambda rate: diffopt.chain(clip_by_global_norm(0.1), diffopt.sgd(rate)),
    "decayed": lambda rate: diffopt.chain(add_decayed_weights(0.1), diffopt.adam(rate, eps_root=1e-8)),
    "schedule": lambda rate: diffopt.sgd(schedules.exponential_decay(rate, 1, 0.5)),
    "accumulate": lambda rate: accumulate(diffopt.sgd(rate), 2),
    "lookahead": lambda rate: lookahead(diffopt.sgd(rate), sync_period=2),
    "schedule_free": lambda rate: schedule_free(rate),
    "polyak": lambda rate: diffopt.chain(scale_by_polyak(), diffopt.sgd(rate)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_the_functional_path(name):
    check_against_unrolled(mlp(), OPTIMIZERS[name], leaf(0.05), steps=3)


def check_against_unrolled(net, make, rate, steps):
    """The value, and the gradients in the start and in the rate."""
    start = dict(net.named_parameters())
    (expected, expected_rate), expected_value = unrolled(net, make, rate.detach(), steps=steps)
    inner = MetaOptimizer(net, make(rate))
    for _ in range(steps):
        inner.step(inner_loss(net))
    value = outer_loss(net)
    value.backward()
    torch.testing.assert_close(value, expected_value, **EXACT)
    torch.testing.assert_close({n: p.grad for n, p in start.items()}, expected, **EXACT)
    torch.testing.assert_close(rate.grad, expected_rate, **EXACT)


def test_a_second_gradient_is_handed_on():
    net, rate = mlp(), torch.tensor(0.05, dtype=F64)
    (expected, _), _ = unrolled(net, lambda rate: sam(diffopt.sgd(rate), 0.1), rate, steps=1)
    start = dict(net.named_parameters())
    function, _, buffers = functional(net)
    MetaOptimizer(net, sam(diffopt.sgd(rate), 0.1)).step(
        inner_loss(net), grad_fn=grad(lambda p: ((function(p, buffers, X)[0] - Y) ** 2).mean())
    )
    outer_loss(net).backward()
    torch.testing.assert_close({n: p.grad for n, p in start.items()}, expected, **EXACT)


def test_agrees_with_finite_differences():
    def outer(log_rate, scale):
        net = mlp()
        for p in net.parameters():
            p.requires_grad_(True)
        inner = MetaOptimizer(net, diffopt.adam(log_rate.exp(), eps_root=1e-8))
        for _ in range(3):
            inner.step(scale * inner_loss(net) + 0.1 * net[0].weight.square().sum() * scale)
        return outer_loss(net)

    point = torch.tensor([-2.0, 0.7], dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(outer(*point.unbind()), point)
    h = 1e-5
    for i, e in enumerate(torch.eye(2, dtype=F64)):
        slope = (outer(*(point.detach() + h * e)) - outer(*(point.detach() - h * e))) / (2 * h)
        torch.testing.assert_close(found[i], slope.detach(), **SLOPES)


def test_a_meta_network_gets_its_gradient():
    torch.manual_seed(1)
    weigher = nn.Linear(3, 1).double()

    def outer():
        net = mlp()
        inner = MetaOptimizer(net, diffopt.sgd(0.1))
        for _ in range(2):
            inner.step((weigher(X).sigmoid() * (net(X) - Y) ** 2).mean())
        return outer_loss(net)

    outer().backward()
    h, weight = 1e-5, weigher.weight
    for i in range(3):
        e = torch.zeros(1, 3, dtype=F64)
        e[0, i] = h
        values = []
        for move in (e, -2 * e):
            weight.data.add_(move)
            values.append(outer().detach())
        weight.data.add_(e)
        torch.testing.assert_close(weight.grad[0, i], (values[0] - values[1]) / (2 * h), **SLOPES)


def test_maml_loop_trains():
    """As TorchOpt's documentation shows it: extract, adapt each task, recover, and step the outer optimizer."""
    net = mlp()
    outer = torch.optim.SGD(net.parameters(), lr=0.05)
    inner = MetaOptimizer(net, diffopt.sgd(0.1))
    tasks = [(numbers(6, 3, seed=s), numbers(3, 1, seed=s + 50)) for s in range(4)]
    losses = []
    for _ in range(30):
        start, inner_start = extract_state(net), extract_state(inner)
        total = torch.zeros((), dtype=F64)
        for x, w in tasks:
            for _ in range(2):
                inner.step(((net(x) - x @ w) ** 2).mean())
            total = total + ((net(X_NEW) - X_NEW @ w) ** 2).mean()
            recover_state(net, start)
            recover_state(inner, inner_start)
        outer.zero_grad()
        total.backward()
        outer.step()
        losses.append(total.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in net.parameters())


def test_maml_loop_equals_the_vmapped_gradient():
    net = mlp()
    function, params, buffers = tree.from_module(net)
    xs, ys = numbers(3, 6, 3, seed=5), numbers(3, 6, 1, seed=6)

    def task(params, x, y):
        value = lambda p: ((function(p, buffers, x)[0] - y) ** 2).mean()  # noqa: E731
        new, _ = diffopt.step(diffopt.sgd(0.1), grad(value)(params), diffopt.sgd(0.1).init(params), params)
        return value(new)

    expected = grad(lambda p: vmap(task, in_dims=(None, 0, 0))(p, xs, ys).sum())(params)
    start = extract_state(net)
    for x, y in zip(xs, ys, strict=True):
        MetaOptimizer(net, diffopt.sgd(0.1)).step(((net(x) - y) ** 2).mean())
        ((net(x) - y) ** 2).mean().backward()
        recover_state(net, start)
    torch.testing.assert_close({n: p.grad for n, p in net.named_parameters()}, expected, **EXACT)


def test_several_networks_step_together_or_apart():
    def run(together):
        actor, critic = mlp(seed=0), mlp(seed=1)
        starts = [*actor.parameters(), *critic.parameters()]
        if together:
            inner = [MetaOptimizer({"actor": actor, "critic": critic}, diffopt.sgd(0.1, momentum=0.9))]
        else:
            inner = [MetaOptimizer(net, diffopt.sgd(0.1, momentum=0.9)) for net in (actor, critic)]
        for _ in range(2):
            loss = (actor(X) * critic(X)).mean() + (actor(X) - Y).square().mean() + critic(X).square().mean()
            for optimizer in inner:
                optimizer.step(loss)
        return torch.autograd.grad((actor(X_NEW) + critic(X_NEW)).square().mean(), starts)

    torch.testing.assert_close(run(True), run(False), **EXACT)


def test_plain_tensors_step_too():
    w, rate = torch.tensor([2.0, -1.0], dtype=F64, requires_grad=True), leaf(0.1)
    layer = nn.Linear(2, 1, bias=False).double()
    inner = MetaOptimizer({"w": w, "net": [layer]}, diffopt.sgd(rate))
    for _ in range(2):
        inner.step(inner.params["w"].square().sum() + inner.params["net"][0]["weight"].square().sum())
    assert inner.params["net"][0]["weight"] is layer.weight
    torch.testing.assert_close(inner.tensors[0], 0.64 * w, **EXACT)
    (slope,) = torch.autograd.grad(inner.params["w"].sum(), rate)
    torch.testing.assert_close(slope, -4 * 0.8 * w.sum(), **EXACT)


def test_unused_parameters_raise_or_get_zeros():
    net = nn.ModuleDict({"used": nn.Linear(3, 1), "other": nn.Linear(3, 1)}).double()
    inner = MetaOptimizer(net, diffopt.sgd(0.1, momentum=0.9))
    with pytest.raises(ValueError, match=r"does not depend on params\['other.bias'\].*allow_unused"):
        inner.step(net["used"](X).sum())
    other, used = net["other"].weight, net["used"].weight
    inner.step(net["used"](X).sum(), allow_unused=True)
    assert torch.equal(net["other"].weight, other)
    assert not torch.equal(net["used"].weight, used)


def test_a_loss_by_old_parameters_raises():
    net = mlp()
    params = list(net.parameters())
    inner = MetaOptimizer(net, diffopt.sgd(0.1))
    loss = lambda: sum(p.square().sum() for p in params)  # noqa: E731
    inner.step(loss())
    with pytest.raises(ValueError, match="as it is after the step before"):
        inner.step(loss())


def test_frozen_parameters_and_buffers_stay():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    net[0].requires_grad_(False)
    frozen, count = net[0].weight, net[1].num_batches_tracked
    mean = net[1].running_mean
    inner = MetaOptimizer(net, diffopt.sgd(0.1))
    assert "0.weight" not in inner.params
    inner.step(inner_loss(net))
    assert net[0].weight is frozen
    assert net[1].running_mean is mean
    assert count == 1
    assert set(dict(net.named_parameters())) == {"0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}


def test_tied_parameters_stay_tied_and_step_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False).double()
            self.second = nn.Linear(3, 3, bias=False).double()
            self.second.weight = self.first.weight
            self.alias = [self.first.weight]

        def forward(self, x):
            return self.second(self.first(x)) @ self.alias[0]

    net = Tied()
    start = net.first.weight
    gradient = torch.autograd.grad(net(X).square().mean(), start)[0]
    inner = MetaOptimizer(net, diffopt.sgd(0.1))
    assert list(inner.params) == ["first.weight"]
    inner.step(net(X).square().mean())
    assert net.first.weight is net.second.weight
    assert net.alias[0] is net.first.weight
    torch.testing.assert_close(net.first.weight, start - 0.1 * gradient, **EXACT)
    inner.step(net(X).square().mean())


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_recurrent_nets(make):
    torch.manual_seed(0)
    net = make(3, 2).double()
    function, params, buffers = tree.from_module(net)
    start = dict(net.named_parameters())
    x = numbers(4, 1, 3)

    def outer(params):
        for _ in range(2):
            slope = grad(lambda p: function(p, buffers, x)[0][0].square().sum())(params)
            params = tree.map(lambda p, g: p - 0.1 * g, params, slope)
        return function(params, buffers, x)[0][0].sum()

    inner = MetaOptimizer(net, diffopt.sgd(0.1))
    for _ in range(2):
        inner.step(net(x)[0].square().sum())
    net(x)[0].sum().backward()
    torch.testing.assert_close({n: p.grad for n, p in start.items()}, grad(outer)(params), **EXACT)


@pytest.mark.parametrize("training", [True, False])
def test_train_and_eval_modes(training):
    torch.manual_seed(0)
    net, rate = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double(), leaf(0.1)
    net(X)  # so that the running statistics are not those of the start
    net.train(training)
    check_against_unrolled(net, diffopt.sgd, rate, steps=2)


def test_first_order_is_fomaml():
    net = mlp()
    start = dict(net.named_parameters())
    inner = MetaOptimizer(net, diffopt.sgd(0.1), first_order=True)
    for _ in range(2):
        inner.step(inner_loss(net))
    end = dict(net.named_parameters())
    loss = outer_loss(net)
    expected = torch.autograd.grad(loss, list(end.values()), retain_graph=True)
    found = torch.autograd.grad(loss, list(start.values()))
    torch.testing.assert_close(found, expected, **EXACT)


def test_a_hyperparameter_in_the_state():
    net, rate = mlp(), leaf(0.1)
    inner = MetaOptimizer(net, inject_hyperparams(diffopt.sgd)(learning_rate=rate))
    inner.step(inner_loss(net))
    stop_gradient(net)
    stop_gradient(inner)
    (_, expected), _ = unrolled(net, diffopt.sgd, rate.detach(), steps=1)
    inner.step(inner_loss(net))
    outer_loss(net).backward()
    torch.testing.assert_close(rate.grad, expected, **EXACT)


@settings(max_examples=15)
@given(rate=st.floats(0.01, 0.5), steps=st.integers(1, 4))
def test_steps_down_a_parabola(rate, steps):
    net = nn.Linear(1, 1, bias=False).double()
    start = net.weight
    inner = MetaOptimizer(net, diffopt.sgd(rate))
    for _ in range(steps):
        inner.step(net.weight.square().sum() / 2)
    (slope,) = torch.autograd.grad(net.weight.sum(), start)
    torch.testing.assert_close(slope.item(), (1 - rate) ** steps)
