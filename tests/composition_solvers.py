"""Rows of the composition matrix: every verb, by more than one adjoint, against closed forms or Newton's method."""

import torch

from diffopt import sgd, tree
from diffopt.implicit import Implicit, Unrolled
from diffopt.linalg import CG
from diffopt.solvers import (
    BFGS,
    Anderson,
    AugmentedLagrangian,
    Brent,
    FixedPointIteration,
    FromOptimizer,
    GradientDescent,
    LevenbergMarquardt,
    Newton,
    NewtonCG,
    NonlinearCG,
    ProximalGradient,
    SciPyRoot,
    TrustRegion,
    fixed_point,
    least_squares,
    minimize,
    root,
    root_scalar,
)
from problems import equation, reference_root, root_args

__all__ = ["SOLVER_ROWS"]

TIGHT = {"rtol": 0.0, "atol": 1e-12}
CLOSE = {"rtol": 0.0, "atol": 1e-10}  # where values of 1 limit how small a residual gets
COMPILED = ("compile", "compile(grad)", "compile(grad(grad))", "compile(vmap(grad))")
RAISES = dict.fromkeys(
    COMPILED, r"depends on data[^'\")]*|can be compiled with a Dense[^'\")]*|cannot be compiled[^'\")]*"
)


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


MIX = f64([[0.8, -0.5, 0.2], [0.3, 0.6, -0.4], [0.1, 0.2, 0.9]])
TALL = torch.cat([MIX, f64([[0.4, -0.3, 0.7], [-0.2, 0.5, 0.1]])])
TARGET = f64([0.7, -0.4, 0.9])


def newton(slope, x, args, steps=12):
    """Newton's method with an explicit inverse, which torch differentiates rightly to any order."""
    for _ in range(steps):
        x = x - torch.linalg.inv(torch.func.jacrev(slope)(x, *args)) @ slope(x, *args)
    return x


def energy(x, a, t):
    return 0.5 * ((MIX @ x) ** 2).sum() + t * torch.cosh(x).sum() - (a * x).sum()


def energy_slope(x, a, t):
    return MIX.mT @ (MIX @ x) + t * torch.sinh(x) - a


def minimize_row(adjoint=None, **options):
    def operator(a, t):
        return minimize(energy, torch.zeros_like(a), (a, t), adjoint=adjoint, **options).value

    return operator, (TARGET, f64(1.3)), lambda a, t: newton(energy_slope, torch.zeros_like(a), (a, t)), RAISES


def root_row(adjoint=None, **options):
    def operator(a, b):
        return root(equation, torch.zeros_like(a), (a, b), adjoint=adjoint, **options, **TIGHT).value

    return operator, root_args(), reference_root, RAISES


def contraction(x, a, t):
    return torch.tanh(0.6 * MIX @ x + t * a)


def fixed_point_row(adjoint=None, **options):
    def operator(a, t):
        return fixed_point(contraction, torch.zeros_like(a), (a, t), adjoint=adjoint, **options, **TIGHT).value

    def reference(a, t):
        return newton(lambda x, a, t: x - contraction(x, a, t), torch.zeros_like(a), (a, t))

    return operator, (TARGET, f64(0.8)), reference, RAISES


def bracketed():
    def operator(a, b):
        ends = (torch.zeros_like(a), torch.full_like(a, 3.0))
        return root_scalar(lambda x, a, b: x**3 + a * x - b, None, (a, b), bracket=ends, solver=Brent(), **TIGHT).value

    def reference(a, b):
        x = torch.ones_like(a)
        for _ in range(12):
            x = x - (x**3 + a * x - b) / (3 * x**2 + a)
        return x

    return operator, (f64(1.2), f64(3.1)), reference, RAISES


def residuals(x, b, t):
    return TALL @ x + t * torch.sin(TALL @ x) - b


def fit():
    def operator(b, t):
        return least_squares(residuals, torch.zeros_like(TARGET), (b, t), solver=LevenbergMarquardt(), **TIGHT).value

    def reference(b, t):
        slope = torch.func.grad(lambda x, b, t: 0.5 * (residuals(x, b, t) ** 2).sum())
        return newton(slope, torch.zeros_like(TARGET), (b, t))

    return operator, (f64([1.2, -0.9, 0.1, 0.8, -0.6]), f64(0.3)), reference, RAISES


def lasso(solver=None):
    soft = lambda x, t: x.sign() * (x.abs() - t).clamp(min=0)  # noqa: E731
    signs = f64([-1.0, 1.0])  # of the last two coefficients; the first is zero

    def operator(b, l1):
        fn = lambda x, b: 0.5 * ((TALL @ x - b) ** 2).sum()  # noqa: E731
        return minimize(
            fn, torch.zeros_like(TARGET), (b,), prox=lambda x, s: soft(x, s * l1), solver=solver, **CLOSE
        ).value

    def reference(b, l1):
        M = TALL[:, 1:]
        x = torch.linalg.inv(M.mT @ M) @ (M.mT @ b - l1 * signs)
        return torch.cat([torch.zeros_like(x[:1]), x])

    return operator, (f64([1.2, -0.9, 0.1, 0.8, -0.6]), f64(0.8)), reference, RAISES


def box():
    def operator(b, upper):
        fn = lambda x, b: 0.5 * ((TALL @ x - b) ** 2).sum()  # noqa: E731
        return minimize(fn, 0.1 * torch.ones_like(TARGET), (b,), bounds=(0.0, upper), **CLOSE).value

    def reference(b, upper):  # the first at its upper bound, the second at zero
        fixed = torch.stack([upper[0], torch.zeros_like(upper[0])])
        rest = TALL[:, 2] @ (b - TALL[:, :2] @ fixed) / (TALL[:, 2] @ TALL[:, 2])
        return torch.cat([fixed, rest[None]])

    return operator, (f64([1.4, -0.9, 0.6, 0.9, -0.6]), f64([0.5, 2.0, 2.0])), reference, RAISES


def plane_and_ball():
    """The nearest point to `a` in a plane, and within a ball: both constraints are active."""
    solver = AugmentedLagrangian()  # made here, as torch.compile does not trace the making of solvers that hold others

    def operator(a, t, r):
        solution = minimize(
            lambda x, a: 0.5 * ((x - a) ** 2).sum(), torch.zeros_like(a), (a,),
            equality=lambda x, a: x.sum() - t, inequality=lambda x, a: (x**2).sum() - r,
            solver=solver, **CLOSE,
        )  # fmt: skip
        return solution.value, solution.dual

    def reference(a, t, r):
        centre = t / 3
        away = a - a.mean()
        inside = (r - 3 * centre**2).sqrt()
        x = centre + away * inside / away.norm()
        mu = (away.norm() / inside - 1) / 2
        lam = a.mean() - centre * (1 + 2 * mu)
        return x, (lam, mu)

    flat = lambda f: lambda *args: tree.ravel(f(*args))[0]  # noqa: E731
    return flat(operator), (2 * TARGET, f64(0.6), f64(0.9)), flat(reference), RAISES


SOLVER_ROWS = {
    "root, Newton": lambda: root_row(),
    "root, Newton, unrolled": lambda: root_row(Unrolled(), solver=Newton()),
    "root, Newton, unrolled, checkpoint": lambda: root_row(Unrolled(checkpoint="sqrt"), solver=Newton()),
    "root, SciPy": lambda: root_row(solver=SciPyRoot()),
    "root_scalar, Brent": bracketed,
    "fixed_point, Anderson": lambda: fixed_point_row(solver=Anderson()),
    "fixed_point, unrolled": lambda: fixed_point_row(Unrolled(), solver=FixedPointIteration()),
    "least_squares": fit,
    "minimize, LBFGS": lambda: minimize_row(**TIGHT),
    "minimize, BFGS, CG": lambda: minimize_row(Implicit(CG(rtol=1e-13)), solver=BFGS(), **TIGHT),
    "minimize, descent, unrolled": lambda: minimize_row(Unrolled(), solver=GradientDescent(0.4), **TIGHT),
    "minimize, NewtonCG": lambda: minimize_row(solver=NewtonCG(), **CLOSE),
    "minimize, TrustRegion": lambda: minimize_row(solver=TrustRegion(), **CLOSE),
    "minimize, NonlinearCG": lambda: minimize_row(solver=NonlinearCG(), **CLOSE),
    "minimize, FromOptimizer": lambda: minimize_row(solver=FromOptimizer(sgd(0.4)), **CLOSE),
    "minimize, prox": lasso,
    "minimize, prox, plain": lambda: lasso(ProximalGradient(accelerate=False)),
    "minimize, bounds": box,
    "minimize, constraints": plane_and_ball,
}
