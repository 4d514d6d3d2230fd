"""diffopt.optimizers.interop: checkpoints of torch optimizers, ours and torch's own, and from one to the other."""

import copy
import io
import pickle
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from diffopt import tree
from diffopt.optimizers import adam, adamw, from_torch_state, nadam, sgd, to_torch, to_torch_state
from diffopt.transforms import add_decayed_weights, chain, clip_by_global_norm, inject_hyperparams, step
from optimizers.torch_problems import FACTORIES, assert_same, clone_of, parameters, problem, train


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FACTORIES)
def test_state_dict_resumes_exactly(name, dtype):
    factory, options = FACTORIES[name]
    params = parameters(dtype)
    optimizer = to_torch(factory, params, **options)
    train(optimizer, params, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = clone_of(params)
    again = to_torch(factory, resumed, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(params, resumed, strict=True):
        kept, loaded = optimizer.state[p], again.state[q]
        assert {n: (x.dtype, x.shape) for n, x in kept.items()} == {n: (x.dtype, x.shape) for n, x in loaded.items()}
    train(optimizer, params, 4)
    train(again, resumed, 4)
    assert_same(params, resumed, 0.0)


def test_state_dict_keeps_different_histories_and_rates():
    params = parameters()
    optimizer = to_torch(adam, params, lr=0.05)
    train(optimizer, params, 3, silent=lambda i, j: j == i)
    optimizer.param_groups[0]["lr"] = 0.02
    resumed = clone_of(params)
    again = to_torch(adam, resumed, lr=0.05)
    seen = []
    again.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(sorted(loaded["state"][0])))
    saved = optimizer.state_dict()
    again.load_state_dict(saved)
    assert seen == [["[0].count", "[0].mu", "[0].nu"]]
    assert again.param_groups[0]["lr"] == 0.02
    train(again, resumed, 3)
    assert int(saved["state"][0]["[0].count"]) == 2, "loading copies"
    train(optimizer, params, 3)
    assert_same(params, resumed, 0.0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_step_alike(duplicate):
    params = parameters()
    optimizer = to_torch(adamw, params, lr=0.05)
    train(optimizer, params, 2)
    again, twins = duplicate((optimizer, params))
    train(optimizer, params, 2)
    train(again, twins, 2)
    assert_same(params, twins, 0.0)


def test_bad_state_dicts_raise_and_change_nothing():
    params = parameters()
    optimizer = to_torch(adam, params, lr=0.05)
    train(optimizer, params, 1)
    reference = torch.optim.Adam(clone_of(params), lr=0.1)
    with pytest.raises(ValueError, match="lacks the hyperparameters"):
        optimizer.load_state_dict(reference.state_dict())
    narrow = optimizer.state_dict()
    narrow["state"][2] = {**narrow["state"][2], "[0].mu": torch.ones(1)}
    with pytest.raises(ValueError, match=r"'\[0\]\.mu' of shape \(3, 2\)"):
        optimizer.load_state_dict(narrow)
    narrow["state"][2] = {**optimizer.state[params[2]], "more": torch.ones(1)}
    with pytest.raises(ValueError, match="has \\['more'\\]"):
        optimizer.load_state_dict(narrow)
    assert int(optimizer.state[params[2]]["[0].count"]) == 1


ADAM: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6}
OURS: dict[str, Any] = {"b1": 0.8, "b2": 0.95, "eps": 1e-6}
PAIRS = {
    "adam": (adam(0.05, **OURS), torch.optim.Adam, {"lr": 0.05, **ADAM}),
    "adam, L2": (
        chain(add_decayed_weights(0.1), adam(0.05, **OURS)),
        torch.optim.Adam,
        {"lr": 0.05, **ADAM, "weight_decay": 0.1},
    ),
    "adamw": (adamw(0.05, **OURS, weight_decay=0.1), torch.optim.AdamW, {"lr": 0.05, **ADAM, "weight_decay": 0.1}),
    "adam, schedule": (adam(lambda count: 0.05, **OURS), torch.optim.Adam, {"lr": 0.05, **ADAM}),
    "sgd": (sgd(0.05), torch.optim.SGD, {"lr": 0.05}),
    "momentum": (sgd(0.05, 0.9), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "nesterov": (sgd(0.05, 0.9, True), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
}
NAMES = ["z", "b.bias", "a"]
"""Of the parameters in torch's order, which is not that of sorted keys."""


def as_tree(params, form):
    """The parameters in forms that need names, or identity, or order."""
    z, bias, a = params
    return {"flat": {"z": z, "b.bias": bias, "a": a}, "nested": {"z": z, "b": {"bias": bias}, "a": a}, "list": params}[
        form
    ]


def leaves_in_order(params, form):
    if form == "list":
        return params
    return [params["z"], params["b.bias"] if form == "flat" else params["b"]["bias"], params["a"]]


def advance(optimizer, params, state, steps, form):
    """Train by diffopt.step."""
    for _ in range(steps):
        grads = torch.func.grad(lambda params: problem(leaves_in_order(params, form)))(params)
        params, state = step(optimizer, grads, state, params)
    return params, state


@pytest.mark.parametrize("form", ["flat", "nested", "list"])
@pytest.mark.parametrize("name", PAIRS)
@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(there=st.integers(0, 3), back=st.integers(0, 3))
def test_training_goes_on_exactly_there_and_back(name, form, there, back):
    optimizer, torch_class, options = PAIRS[name]
    reference, params = parameters(), parameters()
    train(torch_class(reference, **options), reference, there + back + 3)

    source = torch_class(params, **options)
    train(source, params, there)
    ours = as_tree([p.detach().clone() for p in params], form)
    state = from_torch_state(source.state_dict(), optimizer, ours, names=None if form == "list" else NAMES)
    assert tree.flatten(state)[1] == tree.flatten(optimizer.init(ours))[1]
    ours, state = advance(optimizer, ours, state, back, form)

    params = [torch.nn.Parameter(p) for p in leaves_in_order(ours, form)]
    target = torch_class(params, **options)
    target.load_state_dict(to_torch_state(state, ours, target, names=None if form == "list" else NAMES))
    train(target, params, 3)
    assert_same(params, reference)


@pytest.mark.parametrize("by", ["identity", "its own names"])
def test_parameters_are_matched_without_names(by):
    params = parameters()
    source = torch.optim.Adam(params if by == "identity" else list(zip(NAMES, params, strict=True)), lr=0.05)
    train(source, params, 2)
    held = as_tree(params if by == "identity" else clone_of(params), "flat")
    state = from_torch_state(source if by == "identity" else source.state_dict(), adam(0.05), held)
    for name, p in zip(NAMES, params, strict=True):
        assert torch.equal(state[0].mu[name], source.state[p]["exp_avg"])
        assert state[0].mu[name] is not source.state[p]["exp_avg"]
    target = torch.optim.Adam(params if by == "identity" else list(zip(NAMES, clone_of(params), strict=True)), lr=0.05)
    saved = to_torch_state(state, held, target)
    for i, p in enumerate(params):
        assert torch.equal(saved["state"][i]["exp_avg_sq"], source.state[p]["exp_avg_sq"])
        assert saved["state"][i]["step"].item() == 2.0


def test_dtypes_follow_each_side():
    params = parameters(torch.bfloat16)
    source = torch.optim.AdamW(params, lr=0.05)
    train(source, params, 2)
    state = from_torch_state(source, adamw(0.05), params)
    assert {x.dtype for x in state[0].mu} == {torch.float32}
    saved = to_torch_state(state, params, source.state_dict())
    assert {own["exp_avg"].dtype for own in saved["state"].values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", PAIRS)
def test_no_state_yet_is_the_initial_state(name):
    optimizer, torch_class, options = PAIRS[name]
    params = parameters()
    state = from_torch_state(torch_class(params, **options), optimizer, params)
    for x, y in zip(tree.leaves(state), tree.leaves(optimizer.init(params)), strict=True):
        assert torch.equal(x, y)


def trained(torch_class: Any = torch.optim.Adam, groups=lambda params: params, silent=lambda i, j: False, **options):
    params = parameters()
    optimizer = torch_class(groups(params), **{"lr": 0.05, **options})
    train(optimizer, params, 2, silent=silent)
    return optimizer.state_dict()


def flat():
    return as_tree(parameters(), "flat")


@pytest.mark.parametrize(
    ("source", "optimizer", "params", "match"),
    [
        (lambda: trained(amsgrad=True), adam(0.05), parameters, "amsgrad=True cannot"),
        (lambda: trained(maximize=True), adam(0.05), parameters, "maximize=True cannot"),
        (lambda: trained(torch.optim.SGD, momentum=0.9, dampening=0.1), sgd(0.05, 0.9), parameters, "dampening=0.1"),
        (lambda: trained(torch.optim.NAdam), nadam(0.05), parameters, "Only torch.optim.Adam"),
        (lambda: trained(torch.optim.RMSprop), adam(0.05), parameters, "Only torch.optim.Adam"),
        (lambda: trained(silent=lambda i, j: i == j), adam(0.05), parameters, r"numbers of steps, \[1, 2\]"),
        (lambda: trained(silent=lambda i, j: j == 0), adam(0.05), parameters, r"numbers of steps, \[0, 2\]"),
        (
            lambda: trained(groups=lambda p: [{"params": p[:1], "lr": 0.1}, {"params": p[1:]}]),
            adam(0.05),
            parameters,
            r"differ in \['lr'\]",
        ),
        (trained, adam(0.05), lambda: parameters()[:2], "2 tensors, and the torch optimizer 3"),
        (trained, adam(0.05), lambda: parameters()[::-1], "exp_avg for `params\\[0\\]` must have shape"),
        (trained, adam(0.05), flat, "Pass `names`"),
        (trained, sgd(0.05, 0.9), parameters, r"has \['TraceState'\]"),
        (lambda: trained(torch.optim.SGD), adam(0.05), parameters, r"has \['ScaleByAdamState'\]"),
        (trained, nadam(0.05), parameters, "keeps a state that"),
        (trained, inject_hyperparams(adam)(0.05), parameters, "keeps a state that"),
        (trained, chain(adam(0.05), adam(0.05)), parameters, "needs a transformation with one"),
        (
            lambda: trained(torch.optim.SGD, momentum=0.9),
            sgd(lambda count: 0.05, 0.9),
            parameters,
            "keeps no count, from which",
        ),
        (dict, adam(0.05), parameters, "Expected a torch optimizer or its state dict"),
    ],
)
def test_what_cannot_be_converted_raises(source, optimizer, params, match):
    with pytest.raises(ValueError, match=match):
        from_torch_state(source(), optimizer, params())


def test_wrong_names_raise():
    with pytest.raises(ValueError, match=r"they differ in \['b', 'b.bias'\]"):
        from_torch_state(trained(), adam(0.05), flat(), names=["z", "b", "a"])
    with pytest.raises(ValueError, match="not those of torch's"):
        from_torch_state(trained(), adam(0.05), flat(), names=["z", "b.bias", "a", "a"])


def test_a_state_that_does_not_fit_raises():
    params = parameters()
    target = torch.optim.Adam(params, lr=0.05)
    with pytest.raises(ValueError, match=r"`state\.mu\[2\]` must have shape \(3, 2\)"):
        to_torch_state(adam(0.05).init([*params[:2], torch.ones(2)]), params, target)
    with pytest.raises(ValueError, match="one ScaleByAdamState"):
        to_torch_state(sgd(0.05, 0.9).init(params), params, target)
    with pytest.raises(ValueError, match="has momentum=0"):
        to_torch_state(sgd(0.05, 0.9).init(params), params, torch.optim.SGD(params, lr=0.05))
    clipped = chain(clip_by_global_norm(1.0), adam(0.05)).init(params)
    assert sorted(to_torch_state(clipped, params, target)["state"]) == [0, 1, 2]
