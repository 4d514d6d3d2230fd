"""What every optimizer promises, whatever its rule: gradients, transforms, dtypes, purity, resuming."""

import io

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from diffopt import autodiff, tree
from diffopt.optimizers import (
    adabelief,
    adadelta,
    adagrad,
    adam,
    adamax,
    adamw,
    adan,
    amsgrad,
    lamb,
    lars,
    lion,
    muon,
    nadam,
    prodigy,
    radam,
    rmsprop,
    sam,
    schedule_free,
    sgd,
    yogi,
)
from diffopt.transforms import scale_by_adam, step
from optimizers.problems import loss, start

MASK = {"w": True, "b": (False, True)}
ADAM = {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 0.01, "eps_root": 0.02}
MUON_ADAM = {"adam_b1": 0.8, "adam_b2": 0.9, "adam_eps": 0.01, "adam_eps_root": 0.02}
OPTIMIZERS = {
    "sgd": (sgd, {"learning_rate": 0.05}),
    "momentum": (sgd, {"learning_rate": 0.05, "momentum": 0.8}),
    "nesterov": (
        lambda learning_rate, momentum: sgd(learning_rate, momentum, True),
        {"learning_rate": 0.05, "momentum": 0.8},
    ),
    "adam": (adam, ADAM),
    "adam, Nesterov": (lambda **options: adam(**options, nesterov=True), ADAM),
    "adamw": (
        lambda **options: adamw(**options, mask=MASK),
        ADAM | {"weight_decay": 0.1},
    ),
    "schedule": (
        lambda learning_rate, rate: sgd(lambda count: learning_rate * rate**count),
        {"learning_rate": 0.05, "rate": 0.7},
    ),
    "amsgrad": (amsgrad, ADAM),
    "adamax": (adamax, {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "eps": 0.01}),
    "nadam": (nadam, ADAM | {"momentum_decay": 0.4}),
    "radam": (radam, ADAM),
    "adabelief": (adabelief, ADAM),
    "rmsprop": (rmsprop, {"learning_rate": 0.05, "decay": 0.8, "eps": 0.01, "eps_root": 0.02, "initial_scale": 0.1}),
    "centered rmsprop": (
        lambda **options: rmsprop(**options, centered=True),
        {"learning_rate": 0.05, "decay": 0.8, "eps": 0.01, "eps_root": 0.02, "initial_scale": 0.1, "momentum": 0.6},
    ),
    "adagrad": (adagrad, {"learning_rate": 0.05, "initial_accumulator_value": 0.1, "eps": 0.01, "eps_root": 0.02}),
    "adadelta": (adadelta, {"learning_rate": 0.9, "rho": 0.8, "eps": 0.01, "weight_decay": 0.1}),
    "lion": (lion, {"learning_rate": 0.05, "b1": 0.8, "b2": 0.9, "weight_decay": 0.1}),
    "lamb": (lamb, ADAM | {"weight_decay": 0.1}),
    "lars": (
        lambda **options: lars(**options, mask=MASK, trust_ratio_mask=MASK),
        {"learning_rate": 0.05, "weight_decay": 0.1, "trust_coefficient": 0.7, "eps": 0.02, "momentum": 0.6},
    ),
    "yogi": (yogi, ADAM | {"initial_accumulator_value": 0.1}),
    "adan": (adan, ADAM | {"b3": 0.7, "weight_decay": 0.1}),
    "muon": (muon, {"learning_rate": 0.05, "momentum": 0.6, "weight_decay": 0.1, **MUON_ADAM}),
    # the momentum is shorter than eps, by which it is then divided
    "muon, eps": (
        lambda **options: muon(**options, nesterov=False, ns_steps=1),
        {"learning_rate": 0.05, "momentum": 0.6, "eps": 20.0, "adam_learning_rate": 0.03, **MUON_ADAM},
    ),
    "schedule_free, Adam": (
        lambda b2, eps, eps_root, **options: schedule_free(**options, base=scale_by_adam(0.0, b2, eps, eps_root)),
        ADAM,
    ),
    "schedule_free": (schedule_free, {"learning_rate": 0.05, "b1": 0.8}),
    "schedule_free, warm-up": (
        lambda start, slope, b1, weight_lr_power: schedule_free(
            lambda count: start + slope * count, b1, weight_lr_power=weight_lr_power
        ),
        {"start": 0.05, "slope": 0.03, "b1": 0.8, "weight_lr_power": 1.5},
    ),
    "sam": (
        lambda learning_rate, momentum, rho: sam(sgd(learning_rate, momentum), rho),
        {"learning_rate": 0.05, "momentum": 0.6, "rho": 0.1},
    ),
    "adaptive sam": (
        lambda learning_rate, rho: sam(sgd(learning_rate), rho, adaptive=True),
        {"learning_rate": 0.05, "rho": 0.1},
    ),
    "prodigy": (prodigy, ADAM | {"learning_rate": 0.9, "d0": 0.05, "d_coefficient": 5.0, "weight_decay": 0.1}),
    "prodigy, b3": (prodigy, ADAM | {"learning_rate": 0.9, "b3": 0.7, "d0": 0.05, "d_coefficient": 5.0}),
}
STEPS = {"radam": 7}  # its mean square comes in at the sixth
# The step is flat in these: the derivative is exactly 0.
FLAT = {("lion", "b1"), ("lion", "b2")}
CASES = [(name, key) for name, (_, values) in OPTIMIZERS.items() for key in values]


def tensors(name, dtype=torch.float64):
    return {key: torch.tensor(value, dtype=dtype) for key, value in OPTIMIZERS[name][1].items()}


def unroll(optimizer, params, steps=3, fn=loss):
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(optimizer, grad(fn)(params), state, params, grad_fn=lambda p: grad(fn)(p))
    return params, state


def meta_loss(name, values, params):
    """The loss after some steps, as a function of hyperparameters and start."""
    return loss(unroll(OPTIMIZERS[name][0](**values), params, STEPS.get(name, 3))[0])


def assert_trees_close(got, want, **tolerances):
    tree.check_same_structure(got, want)
    for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, **tolerances)


@pytest.mark.parametrize(("name", "key"), CASES)
def test_hypergradient_against_finite_differences(name, key):
    values, params, h = tensors(name), start(), 1e-5

    def at(value):
        return meta_loss(name, values | {key: value}, params)

    slope = grad(at)(values[key])
    # Central differences err by h^2 and by rounding / h: both are below 1e-9 of the loss.
    want = (at(values[key] + h) - at(values[key] - h)) / (2 * h)
    assert (want.abs() > 1e-6) != ((name, key) in FLAT)
    torch.testing.assert_close(slope, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradient_in_the_start_against_finite_differences(name):
    values, params = tensors(name), start()
    direction = tree.map(torch.cos, params)
    t, h = torch.tensor(0.0, dtype=torch.float64), 1e-5

    def at(t):
        return meta_loss(name, values, tree.axpy(t, direction, params))

    torch.testing.assert_close(grad(at)(t), (at(t + h) - at(t - h)) / (2 * h), rtol=1e-6, atol=1e-8)


# torch warns of its own jit.script when it first takes a forward-mode derivative of some operations.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("name", "key"), CASES)
def test_second_order_is_forward_over_reverse_and_finite_differences(name, key):
    values, params, h = tensors(name), start(), 1e-5

    def slope(value):
        return grad(lambda v: meta_loss(name, values | {key: v}, params))(value)

    curvature = jacfwd(slope)(values[key])
    want = (slope(values[key] + h) - slope(values[key] - h)) / (2 * h)
    torch.testing.assert_close(curvature, want, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(jacrev(slope)(values[key]), curvature)


@pytest.mark.parametrize(("name", "key"), CASES)
def test_vmap_over_a_hyperparameter_is_the_loop(name, key):
    values, params = tensors(name), start()
    lanes = values[key] * torch.tensor([0.5, 0.8, 1.1], dtype=torch.float64)

    def gradient(value):
        return grad(lambda v: meta_loss(name, values | {key: v}, params))(value)

    assert_trees_close(vmap(gradient)(lanes), torch.stack([gradient(lane) for lane in lanes]))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shared_state_and_batched_gradients(name):
    make, values = OPTIMIZERS[name]
    optimizer, params = make(**values), start()
    state = optimizer.init(params)
    batch = tree.map(lambda p: torch.stack([p, 2 * p, -3 * p]), params)
    updates, states = vmap(lambda g: optimizer.update(g, state, params, grad_fn=grad(loss)))(batch)
    for i in range(3):
        want = optimizer.update(tree.map(lambda b, i=i: b[i], batch), state, params, grad_fn=grad(loss))
        assert_trees_close(tree.map(lambda u, i=i: u[i], (updates, states)), want)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_jacobian_of_the_end_in_the_start_composes_with_vmap(name):
    optimizer = OPTIMIZERS[name][0](**OPTIMIZERS[name][1])
    x = torch.tensor([[0.5, -1.0], [2.0, 0.3]], dtype=torch.float64)

    def end(x):
        return unroll(optimizer, {"w": x, "b": (x, x[0])})[0]["w"]

    assert_trees_close(vmap(jacrev(end))(x), torch.stack([jacrev(end)(row) for row in x]))


LONG_TO_COMPILE = [pytest.param(name, marks=pytest.mark.slow) for name in ("adam, Nesterov", "lamb", "muon", "sam")]


@pytest.mark.parametrize("name", ["nesterov", "adamw", "schedule", *LONG_TO_COMPILE])
def test_compiled_meta_gradient_of_an_unroll(name):
    values, params = tensors(name, torch.float32), start(torch.float32)
    meta_gradient = grad(lambda v, p: meta_loss(name, v, p), argnums=(0, 1))
    compiled = autodiff.compile(meta_gradient, backend="aot_eager")
    assert_trees_close(compiled(values, params), meta_gradient(values, params))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept_whatever_the_hyperparameters(name, dtype):
    make, values = OPTIMIZERS[name]
    params = start(dtype)
    for hyperparameters in (values, tensors(name)):
        new, state = unroll(make(**hyperparameters), params)
        tree.check_like(new, params)
        tree.check_like(state, make(**hyperparameters).init(params))
    exact, _ = unroll(make(**values), tree.map(torch.Tensor.double, params))
    rounding = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    assert_trees_close(tree.map(torch.Tensor.double, new), exact, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_hold_only_tensors_and_resume_exactly(name):
    optimizer = OPTIMIZERS[name][0](**OPTIMIZERS[name][1])
    half = unroll(optimizer, start())
    assert all(isinstance(leaf, torch.Tensor) for leaf in torch.utils._pytree.tree_leaves(half[1]))
    file = io.BytesIO()
    torch.save(half, file)
    file.seek(0)
    resumed = torch.load(file, weights_only=False)
    results = []
    for params, state in (half, resumed):
        params, state = step(optimizer, grad(loss)(params), state, params, grad_fn=grad(loss))
        results.append((params, state))
    assert_trees_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_mutated(name):
    optimizer = OPTIMIZERS[name][0](**tensors(name))
    params, state = unroll(optimizer, start())
    grads = grad(loss)(params)
    arguments = (grads, state, params)
    before, versions = tree.map(torch.clone, arguments), [x._version for x in tree.leaves(arguments)]
    optimizer.update(*arguments, grad_fn=grad(loss))
    step(optimizer, *arguments, grad_fn=grad(loss))
    assert_trees_close(arguments, before, rtol=0, atol=0)
    assert [x._version for x in tree.leaves(arguments)] == versions


@pytest.mark.parametrize("name", ["momentum", "adam, Nesterov", "adamw", "lamb", "prodigy"])
def test_odd_tensors(name):
    make, values = OPTIMIZERS[name]
    make = adamw if name == "adamw" else make
    base = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    odd = [base.t(), base[::2, ::3], base[0].expand(3, 6), base[0, 0], base[:0]]
    plain = [leaf.clone(memory_format=torch.contiguous_format) for leaf in odd]
    results = []
    for params in (odd, plain):
        optimizer = make(**values)
        results.append(step(optimizer, tree.map(torch.sin, params), optimizer.init(params), params))
    assert_trees_close(*results)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("empty", [{}, (), [], {"w": None}])
def test_empty_trees(name, empty):
    make, values = OPTIMIZERS[name]
    make = {"adamw": adamw, "lars": lars}.get(name, make)
    optimizer = make(**values)
    new, _ = step(optimizer, empty, optimizer.init(empty), empty, grad_fn=lambda params: params)
    assert new == empty


SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=2).map(tuple), min_size=1, max_size=3)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(name=st.sampled_from([name for name in OPTIMIZERS if name not in ("adamw", "lars")]), shapes=SHAPES)
def test_any_tree_keeps_its_structure_and_shapes(name, shapes):
    make, values = OPTIMIZERS[name]
    params = {"a": [torch.full(shape, 0.5 + i) for i, shape in enumerate(shapes)], "b": None}
    optimizer = make(**values)
    state = optimizer.init(params)
    for _ in range(2):
        grads = tree.map(torch.sin, params)
        params, new = step(optimizer, grads, state, params, grad_fn=lambda params: tree.map(torch.sin, params))
        tree.check_like(new, state)
        state = new
    assert [tuple(leaf.shape) for leaf in params["a"]] == shapes
    assert all(torch.isfinite(leaf).all() for leaf in params["a"])


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw"])
def test_gradients_of_another_tree_raise(name):
    optimizer, params = OPTIMIZERS[name][0](**OPTIMIZERS[name][1]), start()
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="structure"):
        step(optimizer, {"w": params["w"]}, state, params)
    with pytest.raises(ValueError, match="structure"):
        step(optimizer, {**params, "w": None}, state, params)
    with pytest.raises(ValueError, match=r"\['w'\]` must have shape"):
        step(optimizer, {**params, "w": params["w"][:1]}, state, params)
