"""Donated steps: in place where that is safe, raising where it is not, and never a wrong gradient behind it."""

import pytest
import torch
from torch import nn

from diffopt import tree
from diffopt.optimizers import adam, adamw, lion, nadam, rmsprop, sgd
from diffopt.transforms import GradientTransformation, chain, clip_by_global_norm, step
from diffopt.transforms.donation import check_donation, mark_written

OPTIMIZERS = {
    "sgd": sgd(0.1),
    "momentum": sgd(0.1, 0.9),
    "nesterov": sgd(0.1, 0.9, True),
    "adam": adam(0.1),
    "adam, eps_root": adam(0.1, eps_root=1e-6),
    "adamw, masked": adamw(0.1, weight_decay=0.3, mask=lambda p: tree.map(lambda x: x.ndim > 1, p)),
    "rmsprop": rmsprop(0.1),
    "lion": lion(0.1),
    "schedule": adam(lambda count: 0.1 * 0.5**count),
    "clipped": chain(clip_by_global_norm(0.5), adamw(0.1)),
    "nadam": nadam(0.1),
}


def start(dtype=torch.float32):
    """Leaves of odd shapes and strides: transposed, sliced, 0-d, empty."""
    generator = torch.Generator().manual_seed(0)
    w, v, s = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(3, 4), (7,), ()])
    return {"w": w.to(dtype).T, "v": v.to(dtype)[::2], "s": (s.to(dtype), torch.empty(0, 2, dtype=dtype))}


def loss(p):
    return torch.cosh(p["w"]).sum() + (p["v"] ** 2).sum() * p["s"][0] + p["s"][0] ** 2


def unrolled(optimizer, params, *, donate, steps=4):
    params = tree.map(torch.clone, params) if donate else params
    state = optimizer.init(params)
    for _ in range(steps):
        grads = torch.func.grad(loss)(params)
        params, state = step(optimizer, grads, state, params, donate=donate)
    return params, state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_donated_steps_are_the_pure_ones(name, dtype):
    want = unrolled(OPTIMIZERS[name], start(dtype), donate=False)
    got = unrolled(OPTIMIZERS[name], start(dtype), donate=True)
    torch.testing.assert_close(tree.leaves(got), tree.leaves(want))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "nadam"])
def test_the_memory_is_that_of_the_arguments(name):
    optimizer, params = OPTIMIZERS[name], start()
    state = optimizer.init(params)
    before = tree.leaves(params)
    versions = [x._version for x in before]
    for _ in range(3):
        params, state = step(optimizer, torch.func.grad(loss)(params), state, params, donate=True)
        assert all(map(lambda a, b: a is b, tree.leaves(params), before))
    assert all(x._version > v for x, v in zip(before, versions, strict=True))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "nadam"])
@pytest.mark.parametrize("late", [False, True])
def test_a_graph_that_saved_a_donated_buffer_raises(name, late):
    optimizer, p = OPTIMIZERS[name], torch.tensor([0.5, -0.4])
    state = optimizer.init(p)
    if late:  # the second donated step takes a shorter way
        p, state = step(optimizer, 2 * p, state, p, donate=True)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    product = (x * p).sum()
    p, state = step(optimizer, torch.ones(2), state, p, donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def overlapping():
    base = torch.ones(4)
    return {
        "a tied leaf": [base, base],
        "a view": [base, base[1:]],
        "an expanded tensor": [torch.ones(1).expand(3)],
        "windows": [torch.ones(5).as_strided((3, 3), (1, 1))],
    }


@pytest.mark.parametrize("name", ["adam", "rmsprop", "nadam"])
@pytest.mark.parametrize("case", overlapping())
def test_shared_memory_raises(name, case):
    params = overlapping()[case]
    optimizer = OPTIMIZERS[name]
    state, before = optimizer.init(params), [p.clone() for p in params]
    with pytest.raises(ValueError, match="memory"):
        step(optimizer, [p.clone() for p in params], state, params, donate=True)
    assert all(map(torch.equal, params, before))
    step(optimizer, [p.clone() for p in params], state, params)


def test_gradients_and_moments_in_the_parameters_memory_raise():
    optimizer, p = adam(0.1), torch.ones(6)
    with pytest.raises(ValueError, match="share no memory"):
        step(optimizer, p[3:], optimizer.init(p[:4][:3]), p[1:4], donate=True)
    state = optimizer.init(p)
    (moments, rest) = state
    with pytest.raises(ValueError, match="share no memory"):
        step(optimizer, torch.ones(6), (moments._replace(nu=moments.mu), rest), p, donate=True)


def test_interleaved_tensors_raise_though_no_entry_is_shared():
    base = torch.ones(6)
    with pytest.raises(ValueError, match="share no memory"):
        check_donation([base[::2], base[1::2]])


@pytest.mark.parametrize("name", ["adam", "rmsprop", "nadam"])
def test_live_transforms_and_wanted_derivatives_raise(name):
    optimizer, p, g = OPTIMIZERS[name], torch.ones(2), torch.ones(2)
    state = optimizer.init(p)
    with pytest.raises(RuntimeError, match="live transform"):
        torch.func.vmap(lambda g: step(optimizer, g, state, p, donate=True)[0])(torch.ones(3, 2))
    for args in ((g, state, p.clone().requires_grad_()), (g.clone().requires_grad_(), state, p)):
        with pytest.raises(RuntimeError, match="requires grad"):
            step(optimizer, *args, donate=True)
    weight = nn.Parameter(torch.ones(2))
    with torch.no_grad():
        new, _ = step(optimizer, g, optimizer.init(weight), weight, donate=True)
    assert new.tolist() == step(optimizer, g, state, p)[0].tolist()


def test_a_learning_rate_that_requires_grad_raises():
    rate, p = torch.tensor(0.1, requires_grad=True), torch.ones(2)
    optimizer = adam(rate)
    state = optimizer.init(p)
    with pytest.raises(RuntimeError, match="requires grad"):
        step(optimizer, torch.ones(2), state, p, donate=True)
    with torch.no_grad():
        p, state = step(optimizer, torch.ones(2), state, p, donate=True)
    with pytest.raises(RuntimeError, match="requires grad"):
        step(optimizer, torch.ones(2), state, p, donate=True)


def misfits():
    def swap(leaves):
        leaves[0].data = leaves[1].data

    def shape(grads):
        grads[0] = torch.ones(3)

    return {
        "memory swapped": (lambda p, g: swap(p), ValueError, "share no memory"),
        "requires grad": (lambda p, g: p[0].requires_grad_(), RuntimeError, "requires grad"),
        "another shape": (lambda p, g: shape(g), ValueError, "must have shape"),
        "gradient in the parameters": (lambda p, g: g.__setitem__(0, p[1]), ValueError, "share no memory"),
        "an integer gradient": (lambda p, g: g.__setitem__(0, torch.ones(2).long()), TypeError, "floating-point"),
        "one gradient less": (lambda p, g: g.pop(), ValueError, "params"),
    }


@pytest.mark.parametrize("case", misfits())
def test_what_changes_between_two_donated_steps_is_seen(case):
    spoil, error, message = misfits()[case]
    optimizer, params = adam(0.1), [torch.ones(2), 2 * torch.ones(2)]
    state = optimizer.init(params)
    for _ in range(2):
        params, state = step(optimizer, [p.clone() for p in params], state, params, donate=True)
    grads = [torch.ones(2), torch.ones(2)]
    spoil(params, grads)
    with pytest.raises(error, match=message):
        step(optimizer, grads, state, params, donate=True)


def test_other_dtypes_and_strides_between_two_donated_steps_are_right():
    optimizer, params = adam(0.1), [torch.ones(3, 2)]
    state = optimizer.init(params)
    plain, plain_state = tree.map(torch.clone, (params, state))
    for grad in (torch.ones(3, 2), torch.ones(2, 3).T, torch.ones(3, 2).double(), torch.ones(1, 2).expand(3, 2)):
        params, state = step(optimizer, [grad], state, params, donate=True)
        plain, plain_state = step(optimizer, [grad], plain_state, plain)
        torch.testing.assert_close(params, plain)


def test_two_runs_of_one_optimizer_do_not_meet():
    optimizer = adam(0.1)
    runs = [[p := [torch.full((2,), v)], optimizer.init(p)] for v in (1.0, 2.0)]
    alone = [[p := [torch.full((2,), v)], adam(0.1).init(p)] for v in (1.0, 2.0)]
    for _ in range(3):
        for run, other in zip(runs, alone, strict=True):
            run[:] = step(optimizer, [2 * run[0][0]], run[1], run[0], donate=True)
            other[:] = step(adam(0.1), [2 * other[0][0]], other[1], other[0])
    torch.testing.assert_close(tree.leaves(runs), tree.leaves(alone))


def test_inference_tensors_can_be_donated():
    with torch.inference_mode():
        optimizer, p = adam(0.1), torch.ones(2)
        state = optimizer.init(p)
        for _ in range(3):
            p, state = step(optimizer, torch.ones(2), state, p, donate=True)
        mark_written([p])
    torch.testing.assert_close(p, torch.full((2,), 0.7))


def test_parameters_that_a_member_keeps_are_not_written_over():
    remember = GradientTransformation(lambda p: p, lambda u, state, params=None, **extra: (u, params))
    optimizer, p = chain(remember, adam(0.1)), torch.ones(2)
    state = optimizer.init(p.clone())
    with pytest.raises(ValueError, match="share no memory"):
        step(optimizer, torch.ones(2), state, p, donate=True)
    assert torch.equal(step(optimizer, torch.ones(2), state, p)[1][0], torch.ones(2))
