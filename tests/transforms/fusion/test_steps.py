"""Fused steps equal update-then-apply, wherever they run: values, derivatives, dtypes, groups and blocks."""

import shutil

import pytest
import torch
from torch.func import grad, hessian, jacfwd, vmap

from diffopt import tree
from diffopt.optimizers import adam, adamw, lion, rmsprop, sgd
from diffopt.transforms import apply_updates, step
from diffopt.transforms.fusion import blocks, fuse, launch
from diffopt_kernels.steps import ADAM

F64 = torch.float64
MASK = {"w": True, "v": (False, True)}
OPTIMIZERS = {
    "sgd": (sgd, {"learning_rate": 0.1}),
    "momentum": (sgd, {"learning_rate": 0.1, "momentum": 0.8}),
    "nesterov": (lambda **h: sgd(**h, nesterov=True), {"learning_rate": 0.1, "momentum": 0.8}),
    "adam": (adam, {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01}),
    "adamw": (
        lambda **h: adamw(**h, mask=MASK),
        {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01, "eps_root": 0.01, "weight_decay": 0.2},
    ),
    "rmsprop": (rmsprop, {"learning_rate": 0.1, "decay": 0.8, "eps": 0.01, "eps_root": 0.01}),
    "lion": (lambda **h: lion(**h, mask=MASK), {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "weight_decay": 0.2}),
    "schedule": (lambda rate, **h: adam(lambda n: rate * 0.5**n, **h), {"rate": 0.1, "b1": 0.8, "b2": 0.9}),
}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture
def everywhere(monkeypatch):
    """Fuse the smallest trees, in blocks of a few entries, and compile nothing."""
    monkeypatch.setattr("diffopt.transforms.fusion.steps.FUSE_FROM", 0)
    monkeypatch.setattr(blocks, "BLOCK", 8)
    monkeypatch.setattr(blocks, "PIECE", 5)


def start(dtype=F64):
    """Leaves larger and smaller than a block, transposed, expanded, 0-d and empty."""
    generator = torch.Generator().manual_seed(0)
    w, v, s = (torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape in [(3, 4), (3, 1), ()])
    return {"w": w.T, "v": (v.expand(3, 2), {"s": s, "none": torch.empty(2, 0, dtype=dtype)})}


def loss(p):
    v, rest = p["v"]
    return torch.cosh(p["w"]).sum() + (v**3).sum() * rest["s"] + rest["s"] ** 2


def unrolled(optimizer, params, fused, steps=2):
    state = optimizer.init(params)
    for _ in range(steps):
        grads = grad(loss)(params)
        if fused:
            params, state = step(optimizer, grads, state, params)
        else:
            updates, state = optimizer.update(grads, state, params)
            params = apply_updates(params, updates)
    return params, state


def meta(name, fused):
    make = OPTIMIZERS[name][0]
    return lambda hyper, params: loss(unrolled(make(**hyper), params, fused)[0])


def hyper(name, dtype=F64):
    return {key: torch.tensor(value, dtype=dtype) for key, value in OPTIMIZERS[name][1].items()}


def assert_close(got, want, **tolerances):
    torch.testing.assert_close(tree.leaves(got), tree.leaves(want), **tolerances)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tensors", [False, True])
def test_fused_steps_are_update_then_apply(name, tensors, everywhere):
    make, values = OPTIMIZERS[name]
    optimizer = make(**(hyper(name) if tensors else values))
    got, want = (unrolled(optimizer, start(), fused, 4) for fused in (True, False))
    tree.check_same_structure(got, want)
    assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(name, dtype, everywhere):
    make, values = OPTIMIZERS[name]
    params, optimizer = start(dtype), make(**values)
    grads, state = grad(loss)(params), optimizer.init(params)
    got, got_state = step(optimizer, grads, state, params)
    exact, exact_state = step(optimizer, *tree.map(lambda x: x.double(), (grads, state, params)))
    assert all(x.dtype == dtype for x in tree.leaves(got))
    # the moments are in float32, the parameters rounded to their own dtype at the end
    assert_close(got, tree.map(lambda x: x.to(dtype), exact), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert_close(tree.map(lambda x: x.double(), got_state), tree.map(lambda x: x.double(), exact_state))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_derivatives_are_those_of_the_chain(name, everywhere):
    args = hyper(name), start()
    fused, chain = meta(name, True), meta(name, False)
    assert_close(grad(fused, (0, 1))(*args), grad(chain, (0, 1))(*args), rtol=1e-10, atol=1e-10)
    assert_close(hessian(fused)(*args), hessian(chain)(*args), rtol=1e-10, atol=1e-10)
    assert_close(jacfwd(grad(fused, 1))(*args), jacfwd(grad(chain, 1))(*args), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_vmap_over_hyperparameters_and_starts(name, everywhere):
    lanes = torch.tensor([0.5, 0.9, 1.1], dtype=F64)
    values, params = hyper(name), start()
    batch = tree.map(lambda v: v * lanes, values)
    starts = tree.map(lambda p: torch.stack([p, 2 * p, -p], -1), params)
    for axes, args in {(0, None): (batch, params), (None, -1): (values, starts), (0, -1): (batch, starts)}.items():
        got, want = (vmap(grad(meta(name, fused), (0, 1)), axes)(*args) for fused in (True, False))
        assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_backward_in_the_torch_way(name, everywhere):
    """A first backward pass with nothing above it, and a second one through the first."""

    def twice(fused):
        values = tree.map(lambda v: v.clone().requires_grad_(), hyper(name))
        params = tree.map(lambda p: p.clone().requires_grad_(), start())
        wanted = [*tree.leaves(values), *tree.leaves(params)]
        optimizer = OPTIMIZERS[name][0](**values)
        state = optimizer.init(tree.map(torch.detach, params))
        new = params
        for _ in range(2):
            grads = tree.map(lambda p: torch.sin(3 * p), new)
            if fused:
                new, state = step(optimizer, grads, state, new)
            else:
                updates, state = optimizer.update(grads, state, new)
                new = apply_updates(new, updates)
        first = torch.autograd.grad(loss(new), wanted, create_graph=True, materialize_grads=True)
        size = sum((g**2).sum() for g in first)
        return first, torch.autograd.grad(size, wanted, materialize_grads=True)

    assert_close(twice(True), twice(False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("donate", [False, True])
def test_lazily_negated_views_are_their_values(name, donate):
    optimizer, options = OPTIMIZERS[name]
    optimizer = optimizer(**options)
    views = tree.map(lambda x: torch._neg_view(x.contiguous()), start())
    values = tree.map(lambda x: x.clone(), views)
    assert tree.leaves(views)[0].is_neg()
    assert not tree.leaves(values)[0].is_neg()
    expected, _ = step(optimizer, values, optimizer.init(values), values)
    stepped, _ = step(optimizer, tree.map(torch.clone, views), optimizer.init(views), views, donate=donate)
    assert_close(stepped, expected)
    grads = tree.map(lambda x: torch._neg_view(-x.contiguous()), values)
    stepped, _ = step(optimizer, grads, optimizer.init(values), values, donate=donate)
    assert_close(stepped, expected)


def test_leaves_of_mixed_dtypes_go_in_groups(everywhere):
    params = [torch.randn(3).double(), torch.randn(2, 2), torch.randn(5).bfloat16(), torch.randn(1)]
    optimizer = adam(0.1)
    state = optimizer.init(params)
    new, new_state = step(optimizer, params, state, params)
    for i, p in enumerate(params):
        alone, _ = step(optimizer, [p], optimizer.init([p]), [p])
        assert torch.equal(new[i], alone[0])
        assert new[i].dtype == p.dtype
        assert new_state[0].mu[i].dtype == (F64 if i == 0 else torch.float32)


def test_moments_of_another_dtype_take_the_chain():
    params = torch.randn(4, dtype=F64)
    optimizer = adam(0.1)
    state = tree.map(lambda x: x.float() if x.is_floating_point() else x, optimizer.init(params))
    updates, want = optimizer.update(params, state, params)
    got, got_state = step(optimizer, params, state, params)
    assert torch.equal(got, params + updates)
    assert_close(got_state, want)


def test_no_leaves():
    for optimizer in (sgd(0.1), adam(0.1), lion(0.1)):
        for donate in (False, True):
            assert step(optimizer, {}, optimizer.init({}), {}, donate=donate)[0] == {}


def test_pure_steps_leave_their_arguments_alone():
    for make, values in OPTIMIZERS.values():
        optimizer, params = make(**values), start()
        grads, state = grad(loss)(params), optimizer.init(params)
        before = tree.map(torch.clone, (grads, state, params))
        step(optimizer, grads, state, params)
        assert all(map(torch.equal, tree.leaves((grads, state, params)), tree.leaves(before)))


@needs_compiler
@pytest.mark.parametrize("make", [lambda: adam(0.1, eps_root=1e-8), lambda: lion(0.1)])
def test_compiled_bodies_agree_and_serve_every_length(make, monkeypatch):
    monkeypatch.setattr(blocks, "COMPILE_FROM", 1000)
    monkeypatch.setattr("diffopt.transforms.fusion.steps.FUSE_FROM", 0)
    optimizer = make()

    def results(size):
        p, g, c = (torch.sin(torch.arange(size, dtype=F64) + k) for k in range(3))
        state = optimizer.init(p)
        pure = step(optimizer, g, state, p)
        donated = step(optimizer, g, *tree.map(torch.clone, (state, p)), donate=True)
        leaf, slope = p.clone().requires_grad_(), g.clone().requires_grad_()
        pulled = torch.autograd.grad(step(optimizer, slope, state, leaf)[0], (leaf, slope), c)
        return pure, donated, pulled

    compiled = results(1500)
    with torch.compiler.set_stance("fail_on_recompile"):
        longer = results(4321)
    monkeypatch.setenv("DIFFOPT_COMPILE", "0")
    assert_close(compiled, results(1500), rtol=1e-9, atol=1e-9)
    assert_close(longer, results(4321), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("given", [(True, False, False), (True, True, False), (True, False, True), (True, True, True)])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_the_backward_by_hand_is_the_derivative_of_the_reference(given, dtype):
    values = [torch.tensor([0.5, -0.4, 0.0, 2.0]) + k for k in range(2)]
    columns = [v.to(dtype) for v in values] + [v.double() if dtype == F64 else v for v in (values[0], values[1] ** 2)]
    scalars = [torch.tensor(v, dtype=F64) for v in (0.1, 0.8, 0.9, 1e-2, 1e-3, 0.05, 0.36, 0.19)]
    seeds = [torch.cos(c + 1) if g else None for c, g in zip((columns[0], *columns[2:]), given, strict=True)]
    found = ADAM.backward(*columns[1:], *scalars, *seeds)
    pullback = torch.func.vjp(lambda *c: ADAM.reference(*c, *scalars), *columns)[1]
    zeros = (torch.zeros_like(c) for c in (columns[0], *columns[2:]))
    want = pullback(tuple(z if s is None else s for z, s in zip(zeros, seeds, strict=True)))
    rtol = 1e-12 if dtype == F64 else 2 * torch.finfo(dtype).eps
    for f, w in zip(found, want, strict=True):
        assert f.dtype == w.dtype
        torch.testing.assert_close(f, w, rtol=rtol, atol=1e-12 if dtype == F64 else 1e-6)


def test_a_zero_gradient_without_eps_root_is_nan_by_hand_too():
    zero, scalars = (
        torch.zeros(2, dtype=F64),
        [torch.tensor(v, dtype=F64) for v in (0.1, 0.8, 0.9, 1e-2, 0, 0, 0.2, 0.1)],
    )
    found = ADAM.backward(zero, zero, zero, *scalars, torch.ones(2, dtype=F64), None, None)
    pullback = torch.func.vjp(lambda *c: ADAM.reference(*c, *scalars), zero, zero, zero, zero)[1]
    want = pullback((torch.ones(2, dtype=F64), zero, zero))
    for f, w in zip(found, want, strict=True):
        assert torch.equal(f.isnan(), w.isnan())
    assert found[1].isnan().all()


def test_where_a_step_runs(monkeypatch):
    def serves(size, leaves=1, **scalars):
        columns = [[torch.ones(size)] * leaves for _ in range(4)]
        return launch.by_torch(ADAM, columns, {"eps_root": 0.0} | scalars)

    assert serves(10)
    assert serves(blocks.COMPILE_FROM, leaves=2)
    assert not serves(10, eps_root=0.1)
    assert serves(blocks.COMPILE_FROM) != (shutil.which("g++") is not None)
    monkeypatch.setenv("DIFFOPT_COMPILE", "0")
    assert serves(blocks.COMPILE_FROM)


def test_bad_arguments_raise():
    optimizer, p = adam(0.1), {"a": torch.ones(2)}
    state = optimizer.init(p)
    with pytest.raises(ValueError, match=r"`params\['a'\]` must have shape \(3,\)"):
        step(optimizer, {"a": torch.ones(3)}, state, p)
    with pytest.raises(ValueError, match=r"missing|structure"):
        step(optimizer, {"b": torch.ones(2)}, state, p)
    with pytest.raises(TypeError, match="floating-point"):
        step(optimizer, {"a": torch.ones(2).long()}, state, p)
    with pytest.raises(TypeError, match="must be a number"):
        fuse(adam(lambda n: "x"), ADAM, lambda n: "x", {}).step(p, adam(lambda n: 0.1).init(p), p)


def test_the_state_of_another_optimizer_raises():
    params = torch.ones(3)
    for mine, other in ((adam(0.1), sgd(0.1)), (sgd(0.1), adam(0.1)), (sgd(0.1, momentum=0.9), adam(0.1))):
        with pytest.raises(TypeError, match="got that of another"):
            step(mine, params, other.init(params), params)
