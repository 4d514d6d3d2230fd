"""Twenty steps of each optimizer against torch.optim, or else against its paper's equations in NumPy."""

import numpy as np
import pytest
import torch
from torch.func import grad

from diffopt import optimizers, tree
from diffopt.optimizers import (
    adabelief,
    adadelta,
    adagrad,
    adamax,
    adan,
    amsgrad,
    lamb,
    lars,
    lion,
    muon,
    nadam,
    orthogonalize,
    prodigy,
    radam,
    rmsprop,
    sam,
    schedule_free,
    sgd,
    yogi,
)
from diffopt.transforms import step
from optimizers.formulas import FORMULAS
from optimizers.problems import loss, start, torch_trajectory

BETAS = {"b1": 0.7, "b2": 0.95, "eps": 1e-3}
TORCH_BETAS = {"betas": (0.7, 0.95), "eps": 1e-3}
TORCH = {
    "amsgrad": (amsgrad(0.05), torch.optim.Adam, {"lr": 0.05, "amsgrad": True}),
    "amsgrad, options": (amsgrad(0.05, **BETAS), torch.optim.Adam, {"lr": 0.05, "amsgrad": True} | TORCH_BETAS),
    "adamax": (adamax(0.05), torch.optim.Adamax, {"lr": 0.05}),
    "adamax, options": (adamax(0.05, **BETAS), torch.optim.Adamax, {"lr": 0.05} | TORCH_BETAS),
    "nadam": (nadam(0.05), torch.optim.NAdam, {"lr": 0.05}),
    "nadam, options": (
        nadam(0.05, **BETAS, momentum_decay=0.3),
        torch.optim.NAdam,
        {"lr": 0.05, "momentum_decay": 0.3} | TORCH_BETAS,
    ),
    "radam": (radam(0.05), torch.optim.RAdam, {"lr": 0.05}),
    "radam, options": (radam(0.05, **BETAS), torch.optim.RAdam, {"lr": 0.05} | TORCH_BETAS),
    "rmsprop": (rmsprop(0.05, 0.99), torch.optim.RMSprop, {"lr": 0.05}),
    "rmsprop, options": (
        rmsprop(0.01, 0.8, 1e-3, momentum=0.7),
        torch.optim.RMSprop,
        {"lr": 0.01, "alpha": 0.8, "eps": 1e-3, "momentum": 0.7},
    ),
    "rmsprop, centered": (
        rmsprop(0.01, 0.8, 1e-3, centered=True),
        torch.optim.RMSprop,
        {"lr": 0.01, "alpha": 0.8, "eps": 1e-3, "centered": True},
    ),
    "adagrad": (adagrad(0.1), torch.optim.Adagrad, {"lr": 0.1}),
    "adagrad, options": (
        adagrad(lambda count: 0.1 / (1 + 0.2 * count.double()), 0.3, 1e-3),
        torch.optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.2, "initial_accumulator_value": 0.3, "eps": 1e-3},
    ),
    "adadelta": (adadelta(), torch.optim.Adadelta, {}),
    "adadelta, options": (
        adadelta(0.7, 0.6, 1e-2, 0.1),
        torch.optim.Adadelta,
        {"lr": 0.7, "rho": 0.6, "eps": 1e-2, "weight_decay": 0.1},
    ),
}
OURS = {
    "adabelief": adabelief(0.05, 0.8, 0.9, 1e-3, 1e-4),
    "lion": lion(0.02, 0.8, 0.9, 0.1),
    "lamb": lamb(0.05, 0.8, 0.9, 1e-3, weight_decay=0.1),
    "lars": lars(0.05, 0.1, trust_coefficient=0.7, momentum=0.6),
    "yogi": yogi(0.05, 0.8, 0.9, 1e-3, initial_accumulator_value=1e-2),
    "adan": adan(0.05, 0.8, 0.9, 0.7, 1e-3, weight_decay=0.1),
    "muon": muon(0.05, 0.6, weight_decay=0.1, adam_b1=0.8, adam_b2=0.9, adam_eps=1e-3),
    "schedule_free": schedule_free(0.05, 0.8),
}


def trajectory(optimizer, steps=20, **extra):
    params, out = start(), []
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(optimizer, grad(loss)(params), state, params, **extra)
        out.append(tree.leaves(params))
    return out


def numpy_trajectory(update, steps=20):
    """Each leaf by `update(p, g, memory, t)`, with the gradients of the loss at all of them."""
    leaves, treespec = tree.flatten(start())
    leaves, memories, out = [leaf.numpy() for leaf in leaves], [{} for _ in leaves], []
    for t in range(1, steps + 1):
        params = tree.unflatten(treespec, [torch.as_tensor(np.asarray(leaf)) for leaf in leaves])
        grads = [g.numpy() for g in tree.leaves(grad(loss)(params))]
        leaves = [update(p, g, m, t) for p, g, m in zip(leaves, grads, memories, strict=True)]
        out.append([torch.as_tensor(np.asarray(leaf)) for leaf in leaves])
    return out


def assert_same(got, want):
    # Sums in another order differ by ulps, which twenty steps of bounded curvature do not blow up.
    for ours, theirs in zip(got, want, strict=True):
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TORCH)
def test_trajectory_of_torch(name):
    optimizer, torchs, options = TORCH[name]
    torch.set_default_dtype(torch.float64)  # in which NAdam keeps its product of momenta, whatever the parameters'
    try:
        want = torch_trajectory(torchs, **options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(trajectory(optimizer), want)


@pytest.mark.parametrize("name", OURS)
def test_trajectory_of_the_papers_equations(name):
    assert_same(trajectory(OURS[name]), numpy_trajectory(FORMULAS[name]))


@pytest.mark.parametrize("name", ["adan", "muon", "schedule_free"])
def test_one_optimizer_serves_two_runs(name):
    assert_same(trajectory(OURS[name]), trajectory(OURS[name]))


def test_muon_of_torch_up_to_its_bfloat16():
    w = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = w.clone().requires_grad_()
    theirs.grad = g.clone()
    torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1).step()
    optimizer = muon(0.1)
    ours, _ = step(optimizer, g, optimizer.init(w), w)
    # The step is 0.1 times a matrix of entries near 1, of which bfloat16 keeps three digits.
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=3e-3)


def test_orthogonalize_keeps_the_singular_vectors():
    m = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(m, full_matrices=False)
    core = u.mT @ orthogonalize(m) @ vt.mT
    torch.testing.assert_close(core, torch.diag(core.diagonal()))
    assert ((core.diagonal() > 0.6) & (core.diagonal() < 1.3)).all()


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_steps_with_the_gradient_of_the_neighbour(adaptive):
    optimizer, params = sam(sgd(0.1, 0.5), 0.2, adaptive=adaptive), start()
    got = trajectory(optimizer, grad_fn=grad(loss))
    want, velocity, spec = [], 0.0, tree.flatten(params)[1]
    leaves = tree.leaves(params)
    for _ in range(20):
        grads = tree.leaves(grad(loss)(tree.unflatten(spec, leaves)))
        scaled = [p.abs() * g if adaptive else g for p, g in zip(leaves, grads, strict=True)]
        norm = sum((s**2).sum() for s in scaled).sqrt()
        moves = [p**2 * g if adaptive else g for p, g in zip(leaves, grads, strict=True)]
        near = [p + 0.2 * m / norm for p, m in zip(leaves, moves, strict=True)]
        grads = tree.leaves(grad(loss)(tree.unflatten(spec, near)))
        velocity = [0.5 * (velocity[i] if velocity else 0) + g for i, g in enumerate(grads)]
        leaves = [p - 0.1 * v for p, v in zip(leaves, velocity, strict=True)]
        want.append(leaves)
    assert_same(got, want)


def test_prodigy_of_the_papers_equations():
    d0, b1, b2, eps, decay = 0.05, 0.8, 0.9, 1e-3, 0.1
    leaves, spec = tree.flatten(start())
    sizes = [leaf.shape for leaf in leaves]
    p = torch.cat([leaf.reshape(-1) for leaf in leaves]).numpy()
    first, m, v, s, r, d = p.copy(), 0, 0, 0, 0, d0
    want, distances = [], []
    for t in range(1, 21):
        parts = torch.as_tensor(p).split([shape.numel() for shape in sizes])
        at = tree.unflatten(spec, [part.reshape(shape) for part, shape in zip(parts, sizes, strict=True)])
        g = torch.cat([leaf.reshape(-1) for leaf in tree.leaves(grad(loss)(at))]).numpy()
        a = d * np.sqrt(1 - b2**t) / (1 - b1**t)
        m, v = b1 * m + (1 - b1) * d * g, b2 * v + (1 - b2) * d**2 * g**2
        r = np.sqrt(b2) * r + d * a / d0**2 * (g @ (first - p))
        s = np.sqrt(b2) * s + d * a / d0**2 * g
        p = p - a * (m / (np.sqrt(v) + d * eps) + decay * p)
        d = max(d, 2.0 * r / np.abs(s).sum())
        want.append(p)
        distances.append(d)
    optimizer = prodigy(1.0, b1, b2, eps, d0=d0, d_coefficient=2.0, weight_decay=decay)
    got = [torch.cat([leaf.reshape(-1) for leaf in leaves]) for leaves in trajectory(optimizer)]
    torch.testing.assert_close(torch.stack(got), torch.as_tensor(np.stack(want)), rtol=1e-10, atol=1e-10)
    assert distances[-1] > 2 * d0


def test_schedule_free_average_is_the_point_to_evaluate():
    optimizer, params = schedule_free(0.3, 0.9), start()
    state = optimizer.init(params)
    for _ in range(100):
        params, state = step(optimizer, grad(loss)(params), state, params)
    solution, constant = start(), sgd(0.3)
    for _ in range(1000):
        solution, _ = step(constant, grad(loss)(solution), constant.init(solution), solution)
    assert loss(state.x) - loss(solution) < 1e-2 * (loss(start()) - loss(solution))


@pytest.mark.parametrize("make", [lambda: sam(sgd(0.1)), lambda: schedule_free(0.1), prodigy, lambda: lamb(0.1)])
def test_update_without_what_it_needs_raises(make):
    optimizer, x = make(), torch.ones(2)
    with pytest.raises(ValueError, match="needs the"):
        optimizer.update(x, optimizer.init(x))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: amsgrad(0.1, b1=1.0), "`b1` must be at least"),
        (lambda: adamax(0.1, eps=-1.0), "`eps` must be at least"),
        (lambda: nadam(0.1, momentum_decay=-1.0), "`momentum_decay`"),
        (lambda: radam(0.1, threshold=3.0), "`threshold`"),
        (lambda: rmsprop(0.1, nesterov=True), "needs a momentum"),
        (lambda: lion(0.1, b2=1.0), "`b2`"),
        (lambda: muon(0.1, ns_steps=-1), "`ns_steps`"),
        (lambda: sam(sgd(0.1), -1.0), "`rho`"),
        (lambda: prodigy(d0=0.0), "`d0` must be above"),
        (lambda: schedule_free(0.0), "`learning_rate` must be above"),
        (lambda: adagrad(torch.ones(2)), "0-d tensor"),
    ],
)
def test_bad_hyperparameters_raise(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_every_optimizer_has_a_trajectory():
    tested = {name.split(",")[0] for name in [*TORCH, *OURS]} | {"adam", "adamw", "sgd", "sam", "prodigy"}
    others = {"orthogonalize", "ProdigyState", "ScheduleFreeState"}
    assert set(optimizers.__all__) == tested | others
