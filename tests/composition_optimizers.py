"""Rows of the composition matrix: steps of every optimizer, as functions of the start and of all hyperparameters."""

import torch

from diffopt import optimizers, tree
from diffopt.optimizers import sam, schedule_free, sgd
from diffopt.transforms import scale_by_adam, step
from optimizers.formulas import advance

__all__ = ["OPTIMIZER_ROWS"]


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


VECTORS = {"w": f64([0.5, -0.4]), "b": f64(0.7)}
MATRIX = {"w": f64([[0.5, -0.4], [0.3, 0.8]]), "b": f64(0.7)}
MIX = f64([[0.8, -0.5], [0.3, 0.6]])


def training_loss(p):
    return torch.cosh(MIX @ p["w"]).sum() + (p["w"] * p["b"]).sum() + p["b"] ** 2


def slopes(p):
    return torch.func.grad(training_loss)(p)


def optimizer_row(name, values, make=None, *, steps=2, resumed_at=0, params=VECTORS, fixed=None):
    """Some steps against the formula of that name; `fixed` are options that are no hyperparameters."""
    make, fixed = make or getattr(optimizers, name), fixed or {}

    def operator(params, hyper):
        optimizer = make(**hyper, **fixed)
        state = optimizer.init(params)
        if resumed_at:
            state = (state[0]._replace(count=state[0].count + resumed_at), *state[1:])
        for _ in range(steps):
            # grad_fn as a lambda of its own, which torch.compile traces
            params, state = step(optimizer, slopes(params), state, params, grad_fn=lambda p: slopes(p))
        return params

    def reference(params, hyper):
        leaves, treespec = tree.flatten(params)
        memory = {}
        for t in range(resumed_at + 1, resumed_at + steps + 1):
            gradients = lambda leaves: tree.leaves(slopes(tree.unflatten(treespec, leaves)))  # noqa: E731
            leaves = advance(name, leaves, gradients, memory, t, **hyper, **fixed)
        return tree.unflatten(treespec, leaves)

    return operator, (params, {key: f64(value) for key, value in values.items()}), reference, None


RATE = {"learning_rate": 0.1}
ADAM = RATE | {"b1": 0.8, "b2": 0.9, "eps": 1e-2, "eps_root": 1e-3}
DECAY = {"weight_decay": 0.05}
MOMENTUM = RATE | {"momentum": 0.8}
RMS = RATE | {"decay": 0.8, "eps": 1e-2, "eps_root": 1e-3, "initial_scale": 0.1}


def adam_without_momentum(learning_rate, b1, b2, eps):
    return schedule_free(learning_rate, b1, base=scale_by_adam(0.0, b2, eps))


def sam_of_sgd(learning_rate, momentum, rho, adaptive=False):
    return sam(sgd(learning_rate, momentum), rho, adaptive=adaptive)


SAM = MOMENTUM | {"rho": 0.2}
PRODIGY = ADAM | DECAY | {"b3": 0.7, "d0": 0.05, "d_coefficient": 5.0}
MUON = MOMENTUM | DECAY | {"adam_b1": 0.8, "adam_b2": 0.9, "adam_eps": 1e-2, "adam_eps_root": 1e-3}
OPTIMIZER_ROWS = {
    "sgd, 3 steps": lambda: optimizer_row("sgd", MOMENTUM, steps=3),
    "sgd, Nesterov, 3 steps": lambda: optimizer_row("sgd", MOMENTUM, steps=3, fixed={"nesterov": True}),
    "adam, 3 steps": lambda: optimizer_row("adam", ADAM, steps=3),
    "adamw, 3 steps": lambda: optimizer_row("adamw", ADAM | DECAY, steps=3),
    "amsgrad, 2 steps": lambda: optimizer_row("amsgrad", ADAM),
    "adamax, 2 steps": lambda: optimizer_row("adamax", {key: ADAM[key] for key in ADAM if key != "eps_root"}),
    "nadam, 2 steps": lambda: optimizer_row("nadam", ADAM | {"momentum_decay": 0.3}),
    # its mean square comes in at the sixth step
    "radam, 2 steps": lambda: optimizer_row("radam", ADAM, resumed_at=4),
    "adabelief, 2 steps": lambda: optimizer_row("adabelief", ADAM | {"eps": 0.2, "eps_root": 0.1}),
    "yogi, 2 steps": lambda: optimizer_row("yogi", ADAM | {"initial_accumulator_value": 0.1}),
    "rmsprop, 2 steps": lambda: optimizer_row("rmsprop", RMS | {"momentum": 0.6}),
    "rmsprop, centered, 2 steps": lambda: optimizer_row("rmsprop", RMS, fixed={"centered": True}),
    "adagrad, 2 steps": lambda: optimizer_row(
        "adagrad", RATE | {"initial_accumulator_value": 0.1, "eps": 1e-2, "eps_root": 1e-3}
    ),
    "adadelta, 2 steps": lambda: optimizer_row("adadelta", RATE | DECAY | {"rho": 0.8, "eps": 0.2}),
    "lion, 2 steps": lambda: optimizer_row("lion", RATE | DECAY | {"b1": 0.8, "b2": 0.9}),
    "lamb, 2 steps": lambda: optimizer_row("lamb", ADAM | DECAY),
    "lars, 2 steps": lambda: optimizer_row("lars", MOMENTUM | DECAY | {"trust_coefficient": 0.7, "eps": 0.02}),
    "adan, 2 steps": lambda: optimizer_row("adan", ADAM | DECAY | {"b3": 0.7}),
    "muon, 2 steps": lambda: optimizer_row("muon", MUON, params=MATRIX, fixed={"ns_steps": 2}),
    "schedule_free, 2 steps": lambda: optimizer_row("schedule_free", RATE | {"b1": 0.8, "weight_lr_power": 1.5}),
    "schedule_free, Adam, 2 steps": lambda: optimizer_row(
        "schedule_free", RATE | {"b1": 0.8, "b2": 0.9, "eps": 1e-2}, adam_without_momentum
    ),
    "sam, 2 steps": lambda: optimizer_row("sam", SAM, sam_of_sgd),
    "sam, adaptive, 2 steps": lambda: optimizer_row("sam", SAM, sam_of_sgd, fixed={"adaptive": True}),
    "prodigy, 2 steps": lambda: optimizer_row("prodigy", PRODIGY),
}
