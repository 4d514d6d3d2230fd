"""diffopt.tree.module: modules as pure functions."""

import copy

import pytest
import torch
from torch import nn
from torch.func import grad, jvp, vmap

from diffopt import tree


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def inputs(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(values, expected):
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_function_equals_the_module_and_mutates_nothing(training):
    module = net().train(training)
    function, params, buffers = tree.from_module(module)
    before, kept = snapshot(module), {k: v.clone() for k, v in {**params, **buffers}.items()}
    x = inputs(5, 3)
    output, new_buffers = function(params, buffers, x)
    assert_same(snapshot(module), before)
    assert_same({**params, **buffers}, kept)
    twin = copy.deepcopy(module)
    torch.testing.assert_close(output, twin(x))
    assert_same(new_buffers, dict(twin.named_buffers()))
    assert not any(value.requires_grad for value in (*params.values(), *buffers.values()))


def test_function_ignores_the_values_that_the_module_has_later():
    module = net().eval()
    function, params, buffers = tree.from_module(module)
    params = {name: value.clone() for name, value in params.items()}
    expected, _ = function(params, buffers, inputs(5, 3))
    with torch.no_grad():
        module[0].weight.zero_()
    assert torch.equal(function(params, buffers, inputs(5, 3))[0], expected)
    assert torch.equal(module[0].weight, torch.zeros_like(module[0].weight))


def test_a_module_that_holds_functions_of_its_parameters_sees_the_given_values():
    class Holder(torch.nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.call = lambda x: torch.tanh(super(Holder, self).forward(x))

        def forward(self, x):
            return self.call(x)

    module, x = Holder(), inputs(3).float()
    function, params, buffers = tree.from_module(module)
    doubled = {name: 2 * value for name, value in params.items()}
    expected = torch.tanh(x @ doubled["weight"].T + doubled["bias"])
    torch.testing.assert_close(function(doubled, buffers, x)[0], expected)


def test_gradient_equals_backward():
    module = net()
    function, params, buffers = tree.from_module(module)
    x = inputs(5, 3)
    grads = grad(lambda p: function(p, buffers, x)[0].square().sum())(params)
    module(x).square().sum().backward()
    for name, param in module.named_parameters():
        torch.testing.assert_close(grads[name], param.grad)


def loss_of(function):
    def loss(params, buffers, x):
        output, new_buffers = function(params, buffers, x)
        return output.square().sum(), new_buffers

    return loss


def test_vmap_grad_with_shared_buffers_equals_the_loop():
    function, params, buffers = tree.from_module(net())
    step = grad(loss_of(function), has_aux=True)
    batch = inputs(4, 5, 3)
    grads, new_buffers = vmap(step, in_dims=(None, None, 0))(params, buffers, batch)
    for i, x in enumerate(batch):
        lane_grads, lane_buffers = step(params, buffers, x)
        torch.testing.assert_close({k: v[i] for k, v in grads.items()}, lane_grads)
        torch.testing.assert_close({k: v[i] for k, v in new_buffers.items()}, lane_buffers)


def test_vmap_over_params():
    function, params, buffers = tree.from_module(net())
    stacked = tree.map(lambda p: torch.stack([p, 2 * p]), params)
    x = inputs(5, 3)
    outputs, _ = vmap(function, in_dims=(0, None, None))(stacked, buffers, x)
    torch.testing.assert_close(outputs[0], function(params, buffers, x)[0])


def test_nested_vmap_and_jvp():
    function, params, buffers = tree.from_module(net())
    batch = inputs(2, 3, 5, 3)
    outputs, new_buffers = vmap(vmap(function, (None, None, 0)), (None, None, 0))(params, buffers, batch)
    assert outputs.shape == (2, 3, 5, 2)
    assert new_buffers["1.running_mean"].shape == (2, 3, 4)
    _, tangent = jvp(lambda p: function(p, buffers, batch[0, 0])[0], (params,), (params,))
    assert tangent.isfinite().all()
    assert tangent.abs().sum() > 0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x, *, scale=1.0):
        return scale * self.second(self.first(x))


def test_tied_parameters_stay_tied():
    module = Tied().double()
    function, params, buffers = tree.from_module(module)
    assert list(params) == ["first.weight"]
    x, w = inputs(3), inputs(3, 3)
    output, _ = function({"first.weight": w}, buffers, x, scale=2.0)
    torch.testing.assert_close(output, 2 * w @ (w @ x))
    new = tree.to_module(module, {"first.weight": w}, {})
    assert new.first.weight is new.second.weight
    assert new.first.weight.data_ptr() != w.data_ptr()


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        self.count = self.count + 1
        self.total += x
        return x * self.count


def test_a_submodule_in_two_places_is_left_as_it_was():
    shared = nn.Linear(2, 2).double()
    module = nn.Sequential(shared, nn.Tanh(), nn.BatchNorm1d(2).double(), shared)
    weight, x = shared.weight, inputs(4, 2)
    function, params, buffers = tree.from_module(module)
    doubled = {name: 2 * p for name, p in params.items()}

    def by_hand(p):
        layer = lambda x: x @ p["0.weight"].T + p["0.bias"]  # noqa: E731
        normed = nn.functional.batch_norm(torch.tanh(layer(x)), None, None, p["2.weight"], p["2.bias"], training=True)
        return layer(normed)

    output, new_buffers = function(doubled, buffers, x)
    torch.testing.assert_close(output, by_hand(doubled))
    assert new_buffers["2.num_batches_tracked"] == 1
    assert shared.weight is weight
    assert module[3] is shared
    slope = grad(lambda p: function(p, buffers, x)[0].pow(2).sum())(params)
    torch.testing.assert_close(slope, grad(lambda p: by_hand(p).pow(2).sum())(params))
    assert shared.weight is weight


def test_reassigned_and_updated_buffers_come_back():
    module = Counter()
    function, params, buffers = tree.from_module(module)
    output, buffers = function(params, buffers, torch.tensor(3.0))
    output, buffers = function(params, buffers, torch.tensor(3.0))
    assert output == 6
    assert buffers["count"] == 2
    assert buffers["total"] == 6
    assert module.count == module.total == 0


def test_to_module_round_trip():
    module = net().eval()
    module[0].weight.requires_grad_(False)
    _, params, buffers = tree.from_module(module)
    doubled = {name: 2 * value for name, value in params.items()}
    before = snapshot(module)
    new = tree.to_module(module, doubled, buffers)
    assert_same(snapshot(module), before)
    assert_same({name: value.detach() for name, value in new.named_parameters()}, doubled)
    assert not new.training
    assert not new[0].weight.requires_grad
    assert new[0].bias.requires_grad
    assert_same(snapshot(tree.to_module(module, params)), before)


def test_function_compiles():
    function, params, buffers = tree.from_module(net())
    compiled = torch.compile(lambda p, b, x: function(p, b, x)[0], backend="eager", fullgraph=True)
    x = inputs(5, 3)
    torch.testing.assert_close(compiled(params, buffers, x), function(params, buffers, x)[0])


def test_bad_names_and_shapes():
    module = net()
    function, params, buffers = tree.from_module(module)
    short = {name: value for name, value in params.items() if name != "0.bias"}
    with pytest.raises(ValueError, match=r"`params` must name .* missing \['0.bias'\], unexpected \[\]"):
        function(short, buffers, inputs(5, 3))
    with pytest.raises(ValueError, match=r"`buffers` must name .* unexpected \['extra'\]"):
        function(params, {**buffers, "extra": torch.ones(1)}, inputs(5, 3))
    with pytest.raises(ValueError, match=r"`params\['0.bias'\]` must have shape \(4,\); got \(3,\)"):
        tree.to_module(module, {**params, "0.bias": torch.ones(3)}, buffers)


def test_what_is_no_module_raises():
    with pytest.raises(TypeError, match="Module; got int"):
        tree.from_module(3)
