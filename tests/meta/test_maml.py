import shutil
import warnings

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, vmap

import diffopt
from diffopt import random, tree
from diffopt.meta import fomaml, maml
from diffopt.optimizers import adam, adamw, sgd
from meta.problems import (
    START,
    assert_trees_close,
    check_slope,
    end_of_descent,
    f64,
    network_params,
    quadratic,
    quadratic_tasks,
    regression,
    regression_tasks,
    task,
)
from optimizers import problems
from optimizers.test_contract import OPTIMIZERS, STEPS, tensors, unroll

RATE = f64(0.3)


def closed_form(w, rate, tasks, steps):
    ends = [end_of_descent(w, centre, rate, steps) for centre in tasks[0]]
    return torch.stack([quadratic(end, centre) for end, centre in zip(ends, tasks[1], strict=True)]).mean()


@hypothesis.settings(max_examples=15)
@hypothesis.given(steps=st.integers(0, 8), count=st.integers(1, 4))
def test_on_quadratics_is_the_closed_form(steps, count):
    tasks = quadratic_tasks(count)
    ours = lambda w, rate: maml(quadratic, sgd(rate), steps)(w, tasks)  # noqa: E731
    theirs = lambda w, rate: closed_form(w, rate, tasks, steps)  # noqa: E731
    torch.testing.assert_close(ours(START, RATE), theirs(START, RATE))
    assert_trees_close(grad(ours, argnums=(0, 1))(START, RATE), grad(theirs, argnums=(0, 1))(START, RATE))


def test_second_and_forward_derivatives_are_those_of_the_closed_form():
    tasks = quadratic_tasks()
    ours = lambda w: maml(quadratic, sgd(RATE), 3)(w, tasks)  # noqa: E731
    theirs = lambda w: closed_form(w, RATE, tasks, 3)  # noqa: E731
    torch.testing.assert_close(hessian(ours)(START), hessian(theirs)(START))
    torch.testing.assert_close(jacfwd(ours)(START), grad(theirs)(START))


def test_backward_reaches_parameters_rate_and_captured_tensors():
    tasks = quadratic_tasks()
    w, rate, weight = (x.clone().requires_grad_() for x in (START, RATE, f64(1.3)))
    maml(lambda w, c: weight * quadratic(w, c), sgd(rate), 3)(w, tasks).backward()
    want = grad(lambda w, r, a: a * closed_form(w, a * r, tasks, 3), argnums=(0, 1, 2))(START, RATE, f64(1.3))
    assert_trees_close((w.grad, rate.grad, weight.grad), want)


def shifted_loss(params, data):
    return data["scale"] * problems.loss(tree.map(lambda p: p - data["shift"], params))


def shifted_tasks():
    support = {"shift": f64([0.3, -0.2, 0.5]), "scale": f64([1.0, 0.7, 1.2])}
    return support, tree.map(lambda leaf: leaf + 0.1, support)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_inner_optimizer_against_finite_differences_and_a_loop(name):
    make, tasks, steps = OPTIMIZERS[name][0], shifted_tasks(), STEPS.get(name, 3)

    def meta_loss(params):
        return maml(shifted_loss, make(**tensors(name)), steps)(params, tasks)

    def loop(params):
        ends = [unroll(make(**tensors(name)), params, steps, lambda p, i=i: shifted_loss(p, task(tasks[0], i)))[0]
                for i in range(3)]  # fmt: skip
        return torch.stack([shifted_loss(p, task(tasks[1], i)) for i, p in enumerate(ends)]).mean()

    params = problems.start()
    torch.testing.assert_close(meta_loss(params), loop(params))
    assert_trees_close(grad(meta_loss)(params), grad(loop)(params), rtol=1e-9, atol=1e-11)
    check_slope(meta_loss, params)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_inner_optimizer_first_order(name):
    """The loop with stopped gradients, all else being differentiated."""
    make, tasks, steps = OPTIMIZERS[name][0], shifted_tasks(), STEPS.get(name, 3)

    def loop(values, params):
        end = []
        for i in range(3):
            optimizer, p = make(**values), params
            slope = lambda p, i=i: tree.map(  # noqa: E731
                torch.detach, grad(shifted_loss)(tree.map(torch.detach, p), task(tasks[0], i))
            )
            state = optimizer.init(p)
            for _ in range(steps):
                p, state = diffopt.step(optimizer, slope(p), state, p, grad_fn=slope)
            end.append(shifted_loss(p, task(tasks[1], i)))
        return torch.stack(end).mean()

    def meta_loss(values, params):
        return fomaml(shifted_loss, make(**values), steps)(params, tasks)

    values, params = tensors(name), problems.start()
    torch.testing.assert_close(meta_loss(values, params), loop(values, params))
    got, want = (grad(fn, argnums=(0, 1))(values, params) for fn in (meta_loss, loop))
    assert_trees_close(got, want, rtol=1e-9, atol=1e-11)


def test_first_order_is_its_definition():
    tasks = quadratic_tasks()
    ends = [end_of_descent(START, centre, RATE, 4) for centre in tasks[0]]
    want = torch.stack([grad(quadratic)(end, c) for end, c in zip(ends, tasks[1], strict=True)]).mean(0)
    meta_loss = fomaml(quadratic, sgd(RATE), 4)
    torch.testing.assert_close(meta_loss(START, tasks), closed_form(START, RATE, tasks, 4))
    torch.testing.assert_close(grad(meta_loss)(START, tasks), want)
    torch.testing.assert_close(jacfwd(meta_loss)(START, tasks), want)
    w = START.clone().requires_grad_()
    meta_loss(w, tasks).backward()
    torch.testing.assert_close(w.grad, want)


@pytest.mark.parametrize("options", [{"chunk_size": 2}, {"checkpoint": "sqrt"}, {"checkpoint": "log", "chunk_size": 3}])
@pytest.mark.parametrize("take", [grad, diffopt.grad])
def test_chunks_and_checkpoints_change_nothing(options, take):
    tasks, params = regression_tasks(), network_params()

    def meta_loss(options):
        return lambda rate, params: maml(regression, adam(rate, eps_root=1e-8), 4, **options)(params, tasks)

    got, want = (take(meta_loss(o), argnums=(0, 1))(f64(0.1), params) for o in (options, {}))
    assert_trees_close(got, want)


def test_initial_parameters_of_each_task():
    tasks = quadratic_tasks(3)
    starts = START * f64([[1.0], [0.5], [-0.8]])
    got = maml(quadratic, sgd(RATE), 2, in_dims=(0, 0), reduce=lambda losses: losses)(starts, tasks)
    want = [closed_form(w, RATE, (s[None], q[None]), 2) for w, s, q in zip(starts, *tasks, strict=True)]
    torch.testing.assert_close(got, torch.stack(want))


def test_a_loss_of_its_own_for_the_query():
    tasks = quadratic_tasks()
    got = maml(quadratic, sgd(RATE), 2, query_loss=lambda w, c: 3 * quadratic(w, c))(START, tasks)
    torch.testing.assert_close(got, 3 * closed_form(START, RATE, tasks, 2))


def test_composes_with_vmap_over_rates_and_starts():
    tasks = quadratic_tasks()
    slope = grad(lambda w, rate: maml(quadratic, sgd(rate), 3)(w, tasks))
    rates, starts = f64([0.1, 0.2]), torch.stack([START, -START])
    want = torch.stack([slope(w, r) for w, r in zip(starts, rates, strict=True)])
    torch.testing.assert_close(vmap(slope)(starts, rates), want)


def batch_norm_problem():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    function, params, buffers = tree.from_module(module)

    def loss(params, buffers, data):
        out, buffers = function(params, buffers, data["x"])
        return ((out - data["y"]) ** 2).mean(), buffers

    return loss, params, buffers


def test_batch_norm_statistics_pass_through_all_steps():
    loss, params, buffers = batch_norm_problem()
    tasks = regression_tasks(3)

    def by_loop(params):
        values, ends = [], []
        for i in range(3):
            p, b = params, buffers
            for _ in range(2):
                g, b = grad(loss, has_aux=True)(p, b, task(tasks[0], i))
                p = tree.axpy(-0.1, g, p)
            value, b = loss(p, b, task(tasks[1], i))
            values.append(value)
            ends.append(b)
        return torch.stack(values).mean(), ends

    meta_loss = maml(loss, sgd(0.1), 2)
    (value, new), (want, ends) = meta_loss(params, tasks, buffers=buffers), by_loop(params)
    torch.testing.assert_close(value, want)
    assert new["1.num_batches_tracked"] == 3
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(new[name], torch.stack([b[name] for b in ends]).mean(0))
    only_loss = lambda p: meta_loss(p, tasks, buffers=buffers)[0]  # noqa: E731
    assert_trees_close(grad(only_loss)(params), grad(lambda p: by_loop(p)[0])(params))
    assert_trees_close(diffopt.grad(meta_loss, has_aux=True)(params, tasks, buffers=buffers)[1], new)
    chunked = maml(loss, sgd(0.1), 2, chunk_size=2, checkpoint=1)
    assert_trees_close(grad(lambda p: chunked(p, tasks, buffers=buffers)[0])(params), grad(only_loss)(params))
    check_slope(only_loss, params)


NORMS = {
    "batch": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "layer": lambda: nn.LayerNorm([4, 3]),
    "layer, no bias": lambda: nn.LayerNorm([4, 3], bias=False),
    "instance": lambda: nn.InstanceNorm1d(4, affine=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "rms": lambda: nn.RMSNorm(3),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalization_in_a_batch_of_tasks_is_right(name):
    """Under vmap, torch's own has wrong second derivatives for half of these."""
    torch.manual_seed(0)
    function, params, buffers = tree.from_module(
        nn.Sequential(nn.Conv1d(2, 4, 1), NORMS[name](), nn.Tanh(), nn.Conv1d(4, 1, 1)).double()
    )
    params = {k: v + 0.1 * torch.arange(v.numel()).reshape(v.shape).cos() for k, v in params.items()}
    tasks = tuple(torch.randn(3, 5, 2, 3, dtype=torch.float64) for _ in range(2))

    def loss(params, x):
        return ((function(params, buffers, x)[0] - x.sum(1, keepdim=True).sin()) ** 2).mean()

    def loop(params):
        end = lambda x: tree.axpy(-0.3, grad(loss)(params, x), params)  # noqa: E731
        return torch.stack([loss(end(s), q) for s, q in zip(*tasks, strict=True)]).mean()

    meta_loss = maml(loss, sgd(0.3), 1)
    assert_trees_close(grad(meta_loss)(params, tasks), grad(loop)(params))
    assert_trees_close(diffopt.grad(meta_loss)(params, tasks), grad(loop)(params))


def dropout_loss(params, data, *, key):
    kept = random.uniform(key, data["x"].shape) < 0.7
    return regression(params, {**data, "x": data["x"] * kept / 0.7})


def test_dropout_by_key_differs_by_task_and_step_and_repeats():
    tasks, params = regression_tasks(), network_params()
    meta_loss = maml(dropout_loss, sgd(0.1), 2, reduce=lambda losses: losses)
    same = tree.map(lambda leaf: leaf[:1].expand_as(leaf), tasks)
    losses = meta_loss(params, same, key=random.key(0))
    assert losses.unique().numel() == 5
    torch.testing.assert_close(meta_loss(params, same, key=random.key(0)), losses, rtol=0, atol=0)
    assert (meta_loss(params, same, key=random.key(1)) != losses).all()
    chunked = maml(dropout_loss, sgd(0.1), 2, chunk_size=2, checkpoint="sqrt")
    plain = maml(dropout_loss, sgd(0.1), 2)
    got, want = (grad(lambda p, m=m: m(p, tasks, key=random.key(0)))(params) for m in (chunked, plain))
    assert_trees_close(got, want)


def modules():
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
    mlp = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    conv = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 1)
    )
    return {"mlp": (mlp, (2,)), "conv": (conv, (1, 4, 4)), "layer norm": (normed, (2,))}


def module_problem(name, count=3):
    module, shape = modules()[name]
    function, params, buffers = tree.from_module(module)
    generator = torch.Generator().manual_seed(4)

    def loss(params, data):
        return ((function(params, buffers, data["x"])[0] - data["y"]) ** 2).mean()

    def half():
        x = torch.randn((count, 5, *shape), generator=generator)
        return {"x": x, "y": x.flatten(2).sum(-1, keepdim=True).sin()}

    return loss, params, (half(), half())


def functional_problem():
    to32 = lambda values: tree.map(torch.Tensor.float, values)  # noqa: E731
    return regression, to32(network_params()), to32(regression_tasks(3))


PROBLEMS = {
    "functional": functional_problem,
    "mlp": lambda: module_problem("mlp"),
    "conv": lambda: module_problem("conv"),
    "layer norm": lambda: module_problem("layer norm"),
}
INNER = {"sgd": lambda rate: sgd(rate), "adam": lambda rate: adam(rate, eps_root=1e-8)}


def check_compiled(problem, inner, backend):
    loss, params, tasks = PROBLEMS[problem]()

    def slope(rate, params, tasks):
        return grad(lambda r, p: maml(loss, INNER[inner](r), 2)(p, tasks), argnums=(0, 1))(rate, params)

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script_method.*", category=DeprecationWarning)
        got = torch.compile(slope, fullgraph=True, backend=backend)(torch.tensor(0.1), params, tasks)
    # float32, in another order of the sums
    assert_trees_close(got, slope(torch.tensor(0.1), params, tasks), rtol=1e-3, atol=1e-5)


QUICK = {("mlp", "adam")}  # each takes seconds
COMPILED = [
    pytest.param(problem, inner, marks=[] if (problem, inner) in QUICK else pytest.mark.slow)
    for problem in PROBLEMS
    for inner in INNER
]


@pytest.mark.parametrize(("problem", "inner"), COMPILED)
def test_the_meta_gradient_compiles_without_graph_breaks(problem, inner):
    check_compiled(problem, inner, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(("problem", "inner"), [("functional", "adam"), ("conv", "sgd")])
def test_the_meta_gradient_is_right_under_inductor(problem, inner):
    check_compiled(problem, inner, "inductor")


@pytest.mark.slow
def test_chunks_keys_and_buffers_compile():
    loss, params, buffers = batch_norm_problem()
    tasks, key = regression_tasks(4), random.key(0)

    def keyed(params, buffers, data, *, key):
        return loss(params, buffers, {**data, "x": data["x"] + 0.1 * random.normal(key, data["x"].shape)})

    def slope(params, buffers, tasks, key):
        meta_loss = maml(keyed, adamw(0.1, eps_root=1e-8), 2, chunk_size=2)
        return diffopt.grad(meta_loss, has_aux=True)(params, tasks, buffers=buffers, key=key)

    compiled = diffopt.compile(slope, backend="aot_eager")
    assert_trees_close(compiled(params, buffers, tasks, key), slope(params, buffers, tasks, key))


@pytest.mark.parametrize("in_dims", [0, (0,), (None, 0, 0), (None, (0, 0)), None])
def test_dimensions_are_a_pair(in_dims):
    with pytest.raises(ValueError, match="`in_dims` must"):
        maml(quadratic, sgd(0.1), 1, in_dims=in_dims)


def test_bad_arguments_raise_early():
    support, query = quadratic_tasks()
    with pytest.raises(ValueError, match=r"steps.*at least 0; got -1"):
        maml(quadratic, sgd(0.1), -1)
    with pytest.raises(TypeError, match=r"steps.*int; got float"):
        maml(quadratic, sgd(0.1), 1.0)
    with pytest.raises(TypeError, match="GradientTransformation"):
        fomaml(quadratic, 0.1, 1)
    with pytest.raises(TypeError, match="`query_loss` must be a function"):
        maml(quadratic, sgd(0.1), 1, query_loss=3)
    meta_loss = maml(quadratic, sgd(0.1), 1)
    with pytest.raises(ValueError, match=r"pair \(support, query\)"):
        meta_loss(START, support)
    with pytest.raises(ValueError, match=r"`tasks\[0\]` has 4, `tasks\[1\]` has 3"):
        meta_loss(START, (support, query[:3]))
    with pytest.raises(ValueError, match="empty"):
        meta_loss(START, (support[:0], query[:0]))
    with pytest.raises(TypeError, match=r"`params` must be a floating-point tensor; got torch.int64"):
        meta_loss(torch.tensor([1, 2, 3]), (support, query))
    with pytest.raises(TypeError, match=r"0-d floating-point tensor; got shape \(3,\)"):
        maml(lambda w, c: w - c, sgd(0.1), 1)(START, (support, query))
    with pytest.raises(TypeError, match="needs `buffers`"):
        maml(lambda w, c: (quadratic(w, c), ()), sgd(0.1), 1)(START, (support, query))
    with pytest.raises(TypeError, match=r"\(scalar, new_buffers\)"):
        maml(lambda w, b, c: quadratic(w, c), sgd(0.1), 1)(START, (support, query), buffers={})
