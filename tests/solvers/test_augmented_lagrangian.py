"""diffopt.solvers.augmented_lagrangian: KKT points, their multipliers, the derivatives of both, infeasibility."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from diffopt.implicit import Unrolled
from diffopt.solvers import LBFGS, LBFGSB, AugmentedLagrangian, Objective, ProximalGradient, SolverError, minimize
from solvers.standard_problems import f64, finite_difference

F64 = torch.float64
TIGHT = {"rtol": 0.0, "atol": 1e-10}


def quadratic_program(n=5, m=2, p=3):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=F64, generator=generator)  # noqa: E731
    L = draw(n, n)
    return L @ L.T + torch.eye(n, dtype=F64), draw(n), draw(m, n), draw(m), draw(p, n), 0.1 * draw(p) - 0.2


Q, Q1, A, B, G, D = quadratic_program()
START = torch.zeros(5, dtype=F64)
KKT_MATRIX = torch.cat([torch.cat([Q, A.T], 1), torch.cat([A, torch.zeros(2, 2, dtype=F64)], 1)])


def value(x, q, *_):
    return x @ Q @ x / 2 + q @ x


def equality_program(q, b, **options):
    found = minimize(value, START, (q, b), equality=lambda x, q, b: A @ x - b, **options)
    return torch.cat([found.value, found.dual[0]])


def inequality_program(d, **options):
    found = minimize(value, START, (Q1, d), inequality=lambda x, q, d: G @ x - d, **options)
    return torch.cat([found.value, found.dual[1]])


def test_an_equality_program_has_its_closed_form_and_jacobians():
    assert torch.allclose(equality_program(Q1, B), torch.linalg.solve(KKT_MATRIX, torch.cat([-Q1, B])), atol=1e-7)
    inverse = torch.linalg.inv(KKT_MATRIX)
    for jacobian in (jacrev, jacfwd):
        by_q, by_b = jacobian(equality_program, argnums=(0, 1))(Q1, B)
        assert torch.allclose(by_q, -inverse[:, :5], atol=1e-12)
        assert torch.allclose(by_b, inverse[:, 5:], atol=1e-12)


def test_inequalities_against_slsqp_and_their_derivatives():
    there = scipy.optimize.minimize(
        lambda x: x @ Q.numpy() @ x / 2 + Q1.numpy() @ x,
        np.zeros(5),
        jac=lambda x: Q.numpy() @ x + Q1.numpy(),
        method="SLSQP",
        tol=1e-14,
        constraints={"type": "ineq", "fun": lambda x: (D - G @ torch.as_tensor(x)).numpy()},
    )
    found = inequality_program(D, **TIGHT)
    assert np.allclose(found[:5], there.x, atol=1e-6)
    active = found[5:] > 1e-6
    assert 0 < active.sum() < 3
    assert (found[5:] >= 0).all()
    jacobian = jacrev(inequality_program)(D)
    assert torch.allclose(jacobian, finite_difference(lambda d: inequality_program(d, **TIGHT), D), atol=1e-5)
    assert (jacobian[:, ~active] == 0).all(), "an inactive constraint moves nothing"
    assert torch.allclose(
        jacobian[:, active], finite_difference(lambda d: inequality_program(d, **TIGHT), D)[:, active]
    )


def test_bounds_as_inequalities_equal_bounds():
    lower = f64(-0.1, -0.3, -5.0, 0.1, -0.2)

    def by_inequality(q, **options):
        return minimize(value, START, (q,), inequality=lambda x, q: lower - x, **options)

    for solver in (ProximalGradient(), LBFGSB()):
        by_bounds = lambda q, solver=solver: minimize(value, START, (q,), bounds=(lower, None), solver=solver).value  # noqa: E731
        assert torch.allclose(by_inequality(Q1).value, by_bounds(Q1), atol=1e-6)
        assert torch.allclose(jacrev(lambda q: by_inequality(q).value)(Q1), jacrev(by_bounds)(Q1), atol=1e-8)
    found = by_inequality(Q1, **TIGHT)
    slope = Q @ found.value + Q1
    assert torch.allclose(found.dual[1], slope.clamp(min=0), atol=1e-8), "multipliers are the slopes at the bounds"


def test_both_kinds_at_once_on_trees():
    def loss(x, a):
        return ((x["u"] - a) ** 2).sum() + x["v"] ** 2

    equality = lambda x, a: {"sum": x["u"].sum() + x["v"]}  # noqa: E731
    inequality = lambda x, a: (x["u"] - 0.5, -x["v"])  # noqa: E731
    init = {"u": torch.zeros(2, dtype=F64), "v": torch.zeros((), dtype=F64)}

    def solve(a):
        return minimize(loss, init, (a,), equality=equality, inequality=inequality)

    found = solve(f64(1.0, -0.4))
    u, v = found.value["u"], found.value["v"]
    (equal, unequal) = found.dual
    assert equal["sum"].shape == ()
    assert [part.shape for part in unequal] == [(2,), ()]
    assert torch.allclose(u.sum() + v, f64(0.0)[0], atol=1e-7)
    assert u[0] <= 0.5 + 1e-7
    assert torch.allclose(u, f64(0.5, -0.5), atol=1e-6)
    slopes = jacrev(lambda a: solve(a).value["u"])(f64(1.0, -0.4))
    there = finite_difference(lambda a: minimize(
        loss, init, (a,), equality=equality, inequality=inequality, **TIGHT).value["u"], f64(1.0, -0.4))  # fmt: skip
    assert torch.allclose(slopes, there, atol=1e-6)


def test_a_constraint_that_turns_active():
    def solve(a):
        return minimize(lambda x: ((x - a) ** 2).sum(), torch.zeros(1, dtype=F64), inequality=lambda x: x - 1)

    for a, x, slope, mu, mu_slope in ((0.4, 0.4, 1.0, 0.0, 0.0), (1.7, 1.0, 0.0, 1.4, 2.0)):
        found = solve(f64(a))
        assert torch.allclose(found.value, f64(x), atol=1e-7)
        assert torch.allclose(found.dual[1], f64(mu), atol=1e-7)
        assert torch.allclose(jacrev(lambda a: solve(a).value)(f64(a)), f64(slope)[:, None], atol=1e-8)
        assert torch.allclose(jacrev(lambda a: solve(a).dual[1])(f64(a)), f64(mu_slope)[:, None], atol=1e-8)


def test_non_convex_problems():
    hs71 = minimize(
        lambda x: x[0] * x[3] * x[:3].sum() + x[2],
        f64(1.0, 5.0, 5.0, 1.0),
        equality=lambda x: (x * x).sum() - 40,
        inequality=lambda x: torch.cat([25 - x.prod()[None], 1 - x, x - 5]),
    )
    assert torch.allclose(hs71.value, f64(1.0, 4.7429994, 3.8211503, 1.3794082), atol=1e-6)
    rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2  # noqa: E731
    disc = minimize(rosenbrock, torch.zeros(2, dtype=F64), inequality=lambda x: (x * x).sum() - 1)
    assert torch.allclose(disc.value, f64(0.7864151, 0.6176983), atol=1e-6)
    cubic = minimize(lambda x: -(x[0] ** 3), f64(0.1), inequality=lambda x: x - 1)
    assert torch.allclose(cubic.value, f64(1.0), atol=1e-7), "unbounded but for the constraint"


@pytest.mark.parametrize(
    "constraints",
    [
        {"equality": lambda x: torch.stack([x.sum() - 1, x.sum() - 2])},
        {"inequality": lambda x: torch.stack([x[0] - 1, 2 - x[0]])},
        {"equality": lambda x: (x * x).sum() + 1},
        {"equality": lambda x: x.sum() - 9, "inequality": lambda x: x - 1},
    ],
)
def test_constraints_that_cannot_be_met_are_refused(constraints):
    found = minimize(value, START, (Q1,), throw=False, **constraints_with_args(constraints))
    assert not bool(found.converged)
    assert "the constraints cannot be met together" in found.message
    with pytest.raises(SolverError, match="the constraints cannot be met together"):
        minimize(value, START, (Q1,), **constraints_with_args(constraints))


def constraints_with_args(constraints):
    return {name: lambda x, q, fn=fn: fn(x) for name, fn in constraints.items()}


def test_lanes_end_on_their_own_and_one_may_be_infeasible():
    def solve(b):
        return minimize(
            lambda x: (x * x).sum(), torch.zeros(2, dtype=F64), equality=lambda x: x.sum() - b,
            inequality=lambda x: x - 1, throw=False,
        )  # fmt: skip

    bs = f64(0.5, 1.0, 3.0)
    lanes = vmap(lambda b: (solve(b).value, solve(b).result))(bs)
    loop = [solve(b) for b in bs]
    assert torch.allclose(lanes[0][:2], torch.stack([s.value for s in loop[:2]]), atol=1e-7)
    assert lanes[1].tolist() == [0, 0, 4] == [int(s.result) for s in loop]
    slopes = vmap(grad(lambda b: (solve(b).value ** 2).sum()))(bs[:2])
    assert torch.allclose(slopes, bs[:2], atol=1e-6)
    assert torch.allclose(grad(lambda bs: vmap(lambda b: solve(b).dual[0])(bs).sum())(bs[:2]), f64(-1.0, -1.0))


def test_second_derivatives_of_the_value_are_those_of_the_dual():
    def optimum(b):
        found = minimize(value, START, (Q1, b), equality=lambda x, q, b: A @ x - b)
        return value(found.value, Q1)

    dual = lambda b: -minimize(value, START, (Q1, b), equality=lambda x, q, b: A @ x - b).dual[0]  # noqa: E731
    assert torch.allclose(grad(optimum)(B), dual(B), atol=1e-6)
    assert torch.allclose(hessian(optimum)(B), jacrev(dual)(B), atol=1e-6)


def test_unrolled_agrees_with_implicit():
    solver = AugmentedLagrangian()
    unrolled = jacrev(lambda d: inequality_program(d, solver=solver, adjoint=Unrolled(), **TIGHT))(D)
    assert torch.allclose(unrolled, jacrev(inequality_program)(D), atol=1e-4)
    with pytest.raises(ValueError, match="truncate"):
        inequality_program(D, adjoint=Unrolled(truncate=2))


def test_stepping_by_hand_equals_minimize():
    solver = AugmentedLagrangian(LBFGS(memory=5), penalty=2.0, growth=4.0)
    objective = Objective(lambda x: value(x, Q1), equality=lambda x: A @ x - B, sizes=(5, 2, 0))
    state = solver.init(objective, torch.zeros(7, dtype=F64))
    for _ in range(3):
        state = solver.step(objective, state)
    ours = minimize(value, START, (Q1,), equality=lambda x, q: A @ x - B, solver=solver, max_steps=3, throw=False)
    for mine, its in zip(state, ours.state, strict=True):
        assert torch.equal(mine, its)


def test_wrong_options_raise():
    for options, match in (
        ({"penalty": 0.0}, "penalty"),
        ({"growth": 1.0}, "growth"),
        ({"max_inner_steps": 0}, "inner"),
    ):
        with pytest.raises(ValueError, match=match):
            AugmentedLagrangian(**options)
    with pytest.raises(TypeError, match="inner solver"):
        AugmentedLagrangian(LBFGS)
    with pytest.raises(ValueError, match="equality="):
        minimize(value, START, (Q1,), solver=AugmentedLagrangian())
    with pytest.raises(ValueError, match="AugmentedLagrangian"):
        minimize(value, START, (Q1,), equality=lambda x, q: x.sum(), solver=LBFGS())
    with pytest.raises(ValueError, match="one structure"):
        minimize(value, START, (Q1,), equality=lambda x, q: x.sum(), bounds=(0, 1))
