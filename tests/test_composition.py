"""The composition matrix: every public operator under every transform, against a plainly differentiable reference."""

import json
import pathlib
import shutil

import pytest
import torch

from composition_convex import CONVEX_ROWS
from composition_fused import FUSED_ROWS
from composition_linalg import LINALG_ROWS
from composition_meta import META_ROWS
from composition_multilevel import MULTILEVEL_ROWS
from composition_optimizers import OPTIMIZER_ROWS
from composition_solvers import SOLVER_ROWS
from composition_zero_order import ZERO_ORDER_ROWS
from diffopt import optimizers
from diffopt.autodiff import checkpoint, custom_derivative, fused_op, unroll, value_and_grad, while_loop
from diffopt.implicit import custom_fixed_point, custom_root
from diffopt.linalg import (
    CG,
    GMRES,
    Dense,
    NormalCG,
    gauss_newton_operator,
    hessian_operator,
    linear_solve,
    matrix_operator,
)
from diffopt.testing import check_composition
from problems import W, equation, newton_item, newton_lanes, newton_unrolled, reference_root, root_args

COMPILED = ("compile", "compile(grad)", "compile(grad(grad))", "compile(vmap(grad))")
ITERATIVE = dict.fromkeys(COMPILED, r"can be compiled with a Dense adjoint[^'\")]*|cannot be compiled[^'\")]*")
RECORD = pathlib.Path(__file__).parents[1] / "docs" / "_generated" / "composition"
TIGHT = 1e-13


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


ROWS = {}


def row(name):
    """Register a row: a function that returns `(operator, args, reference, cells that may raise)`."""
    return lambda build: ROWS.setdefault(name, build)


def root_row(solver, may_raise=None, **options):
    operator = custom_root(equation, **options)(solver)
    return lambda a, b: operator(torch.zeros_like(a), a, b), root_args(), reference_root, may_raise


ROWS["custom_root, dense"] = lambda: root_row(newton_lanes, ITERATIVE)
ROWS["custom_root, dense, fixed steps"] = lambda: root_row(newton_unrolled)
ROWS["custom_root, GMRES"] = lambda: root_row(newton_lanes, ITERATIVE, solve=GMRES(rtol=TIGHT))
ROWS["custom_root, NormalCG"] = lambda: root_row(newton_lanes, ITERATIVE, solve=NormalCG(rtol=TIGHT))
ROWS["custom_root, sequential"] = lambda: root_row(newton_item, ITERATIVE, batching="sequential")
ROWS["custom_root, sequential, GMRES"] = lambda: root_row(
    newton_item, ITERATIVE, batching="sequential", solve=GMRES(rtol=TIGHT)
)


@row("custom_root, NormalCG, trees and aux")
def _():
    def slope(x, a, scale):
        return {"u": scale * x["u"] + x["u"] ** 3 - a["p"], "v": x["v"] + 0.1 * (x["v"] + x["u"].sum()) - a["q"]}

    def newton(init, a, scale):
        u = torch.zeros_like(a["p"])
        for _ in range(40):
            u = u - (scale * u + u**3 - a["p"]) / (scale + 3 * u**2)
        return {"u": u, "v": (a["q"] - 0.1 * u.sum()) / 1.1}

    @custom_root(slope, solve=NormalCG(rtol=TIGHT), has_aux=True)
    def solve(init, a, *, scale):
        return newton(init, a, scale), {"steps": torch.tensor(40)}

    args = {"p": f64(0.5, -0.8), "q": f64(1.3)}, f64(1.2)[0]
    init = {"u": torch.zeros(2, dtype=torch.float64), "v": torch.zeros(1, dtype=torch.float64)}
    return lambda a, s: solve(init, a, scale=s)[0], args, lambda a, s: newton(None, a, s), ITERATIVE


@row("custom_root, CG")
def _():
    A = f64([2.0, 0.3], [0.3, 1.0])

    def slope(x, a):
        return A @ x + x**3 - a

    def newton(init, a):
        x = init
        for _ in range(25):
            x = x - torch.linalg.inv(A + torch.diag(3 * x**2)) @ (A @ x + x**3 - a)
        return x

    operator = custom_root(slope, solve=CG(rtol=TIGHT))(newton)
    return (
        lambda a: operator(torch.zeros_like(a), a),
        (f64(0.9, -0.7),),
        lambda a: newton(torch.zeros_like(a), a),
        ITERATIVE,
    )


@row("custom_root, captured")
def _():
    def operator(a, b):
        @custom_root(lambda x: equation(x, a, b))
        def solve(init):
            return newton_lanes(init, a, b)

        return solve(torch.zeros(3, dtype=torch.float64))

    return operator, root_args(), reference_root, ITERATIVE


def nested(depth, solve, batching="vmap"):
    """A root whose equation holds a root, to the given depth; the inner ones have closed forms."""
    options = {"solve": solve, "batching": batching}
    cube = custom_root(lambda z, x: z**3 - 1 - x**2, **options)(lambda init, x: (1 + x**2) ** (1 / 3))
    third = (lambda x: cube(x, x)) if depth == 3 else (lambda x: (1 + x**2) ** (1 / 3))
    square = custom_root(lambda y, x: y**2 - 1 - third(x), **options)(lambda init, x: (1 + third(x)).sqrt())

    def contraction(x, a, b, inner):
        return a - 0.1 * b * torch.tanh(W @ inner(x))

    def iterate(init, a, b, inner=lambda x: (1 + (1 + x**2) ** (1 / 3)).sqrt()):
        x = init
        for _ in range(9):
            x = contraction(x, a, b, inner)
        return x

    operator = custom_root(lambda x, a, b: x - contraction(x, a, b, lambda x: square(x, x)), **options)(
        lambda init, a, b: iterate(init, a, b)
    )
    reference = lambda a, b: iterate(torch.zeros_like(a), a, b)  # noqa: E731
    return lambda a, b: operator(torch.zeros_like(a), a, b), root_args(), reference, ITERATIVE


ROWS["custom_root, two deep"] = lambda: nested(2, None)
ROWS["custom_root, three deep, dense"] = lambda: nested(3, None)
ROWS["custom_root, two deep, GMRES"] = lambda: nested(2, GMRES(rtol=TIGHT))
ROWS["custom_root, three deep, NormalCG"] = lambda: nested(3, NormalCG(rtol=TIGHT))
ROWS["custom_root, two deep, sequential"] = lambda: nested(2, None, "sequential")


@row("custom_fixed_point")
def _():
    def contraction(x, a, b):
        return a - 0.1 * b * torch.tanh(W @ x)

    def iterate(init, a, b):
        x = init
        for _ in range(9):
            x = contraction(x, a, b)
        return x

    operator = custom_fixed_point(contraction)(iterate)
    return (
        lambda a, b: operator(torch.zeros_like(a), a, b),
        root_args(),
        lambda a, b: iterate(torch.zeros_like(a), a, b),
        None,
    )


def solve_row(solver, tags, matrix, may_raise=ITERATIVE):
    """x(theta, b) of A(theta) x = b, with the matrix a nonlinear function of theta."""
    args = f64(0.4, -0.3, 0.5), f64(1.0, -2.0, 0.5)
    return (
        lambda theta, b: linear_solve(matrix_operator(matrix(theta), tags=tags), b, solver),
        args,
        lambda theta, b: torch.linalg.inv(matrix(theta)) @ b,
        may_raise,
    )


def general(theta):
    return torch.eye(3, dtype=theta.dtype) * 2 + torch.outer(theta, theta.sin()) + W


def definite(theta):
    return general(theta) @ general(theta).mT + torch.eye(3, dtype=theta.dtype)


def triangular(theta):
    return torch.tril(general(theta))


ROWS["linear_solve, LU"] = lambda: solve_row(Dense(), (), general, None)
ROWS["linear_solve, Cholesky"] = lambda: solve_row(Dense(), ["positive_definite"], definite, None)
ROWS["linear_solve, triangular"] = lambda: solve_row(Dense(), ["lower_triangular"], triangular, None)
ROWS["linear_solve, diagonal"] = lambda: solve_row(Dense(), ["diagonal"], lambda t: torch.diag(2 + t.sin()), None)
ROWS["linear_solve, CG"] = lambda: solve_row(CG(rtol=TIGHT), ["positive_definite"], definite)
ROWS["linear_solve, NormalCG"] = lambda: solve_row(NormalCG(rtol=TIGHT), (), general)
ROWS["linear_solve, GMRES"] = lambda: solve_row(GMRES(rtol=TIGHT), (), general)


@row("linear_solve, CG, damped, preconditioned")
def _():
    def operator(theta, damping):
        A = definite(theta)
        solver = CG(rtol=TIGHT, damping=damping, preconditioner=lambda r: r / A.diagonal())
        return linear_solve(matrix_operator(A, tags=["positive_definite"]), f64(1.0, -2.0, 0.5), solver)

    def reference(theta, damping):
        shifted = definite(theta) + damping * torch.eye(3, dtype=torch.float64)
        return torch.linalg.inv(shifted) @ f64(1.0, -2.0, 0.5)

    return operator, (f64(0.4, -0.3, 0.5), f64(0.7)[0]), reference, ITERATIVE


def cosh_sum(x, t):
    return torch.cosh(W @ x).sum() * t + (x**2).sum()


@row("linear_solve, Hessian, CG")
def _():
    def operator(x, t):
        H = hessian_operator(cosh_sum, x, t, tags=["positive_definite"])
        return linear_solve(H, x.cos(), CG(rtol=TIGHT))

    def reference(x, t):
        y = torch.cosh(W @ x)
        return torch.linalg.inv(t * W.mT @ torch.diag(y) @ W + 2 * torch.eye(3, dtype=x.dtype)) @ x.cos()

    return operator, (f64(0.5, -0.4, 0.8), f64(1.3)[0]), reference, ITERATIVE


@row("linear_solve, Gauss-Newton, dense")
def _():
    def operator(x):
        G = gauss_newton_operator(lambda x: torch.sin(W @ x) + x, lambda y: torch.cosh(y).sum(), x)
        return linear_solve(G.shifted(0.5), x.cos(), Dense())

    def reference(x):
        J = torch.diag(torch.cos(W @ x)) @ W + torch.eye(3, dtype=x.dtype)
        H = torch.diag(torch.cosh(torch.sin(W @ x) + x))
        return torch.linalg.inv(J.mT @ H @ J + 0.5 * torch.eye(3, dtype=x.dtype)) @ x.cos()

    return operator, (f64(0.5, -0.4, 0.8),), reference, None


@row("while_loop")
def _():
    """Roots of a captured power by Newton's rule; lanes take different numbers of steps."""

    def newton(a, theta):
        def live(carry):
            x, _ = carry
            return (x**theta - a).abs().max() > 1e-14

        def body(carry):
            x, k = carry
            return x - (x**theta - a) / (theta * x ** (theta - 1)), k + 1

        # two more steps of a converged Newton method carry the derivatives to the third order
        x, _ = while_loop(live, body, (torch.ones_like(a) * 2, torch.tensor(0)), max_steps=12)
        return body(body((x, torch.tensor(0))))[0]

    return newton, (f64(3.0, 5.0), f64(1.7)[0]), lambda a, theta: a ** (1 / theta), None


def recurrence(x, theta):
    for _ in range(9):
        x = torch.sin(W @ x) + theta * x
    return x


def unroll_row(strategy):
    def operator(x, theta):
        return unroll(lambda c, _: (torch.sin(W @ c) + theta * c, None), x, length=9, checkpoint=strategy)[0]

    return operator, (f64(0.5, -0.4, 0.8), f64(0.4)[0]), recurrence, None


ROWS["unroll, checkpoint sqrt"] = lambda: unroll_row("sqrt")
ROWS["unroll, checkpoint log"] = lambda: unroll_row("log")
ROWS["unroll, checkpoint every 2"] = lambda: unroll_row(2)
ROWS["checkpoint"] = lambda: (checkpoint(recurrence), (f64(0.5, -0.4, 0.8), f64(0.4)[0]), recurrence, None)


@row("custom_derivative")
def _():
    def vjp(inputs, outputs, cotangents, wanted):
        return (outputs[0] * cotangents[0],)

    def jvp(inputs, outputs, tangents):
        return (outputs[0] * tangents[0],)

    exp = custom_derivative(lambda x: (x.exp(),), vjp=vjp, jvp=jvp, traceable=lambda x: (x.exp(),))
    return lambda x: exp(exp(x.sin())[0])[0], (f64(0.5, -0.4, 0.8),), lambda x: x.sin().exp().exp(), None


@row("fused_op")
def _():
    def reference(x, m, rate):
        m = 0.9 * m + x * x
        return x - rate * m.sin(), m

    def forward(columns, scalars):
        rate = scalars[0].reshape(-1, 1) if scalars[0].ndim else scalars[0]
        return tuple([o] for o in reference(columns[0][0], columns[1][0], rate))

    def backward(columns, scalars, cotangents, wanted, scalars_wanted):
        (x,), (m,), (x_bar,), (m_bar,) = *columns, *cotangents
        rate = scalars[0].reshape(-1, 1) if scalars[0].ndim else scalars[0]
        m = 0.9 * m + x * x
        inner = m_bar - rate * m.cos() * x_bar
        found = [x_bar + 2 * x * inner], [0.9 * inner]
        return tuple(f if w else None for f, w in zip(found, wanted, strict=True)), [(-m.sin() * x_bar).sum(-1)]

    op = fused_op(reference, forward, backward)

    def two_steps(x, m, rate):
        columns = op([[x], [m]], [rate])
        return tuple(column[0] for column in op(columns, [rate]))

    def plain(x, m, rate):
        x, m = reference(x, m, rate)
        return reference(x, m, rate)

    return two_steps, (f64(0.5, -0.4, 0.8), f64(0.3, 0.2, 0.1), f64(0.7)[0]), plain, None


@row("value_and_grad")
def _():
    def operator(x, t):
        value, slope = value_and_grad(cosh_sum)(x, t)
        return value * slope

    def reference(x, t):
        return cosh_sum(x, t) * (t * W.mT @ torch.sinh(W @ x) + 2 * x)

    return operator, (f64(0.5, -0.4, 0.8), f64(1.3)[0]), reference, None


ROWS |= OPTIMIZER_ROWS | FUSED_ROWS | LINALG_ROWS | SOLVER_ROWS | CONVEX_ROWS
ROWS |= META_ROWS | MULTILEVEL_ROWS | ZERO_ORDER_ROWS


# One row of each mechanism is checked whole in every run, the others by cells that nest the rest; `make test-slow`
# checks all rows whole. Compiling is most of a row's time, and grows with the product of nested solvers' steps.
WHOLE = (
    "custom_root, dense", "custom_root, sequential", "linear_solve, LU", "linear_solve, CG", "custom_derivative",
    "fused_op", "value_and_grad", "checkpoint", "sgd, 3 steps",
)  # fmt: skip
SAMPLE = (
    "forward", "grad", "jacfwd(jacfwd)", "vmap, shared", "vmap(jacfwd)", "vmap(hessian)", "hessian(vmap)",
    "grad(vmap(grad))", "vmap(jvp(grad))", "backward(vmap), thrice", "dual_level(vmap)",
)  # fmt: skip


def cases():
    for name in ROWS:
        if name not in WHOLE:
            yield pytest.param(name, SAMPLE, id=name)
        yield pytest.param(name, None, id=f"{name}, whole", marks=[] if name in WHOLE else pytest.mark.slow)


@pytest.mark.parametrize(("name", "cells"), list(cases()))
def test_every_cell_is_right_or_says_what_to_do(name, cells):
    record = RECORD / f"{name.replace(' ', '_')}.json"
    record.unlink(missing_ok=True)  # a row that fails must leave no record of an earlier run
    operator, args, reference, may_raise = ROWS[name]()
    backend = None if "deep," in name else "aot_eager"
    if cells is not None:
        may_raise = {cell: advice for cell, advice in (may_raise or {}).items() if cell in cells}
    report = check_composition(operator, args, reference, may_raise=may_raise, backend=backend, cells=cells)
    RECORD.mkdir(parents=True, exist_ok=True)
    found = {cell.name: [cell.status, cell.detail] for cell in report.cells}
    record.write_text(json.dumps({"name": name, "cells": found}))


def test_every_optimizer_has_a_row():
    public = {name for name in optimizers.__all__ if name.islower()} - {"orthogonalize"}
    public -= {"from_torch_state", "to_torch", "to_torch_state"}
    assert {name.split(",")[0] for name in OPTIMIZER_ROWS} == public


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["custom_derivative", "linear_solve, LU", "sgd, 3 steps"])
def test_a_sample_is_right_under_inductor(name):
    operator, args, reference, _ = ROWS[name]()
    check_composition(operator, args, reference, backend="inductor", cells=["compile", "compile(grad)"])
