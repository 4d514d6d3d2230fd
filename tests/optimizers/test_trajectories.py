"""Twenty steps of each optimizer against torch.optim, and against its paper's equations in NumPy, over grids."""

import numpy as np
import pytest
import torch
from torch.func import grad

from diffopt import optimizers, tree
from diffopt.optimizers import (
    adagrad,
    adamax,
    amsgrad,
    lamb,
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
)
from diffopt.transforms import scale_by_adam, step
from optimizers.formulas import FORMULAS, advance
from optimizers.problems import loss, start, torch_trajectory


class TorchMuon:
    """torch's Muon for matrices, its AdamW for all else."""

    def __init__(self, leaves, *, lr, weight_decay, adam_betas, adam_eps, **options):
        matrices, rest = ([p for p in leaves if (p.ndim == 2) == matrix] for matrix in (True, False))
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, **options),
            torch.optim.AdamW(rest, lr=lr, weight_decay=weight_decay, betas=adam_betas, eps=adam_eps),
        ]

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def step(self):
        for part in self.parts:
            part.step()


def torch_betas(b1=0.9, b2=0.999, eps=1e-8):
    return {"betas": (b1, b2), "eps": eps}


ADAM_GRID = [
    {},
    {"b1": 0.7, "b2": 0.95, "eps": 1e-3},
    {"b1": 0.95, "b2": 0.8, "eps": 1e-5},
    {"b1": 0.0, "b2": 0.99},
    {"b1": 0.0, "b2": 0.0},
]
# the optimizer, its options, torch's and torch's options
TORCH = [
    *(
        (name, {"learning_rate": rate} | betas, torchs, {"lr": rate} | torch_betas(**betas) | extra)
        for name, torchs, extra in [
            ("adam", torch.optim.Adam, {}),
            ("amsgrad", torch.optim.Adam, {"amsgrad": True}),
            ("adamax", torch.optim.Adamax, {}),
            ("nadam", torch.optim.NAdam, {}),
            ("radam", torch.optim.RAdam, {}),
        ]
        for rate, betas in zip([0.05, 0.05, 0.02, 0.1, 0.01], ADAM_GRID, strict=True)
    ),
    *(
        ("adamw", {"learning_rate": 0.05, "weight_decay": decay} | betas, torch.optim.AdamW, options)
        for decay, betas in zip([0.0, 0.3, 0.01, 1.0, 0.1], ADAM_GRID, strict=True)
        for options in [{"lr": 0.05, "weight_decay": decay} | torch_betas(**betas)]
    ),
    *(
        ("nadam", {"learning_rate": 0.05, "momentum_decay": decay}, torch.optim.NAdam, options)
        for decay in (0.0, 0.3)
        for options in [{"lr": 0.05, "momentum_decay": decay}]
    ),
    *(
        ("sgd", {"learning_rate": rate, "momentum": m, "nesterov": n}, torch.optim.SGD, options)
        for rate, m, n in [
            (0.3, None, False),
            (0.05, 0.0, False),
            (0.1, 0.9, False),
            (0.1, 0.9, True),
            (0.02, 0.5, True),
        ]
        for options in [{"lr": rate, "momentum": m or 0.0, "nesterov": n}]
    ),
    *(
        (
            "rmsprop",
            {"learning_rate": 0.01, "decay": decay, "eps": eps, "centered": centered, "momentum": momentum},
            torch.optim.RMSprop,
            {"lr": 0.01, "alpha": decay, "eps": eps, "centered": centered, "momentum": momentum or 0.0},
        )
        for decay, eps, centered, momentum in [
            (0.99, 1e-8, False, None),
            (0.8, 1e-3, False, 0.7),
            (0.8, 1e-3, True, None),
            (0.5, 1e-2, True, 0.9),
            (0.0, 1e-1, False, 0.3),
        ]
    ),
    *(
        (
            "adagrad",
            {
                "learning_rate": lambda count, rate=rate, decay=decay: rate / (1 + decay * count.double()),
                "initial_accumulator_value": first,
                "eps": eps,
            },
            torch.optim.Adagrad,
            {"lr": rate, "lr_decay": decay, "initial_accumulator_value": first, "eps": eps},
        )
        for rate, decay, first, eps in [(0.1, 0.0, 0.0, 1e-10), (0.1, 0.2, 0.3, 1e-3), (1.0, 0.05, 0.01, 0.1)]
    ),
    *(
        (
            "adadelta",
            {"learning_rate": rate, "rho": rho, "eps": eps, "weight_decay": decay},
            torch.optim.Adadelta,
            options,
        )
        for rate, rho, eps, decay in [(1.0, 0.9, 1e-6, 0.0), (0.7, 0.6, 1e-2, 0.1), (2.0, 0.99, 1e-3, 0.5)]
        for options in [{"lr": rate, "rho": rho, "eps": eps, "weight_decay": decay}]
    ),
    *(
        (
            "muon",
            common | {"learning_rate": rate, "adam_b1": 0.8, "adam_b2": 0.9, "adam_eps": 1e-3},
            TorchMuon,
            common | {"lr": rate, "adam_betas": (0.8, 0.9), "adam_eps": 1e-3},
        )
        for rate, common in [
            (0.05, {"momentum": 0.95, "weight_decay": 0.1, "ns_steps": 5, "eps": 1e-7, "nesterov": True}),
            (0.02, {"momentum": 0.6, "weight_decay": 0.0, "ns_steps": 3, "eps": 1e-7, "nesterov": False}),
            (0.1, {"momentum": 0.3, "weight_decay": 0.5, "ns_steps": 1, "eps": 2.0, "nesterov": True}),
        ]
    ),
]
RATE = {"learning_rate": 0.05}
B = {"b1": 0.8, "b2": 0.9}
ROOT = B | RATE | {"eps": 1e-3, "eps_root": 1e-2}
DECAY = {"weight_decay": 0.1}
# options for which torch has no counterpart, or optimizers that it has not
NUMPY = [
    ("sgd", {"learning_rate": lambda count: 0.1 / (1 + count.double()), "momentum": 0.9, "nesterov": True}),
    ("adam", ROOT),
    ("adam", RATE | {"nesterov": True}),
    ("adam", ROOT | {"nesterov": True}),
    ("adamw", ROOT | DECAY),
    ("adamw", RATE | {"weight_decay": 0.5, "nesterov": True}),
    ("amsgrad", ROOT),
    ("nadam", ROOT | {"momentum_decay": 0.2}),
    ("radam", ROOT),
    ("radam", RATE | {"b2": 0.99, "threshold": 4.0}),
    ("radam", RATE | {"b1": 0.5, "b2": 0.95, "threshold": 7.5}),
    ("adabelief", RATE),
    ("adabelief", ROOT),
    ("adabelief", RATE | {"b1": 0.5, "b2": 0.99, "eps": 1e-2, "eps_root": 0.0}),
    ("yogi", RATE),
    ("yogi", ROOT | {"initial_accumulator_value": 1e-2}),
    ("yogi", RATE | {"b1": 0.5, "b2": 0.5, "initial_accumulator_value": 2.0}),
    ("rmsprop", {"learning_rate": 0.01, "eps_root": 1e-2, "initial_scale": 0.5}),
    ("rmsprop", {"learning_rate": 0.01, "decay": 0.8, "eps": 1e-2, "momentum": 0.7, "nesterov": True}),
    ("rmsprop", {"learning_rate": 0.01, "eps_root": 1e-2, "centered": True, "momentum": 0.7, "nesterov": True}),
    ("adagrad", {"learning_rate": 0.1, "initial_accumulator_value": 0.1, "eps_root": 0.2}),
    ("adadelta", {"learning_rate": 0.5, "rho": 0.7, "eps": 1e-3}),
    ("lion", RATE),
    ("lion", B | DECAY | {"learning_rate": 0.02}),
    ("lion", {"learning_rate": 0.01, "b1": 0.5, "b2": 0.5, "weight_decay": 1.0}),
    ("lamb", RATE),
    ("lamb", ROOT | DECAY),
    ("lamb", {"learning_rate": 0.02, "b1": 0.0, "b2": 0.5, "eps": 0.1, "weight_decay": 1.0}),
    ("lars", {"learning_rate": 1.0}),
    ("lars", RATE | DECAY | {"trust_coefficient": 0.7, "momentum": 0.6}),
    ("lars", RATE | {"trust_coefficient": 0.5, "eps": 0.3, "momentum": 0.5, "nesterov": True}),
    ("adan", RATE),
    ("adan", ROOT | DECAY | {"b3": 0.7}),
    ("adan", {"learning_rate": 0.02, "b1": 0.5, "b2": 0.0, "b3": 0.5, "weight_decay": 1.0}),
    ("muon", RATE),
    ("muon", RATE | {"nesterov": False, "weight_decay": 0.0, "ns_steps": 0, "eps": 0.5, "momentum": 0.0}),
    ("muon", RATE | {"adam_learning_rate": 0.01, "adam_b1": 0.8, "adam_b2": 0.9, "adam_eps_root": 0.02, "ns_steps": 2}),
    ("schedule_free", RATE),
    ("schedule_free", {"learning_rate": 0.3, "b1": 0.0}),
    ("schedule_free", {"learning_rate": lambda count: 0.02 * (1 + count.double()), "b1": 0.8, "weight_lr_power": 1.5}),
    ("schedule_free", {"learning_rate": lambda count: 0.3 / (1 + count.double()), "weight_lr_power": 0.0}),
    ("schedule_free", RATE | {"b2": 0.9, "eps": 1e-3}),
    ("sam", {"learning_rate": 0.1, "momentum": 0.5, "rho": 0.2}),
    ("sam", {"learning_rate": 0.3, "momentum": 0.0, "rho": 0.05}),
    ("sam", {"learning_rate": 0.1, "momentum": 0.5, "rho": 0.2, "adaptive": True}),
    ("prodigy", {"d0": 0.1}),
    ("prodigy", ROOT | DECAY | {"learning_rate": 1.0, "d0": 0.05, "d_coefficient": 2.0}),
    ("prodigy", B | {"learning_rate": 0.5, "b3": 0.7, "d0": 0.05, "d_coefficient": 5.0}),
]


def make_schedule_free(b2=None, eps=1e-8, **options):
    return schedule_free(**options, base=None if b2 is None else scale_by_adam(0.0, b2, eps))


def make_sam(learning_rate, momentum, rho, adaptive=False):
    return sam(sgd(learning_rate, momentum), rho, adaptive=adaptive)


def make(name, options):
    special = {"schedule_free": make_schedule_free, "sam": make_sam}
    return special.get(name, getattr(optimizers, name))(**options)


def trajectory(optimizer, steps=20):
    params, out = start(), []
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(optimizer, grad(loss)(params), state, params, grad_fn=grad(loss))
        out.append(tree.leaves(params))
    return out


def numpy_trajectory(name, options, steps=20):
    leaves, treespec = tree.flatten(start())

    def gradients(leaves):
        params = tree.unflatten(treespec, [torch.as_tensor(np.asarray(leaf)) for leaf in leaves])
        return [g.numpy() for g in tree.leaves(grad(loss)(params))]

    leaves, memory, out = [leaf.numpy() for leaf in leaves], {}, []
    for t in range(1, steps + 1):
        leaves = advance(name, leaves, gradients, memory, t, **options)
        out.append([torch.as_tensor(np.asarray(leaf)) for leaf in leaves])
    return out


def assert_same(got, want):
    # Sums in another order differ by ulps, which twenty steps of bounded curvature do not blow up.
    for ours, theirs in zip(got, want, strict=True):
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "options", "torchs", "torch_options"), TORCH)
def test_trajectory_of_torch(name, options, torchs, torch_options, monkeypatch):
    if torchs is TorchMuon:
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda m: m.clone())  # in which torch rounds, for speed
    torch.set_default_dtype(torch.float64)  # in which NAdam keeps its product of momenta, whatever the parameters'
    try:
        want = torch_trajectory(torchs, **torch_options)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(trajectory(make(name, options)), want)


TORCH_TOO = [(name, options) for name, options, *_ in TORCH if options.get("momentum", 0.0) is not None]


@pytest.mark.parametrize(("name", "options"), NUMPY + TORCH_TOO)
def test_trajectory_of_the_papers_equations(name, options):
    assert_same(trajectory(make(name, options)), numpy_trajectory(name, options))


@pytest.mark.parametrize(("name", "options"), dict(NUMPY).items())
def test_one_optimizer_serves_two_interleaved_runs(name, options):
    shared, apart = make(name, options), []
    runs = [start(), tree.map(torch.cos, start())]
    for params in runs:
        optimizer = make(name, options)
        state = optimizer.init(params)
        for _ in range(3):
            params, state = step(optimizer, grad(loss)(params), state, params, grad_fn=grad(loss))
        apart.append((params, state))
    together = [(params, shared.init(params)) for params in runs]
    for _ in range(3):
        together = [step(shared, grad(loss)(p), s, p, grad_fn=grad(loss)) for p, s in together]
    assert all(map(torch.equal, tree.leaves(together), tree.leaves(apart)))


def test_prodigy_of_the_grid_changes_its_estimate():
    for options in (options for name, options in NUMPY if name == "prodigy"):
        optimizer, params = make("prodigy", options), start()
        state = optimizer.init(params)
        for _ in range(20):
            params, state = step(optimizer, grad(loss)(params), state, params)
        assert state.d > 2 * options["d0"]


def test_orthogonalize_keeps_the_singular_vectors():
    m = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(m, full_matrices=False)
    core = u.mT @ orthogonalize(m) @ vt.mT
    torch.testing.assert_close(core, torch.diag(core.diagonal()))
    assert ((core.diagonal() > 0.6) & (core.diagonal() < 1.3)).all()


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
    others = {"orthogonalize", "ProdigyState", "ScheduleFreeState"}
    others |= {"TorchOptimizer", "from_torch_state", "to_torch", "to_torch_state"}
    assert set(optimizers.__all__) == set(FORMULAS) | others
    for name in FORMULAS:
        assert sum(name == tested for tested, *_ in [*TORCH, *NUMPY]) >= 3, name
