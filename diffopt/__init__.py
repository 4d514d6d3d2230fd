"""diffopt: differentiable optimization for PyTorch, as pure functions that compose with torch.func."""

from diffopt import (
    autodiff,
    convex,
    implicit,
    linalg,
    meta,
    multilevel,
    nn,
    optimizers,
    random,
    schedules,
    solvers,
    testing,
    transforms,
    tree,
    typing,
    visual,
    zero_order,
)
from diffopt.autodiff import (
    checkpoint,
    compile,
    custom_derivative,
    grad,
    unroll,
    value_and_grad,
    while_loop,
)
from diffopt.implicit import custom_fixed_point, custom_root, root_jvp, root_vjp
from diffopt.linalg import linear_solve, lstsq
from diffopt.optimizers import adam, adamw, sgd
from diffopt.solvers import fixed_point, least_squares, minimize, root, root_scalar
from diffopt.transforms import GradientTransformation, apply_updates, chain, step

__version__ = "0.1.0"

__all__ = [
    "GradientTransformation",
    "adam",
    "adamw",
    "apply_updates",
    "autodiff",
    "chain",
    "checkpoint",
    "compile",
    "convex",
    "custom_derivative",
    "custom_fixed_point",
    "custom_root",
    "fixed_point",
    "grad",
    "implicit",
    "least_squares",
    "linalg",
    "linear_solve",
    "lstsq",
    "meta",
    "minimize",
    "multilevel",
    "nn",
    "optimizers",
    "random",
    "root",
    "root_jvp",
    "root_scalar",
    "root_vjp",
    "schedules",
    "sgd",
    "solvers",
    "step",
    "testing",
    "transforms",
    "tree",
    "typing",
    "unroll",
    "value_and_grad",
    "visual",
    "while_loop",
    "zero_order",
]
