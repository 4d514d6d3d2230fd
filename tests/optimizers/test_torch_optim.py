"""diffopt.optimizers.interop: torch.optim.Optimizers of transformations against torch's own."""

import io
from typing import Any, cast

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.optim import lr_scheduler

from diffopt import tree
from diffopt.optimizers import adam, adamw, nadam, sam, sgd, to_torch
from diffopt.transforms import (
    GradientTransformation,
    chain,
    clip_by_global_norm,
    scale_by_polyak,
    step,
)
from optimizers.torch_problems import FACTORIES, assert_same, parameters, problem, train

TORCH = {
    "adam": (adam, {"b1": 0.8}, torch.optim.Adam, {"betas": (0.8, 0.999)}),
    "adamw": (adamw, {"weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
    "sgd": (sgd, {}, torch.optim.SGD, {}),
    "momentum": (sgd, {"momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8}),
    "nesterov": (sgd, {"momentum": 0.8, "nesterov": True}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "nadam": (nadam, {"momentum_decay": 0.1}, torch.optim.NAdam, {"betas": (0.9, 0.999), "momentum_decay": 0.1}),
}

TOLERANCE = dict.fromkeys(TORCH, 1e-12) | {"nadam": 1e-8}
"""torch's NAdam keeps the product of its momenta in float32."""


@pytest.mark.parametrize("name", TORCH)
def test_trajectory_of_torch_with_groups_and_a_schedule(name):
    factory, ours, torch_class, theirs = TORCH[name]
    mine, other = parameters(), parameters()

    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]

    optimizer, reference = (
        to_torch(factory, groups(mine), lr=0.05, **ours),
        torch_class(groups(other), lr=0.05, **theirs),
    )
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    train(optimizer, mine, 20, schedule)
    train(reference, other, 20, lr_scheduler.CosineAnnealingLR(reference, T_max=10))
    assert_same(mine, other, TOLERANCE[name])
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in reference.param_groups]


@pytest.mark.parametrize("name", TORCH)
@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(missing=st.lists(st.sets(st.integers(0, 2)), min_size=6, max_size=6))
def test_parameters_without_gradient_wait_as_in_torch(name, missing):
    factory, ours, torch_class, theirs = TORCH[name]
    mine, other = parameters(), parameters()
    train(to_torch(factory, mine, lr=0.05, **ours), mine, 6, silent=lambda i, j: j in missing[i])
    train(torch_class(other, lr=0.05, **theirs), other, 6, silent=lambda i, j: j in missing[i])
    assert_same(mine, other, TOLERANCE[name])


def test_state_of_a_waiting_parameter_stays():
    params = parameters()
    optimizer = to_torch(adam, params, lr=0.05)
    train(optimizer, params, 2)
    before = {name: x.clone() for name, x in optimizer.state[params[0]].items()}
    train(optimizer, params, 3, silent=lambda i, j: j == 0)
    assert all(torch.equal(x, before[name]) for name, x in optimizer.state[params[0]].items())
    assert int(optimizer.state[params[0]]["[0].count"]) == 2
    assert int(optimizer.state[params[1]]["[0].count"]) == 5


def test_a_learning_rate_may_be_a_tensor():
    params, others = parameters(), parameters()
    for each, leaves in [
        (to_torch(adam, params, lr=torch.tensor(0.05, dtype=torch.float64)), params),
        (torch.optim.Adam(others, lr=0.05), others),
    ]:
        train(each, leaves, 8, lr_scheduler.ExponentialLR(each, 0.9))
    assert_same(params, others)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_sgd_cycles_its_momentum(momentum):
    params, others = parameters(), parameters()
    optimizer = to_torch(sgd, params, lr=0.05, momentum=momentum)
    reference = torch.optim.SGD(others, lr=0.05, momentum=momentum or 0.0)
    runs = [(optimizer, params), (reference, others)]
    for each, leaves in runs:
        cycles = lr_scheduler.OneCycleLR(each, 0.1, total_steps=12, cycle_momentum=momentum is not None)
        train(each, leaves, 10, cycles)
    assert_same(params, others)


def test_one_cycle_of_adam_leaves_the_betas():
    params, others = parameters(), parameters()
    optimizer, reference = to_torch(adam, params, lr=0.05), torch.optim.Adam(others, lr=0.05)
    with pytest.raises(ValueError, match="cycle_momentum"):
        lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)
    for each, leaves in [(optimizer, params), (reference, others)]:
        train(each, leaves, 10, lr_scheduler.OneCycleLR(each, 0.1, total_steps=12, cycle_momentum=False))
    assert_same(params, others)


@pytest.mark.parametrize("lr", [None, lambda count: 0.1 * 0.9**count])
def test_a_rate_inside_the_transformation_cannot_be_scheduled(lr):
    params = parameters()
    optimizer = to_torch(adam(0.1), params) if lr is None else to_torch(adam, params, lr=lr)
    with pytest.raises(KeyError, match="no 'lr' to schedule"):
        lr_scheduler.StepLR(optimizer, 10)
    train(optimizer, params, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FACTORIES)
def test_steps_are_those_of_the_transformation(name, dtype):
    factory, options = FACTORIES[name]
    params = parameters(dtype)
    train(to_torch(factory, params, **options), params, 8)
    names = {"learning_rate" if key == "lr" else key: value for key, value in options.items()}
    transformation = factory if isinstance(factory, GradientTransformation) else factory(**names)
    expected = [leaf.detach() for leaf in parameters(dtype)]
    state = transformation.init(expected)
    for _ in range(8):
        expected, state = step(transformation, torch.func.grad(problem)(expected), state, expected)
    assert_same(params, expected, 1e-12 if dtype is torch.float64 else 1e-2)


def test_add_param_group_begins_anew():
    (*mine, late), (*other, late_other) = parameters(), parameters()
    optimizer, reference = to_torch(adam, mine, lr=0.05), torch.optim.Adam(other, lr=0.05)
    for each, first, new in [(optimizer, mine, late), (reference, other, late_other)]:
        train(each, [*first, new.detach()], 2)
        each.add_param_group({"params": new, "lr": 0.01})
        train(each, [*first, new], 3)
    assert_same([*mine, late], [*other, late_other])


def test_closure_gives_the_loss_and_hooks_run():
    params, seen = parameters(), []
    optimizer = to_torch(adam, params, lr=0.05)
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))

    def closure():
        optimizer.zero_grad()
        value = problem(params)
        value.backward()
        return value

    first = optimizer.step(closure)
    assert torch.equal(first, problem(parameters()))
    assert optimizer.step(closure) < first
    assert seen == ["pre", "post"] * 2


def test_polyak_takes_the_loss_of_the_closure():
    params, expected = parameters(), [p.detach() for p in parameters()]
    transformation = chain(scale_by_polyak(max_learning_rate=0.1), sgd(1.0))
    optimizer = to_torch(transformation, params)
    for _ in range(3):
        value = problem(expected)
        grads = torch.func.grad(problem)(expected)
        expected, _ = step(transformation, grads, transformation.init(expected), expected, value=value)

        def closure():
            optimizer.zero_grad()
            value = problem(params)
            value.backward()
            return value

        optimizer.step(closure)
    assert_same(params, expected)
    with pytest.raises(ValueError, match="value"):
        optimizer.step()


def test_sam_calls_the_closure_twice():
    params, expected, calls = parameters(), [p.detach() for p in parameters()], []
    optimizer = to_torch(sam, params, optimizer=sgd(0.05, 0.9), rho=0.1)
    transformation = sam(sgd(0.05, 0.9), rho=0.1)
    state, gradient = transformation.init(expected), torch.func.grad(problem)

    def closure():
        optimizer.zero_grad()
        calls.append(problem(params))
        calls[-1].backward()
        return calls[-1]

    for _ in range(3):
        assert optimizer.step(closure) is calls[-2]
        expected, state = step(transformation, gradient(expected), state, expected, grad_fn=gradient)
    assert_same(params, expected)
    problem(params).backward()
    with pytest.raises(ValueError, match=r"call step\(closure\)"):
        optimizer.step()
    grouped = to_torch(sam, [{"params": params[:1]}, {"params": params[1:]}], optimizer=sgd(0.05))
    with pytest.raises(ValueError, match=r"diffopt\.step"):
        grouped.step(closure)


def test_tied_parameters_step_as_in_torch():
    memory, other = torch.arange(1.0, 5.0), torch.arange(1.0, 5.0)
    ours, theirs = ([torch.nn.Parameter(x[:3]), torch.nn.Parameter(x[1:])] for x in (memory, other))
    optimizer, reference = to_torch(adam, ours, lr=0.1), torch.optim.Adam(theirs, lr=0.1, foreach=False)
    for each, params in [(optimizer, ours), (reference, theirs)]:
        for _ in range(3):
            each.zero_grad()
            (params[0].square().sum() + params[1].pow(3).sum()).backward()
            each.step()
    torch.testing.assert_close(memory, other)


def test_a_model_with_a_shared_weight_trains():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3), torch.nn.Tanh())
    model[2].weight = model[0].weight
    optimizer = to_torch(adamw, model.named_parameters(), lr=0.05)
    x, y = torch.randn(20, 3), torch.rand(20, 3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append((model(x) - y).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "2.bias"]


def test_a_step_is_seen_by_autograd():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = to_torch(adam, [weight], lr=0.1)
    saved = weight.square().sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_grad_scaler_skips_steps_that_are_not_finite():
    params, others = parameters(torch.float32), parameters(torch.float32)
    optimizer, reference = to_torch(adam, params, lr=0.05), torch.optim.Adam(others, lr=0.05)
    for each, leaves in [(optimizer, params), (reference, others)]:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for factor in (1.0, torch.inf, 1.0):
            each.zero_grad()
            scaler.scale(problem(leaves) * factor).backward()
            scaler.step(each)
            scaler.update()
    assert int(optimizer.state[params[0]]["[0].count"]) == 2
    assert_same(params, others, 1e-6)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: to_torch(adam, p, learning_rate=0.1), TypeError, "called 'lr'"),
        (lambda p: to_torch(adam, p, lr=0.1, betas=(0.9, 0.99)), TypeError, "no hyperparameter 'betas'"),
        (lambda p: to_torch(adam, p), ValueError, "lr"),
        (lambda p: to_torch(adam, p, lr=0.1, b2=1.0), ValueError, "`b2` must be"),
        (lambda p: to_torch(adam, [{"params": p, "b2": 1.0}], lr=0.1), ValueError, "`b2` must be"),
        (lambda p: to_torch(adam, [{"params": p, "weight_decay": 0.1}], lr=0.1), TypeError, "weight_decay"),
        (lambda p: to_torch(adamw, [{"params": p, "mask": lambda q: q}], lr=0.1), TypeError, "mask"),
        (lambda p: to_torch(adam(0.1), p, lr=0.1), TypeError, "Pass the factory"),
        (lambda p: to_torch(chain, p), TypeError, "arguments have names"),
        (lambda p: to_torch(lambda **options: adam(**options), p, lr=0.1), TypeError, "arguments have names"),
        (lambda p: to_torch(cast(Any, 3), p), TypeError, "needs a transformation"),
        (lambda p: to_torch(lambda learning_rate: learning_rate, p, lr=0.1), TypeError, "must give a Gradient"),
        (lambda p: to_torch(adam, [], lr=0.1), ValueError, "empty"),
        (lambda p: to_torch(adam, [torch.ones(1, dtype=torch.complex64)], lr=0.1), TypeError, "complex64"),
    ],
)
def test_bad_arguments_raise(make, error, match):
    with pytest.raises(error, match=match):
        make(parameters())


def test_a_factory_of_several_members_has_its_options_in_the_groups():
    def factory(learning_rate, clip=1.0):
        return chain(clip_by_global_norm(clip), sgd(learning_rate))

    params = [torch.nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2)]
    optimizer = to_torch(factory, [{"params": params[:1]}, {"params": params[1:], "clip": 10.0}], lr=1.0)
    for p in params:
        p.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert_same(params, [torch.tensor([2.4, 3.2]), torch.zeros(2)], 1e-6)


def test_sparse_gradients_raise_before_anything_moves():
    table, other = torch.nn.Embedding(5, 2, sparse=True), torch.nn.Parameter(torch.ones(1))
    optimizer = to_torch(sgd, [{"params": [other]}, {"params": table.parameters()}], lr=0.1)
    (table(torch.tensor([1])).sum() + other.sum()).backward()
    with pytest.raises(ValueError, match="sparse gradient"):
        optimizer.step()
    assert other.item() == 1.0


def test_a_mask_is_the_same_for_all_groups():
    def matrices(params):
        return tree.map(lambda p: p.ndim == 2, params)

    params, others = parameters(), parameters()
    optimizer = to_torch(adamw, params, lr=0.05, weight_decay=0.5, mask=matrices)
    decayed = [{"params": others[2:], "weight_decay": 0.5}, {"params": others[:2], "weight_decay": 0.0}]
    train(optimizer, params, 5)
    train(torch.optim.AdamW(decayed, lr=0.05), others, 5)
    assert_same(params, others)
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    assert "mask" not in torch.load(file, weights_only=True)["param_groups"][0]


def test_momentum_may_begin_late():
    params, others = parameters(), parameters()
    for each, leaves in [(to_torch(sgd, params, lr=0.05), params), (torch.optim.SGD(others, lr=0.05), others)]:
        train(each, leaves, 2)
        each.param_groups[0]["momentum"] = 0.9
        train(each, leaves, 3)
    assert_same(params, others)
