"""diffopt.linalg.krylov, and the other solvers by products: against dense solutions, and what stops them."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacfwd, jacrev, vmap

from diffopt.linalg import (
    CG,
    GMRES,
    LSMR,
    BiCGStab,
    IterativeRefinement,
    LinearSolveError,
    Neumann,
    NormalCG,
    function_operator,
    hessian_operator,
    jacobi,
    linear_solve,
    matrix_operator,
)

F64 = torch.float64
SOLVERS = {type(s).__name__: s for s in (kind(rtol=1e-13) for kind in (CG, NormalCG, GMRES, BiCGStab, LSMR))}
B = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
S = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.5, -0.2], [0.1, -0.2, 1.0]], dtype=F64)
TAGS = ["positive_definite"]
TOL = 1e-10  # the residual tolerance 1e-13 times the condition numbers here


def definite(n, seed):
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(n, n, dtype=F64, generator=generator)
    return M @ M.T / n + torch.eye(n, dtype=F64), torch.randn(n, dtype=F64, generator=generator)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from(sorted(SOLVERS)))
def test_solutions_are_those_of_the_dense_solver(n, seed, name):
    A, b = definite(n, seed)
    found = linear_solve(matrix_operator(A, tags=TAGS), b, SOLVERS[name])
    assert torch.allclose(found, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_vmap_equals_the_loop_with_lanes_that_stop_at_once(name):
    As = torch.stack([S, torch.eye(3, dtype=F64), 2 * S])
    bs = torch.stack([B, torch.zeros(3, dtype=F64), B])

    def solve(A, b):
        return linear_solve(matrix_operator(A, tags=TAGS), b, SOLVERS[name])

    assert torch.allclose(vmap(solve)(As, bs), torch.stack(list(map(solve, As, bs))), rtol=TOL, atol=TOL)
    for derivative in (jacrev, jacfwd):
        found = vmap(derivative(solve, argnums=(0, 1)))(As, bs)
        for i in range(3):
            inverse = torch.linalg.inv(As[i])
            expected = -torch.einsum("ij,k->ijk", inverse, inverse @ bs[i])
            assert torch.allclose(found[0][i], expected, rtol=TOL, atol=TOL)
            assert torch.allclose(found[1][i], inverse, rtol=TOL, atol=TOL)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_right_initial_guess_takes_no_steps_and_carries_no_gradient(name):
    solution = torch.linalg.solve(S, B)
    products = []

    def product(A, v):
        products.append(1)
        return A @ v

    op = function_operator(product, S, B, tags=TAGS)
    products.clear()
    found = linear_solve(op, B, SOLVERS[name], init=solution)
    assert torch.allclose(found, solution, rtol=TOL)
    assert len(products) <= 3  # the first residual, for NormalCG its transpose, and the last residual
    slope = grad(lambda x: linear_solve(op, B, SOLVERS[name], init=x).sum())(solution)
    assert torch.equal(slope, torch.zeros(3, dtype=F64))


@pytest.mark.parametrize("name", SOLVERS)
def test_large_operators_known_by_products_alone(name):
    n = 2000
    generator = torch.Generator().manual_seed(0)
    d = torch.linspace(1, 4, n, dtype=F64)
    u, b = (torch.randn(n, dtype=F64, generator=generator) / n**0.5 for _ in range(2))

    def solve(d, u):
        op = function_operator(lambda p, v: p[0] * v + p[1] * (p[1] @ v), (d, u), b, tags=TAGS)
        return linear_solve(op, b, SOLVERS[name])

    def sherman_morrison(d, u, b):
        return b / d - u / d * (u @ (b / d)) / (1 + u @ (u / d))

    x = sherman_morrison(d, u, b)
    assert torch.allclose(solve(d, u), x, rtol=1e-9, atol=1e-12)
    by_d, by_u = grad(lambda d, u: solve(d, u).sum(), (0, 1))(d, u)
    w = sherman_morrison(d, u, torch.ones_like(b))
    assert torch.allclose(by_d, -w * x, rtol=1e-8, atol=1e-11)
    assert torch.allclose(by_u, -(w * (u @ x) + x * (u @ w)), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", SOLVERS)
def test_failures_raise_and_are_returned_without_throw(name):
    A = torch.diag(torch.linspace(1, 1e4, 50, dtype=F64))
    op, b = matrix_operator(A, tags=TAGS), torch.ones(50, dtype=F64)
    few = GMRES(restart=2, max_restarts=1) if name == "GMRES" else type(SOLVERS[name])(max_steps=3)
    message = f"{name} did not solve the linear system .*max_steps is too small.*Pass throw=False"
    with pytest.raises(LinearSolveError, match=message):
        linear_solve(op, b, few)
    assert linear_solve(op, b, few, throw=False).isfinite().all()


@pytest.mark.parametrize(
    ("name", "A", "b"),
    [
        *((name, S, B * float("nan")) for name in SOLVERS),
        *((name, S * float("nan"), B) for name in SOLVERS),
    ],
)
def test_nan_raises(name, A, b):
    with pytest.raises(LinearSolveError, match="holds NaN"):
        linear_solve(matrix_operator(A, tags=TAGS), b, SOLVERS[name])


def test_cg_on_an_indefinite_operator_raises_although_tagged():
    for matrix in (torch.diag(torch.tensor([1.0, -1.0])), torch.tensor([[1.0, 2.0], [2.0, 1.0]])):
        op = matrix_operator(matrix, tags=["symmetric"])
        with pytest.raises(LinearSolveError, match="not positive definite"):
            linear_solve(op, torch.tensor([1.0, -0.9]), CG())


def test_cg_needs_a_tag():
    with pytest.raises(ValueError, match=r"CG needs a symmetric positive definite operator: tag it.*or use GMRES"):
        linear_solve(S, B, CG())


@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - {"CG"}))
def test_operators_without_structure(name):
    A = torch.tensor([[0.0, 2.0, 0.0], [-1.0, 0.0, 0.5], [0.3, 0.0, 1.0]], dtype=F64)
    assert torch.allclose(linear_solve(A, B, SOLVERS[name]), torch.linalg.solve(A, B), rtol=TOL)
    assert torch.allclose(jacrev(lambda b: linear_solve(A, b, SOLVERS[name]))(B), torch.linalg.inv(A), rtol=TOL)


@pytest.mark.parametrize("name", SOLVERS)
def test_singular_operators_solve_what_is_consistent_and_raise_else(name):
    op = matrix_operator(torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=F64)), tags=["symmetric"])
    found = linear_solve(op, torch.tensor([1.0, 1.0, 0.0], dtype=F64), SOLVERS[name])
    assert torch.allclose(found, torch.tensor([1.0, 0.5, 0.0], dtype=F64), atol=TOL)
    with pytest.raises(LinearSolveError, match="the operator is singular"):
        linear_solve(op, torch.ones(3, dtype=F64), SOLVERS[name])


def test_damping_is_differentiable_to_second_order_and_maps():
    def ours(damping):
        return linear_solve(matrix_operator(S, tags=TAGS), B, CG(rtol=1e-14, damping=damping))

    def theirs(damping):
        return torch.linalg.inv(S + damping * torch.eye(3, dtype=F64)) @ B

    values = torch.tensor([0.1, 0.5], dtype=F64)
    for derivative in (lambda f: f, jacfwd, jacrev, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f))):
        assert torch.allclose(vmap(derivative(ours))(values), vmap(derivative(theirs))(values), rtol=TOL, atol=TOL)


def test_a_preconditioner_speeds_up_and_carries_no_gradient():
    d = torch.logspace(0, 6, 30, dtype=F64)
    b = torch.ones(30, dtype=F64)
    for solver in (CG, GMRES, BiCGStab):
        steps = []

        def product(d, v):
            steps.append(1)  # noqa: B023
            return d * v

        def solve(scale, d=d, product=product, solver=solver):
            op = function_operator(product, d, b, tags=TAGS)
            return linear_solve(op, b, solver(rtol=1e-12, preconditioner=lambda r: r / (scale * d)))

        one = torch.ones((), dtype=F64)
        assert torch.allclose(solve(one), b / d, rtol=1e-10)
        assert len(steps) <= 5
        assert grad(lambda s: solve(s).sum())(one) == 0
        inverse = matrix_operator(torch.diag(1 / d), tags=TAGS)
        op = matrix_operator(torch.diag(d), tags=TAGS)
        found = grad(lambda b: linear_solve(op, b, solver(rtol=1e-12, preconditioner=inverse)).sum())(b)  # noqa: B023
        assert torch.allclose(found, 1 / d, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_tolerances_suit_the_dtype(dtype):
    A, b = (t.to(dtype) for t in definite(20, 0))
    op = matrix_operator(A, tags=TAGS)
    for solver in (CG(), NormalCG(), GMRES(), BiCGStab(), LSMR()):
        x = linear_solve(op, b, solver)
        assert x.dtype == dtype
        assert (A @ x - b).norm() <= 11 * torch.finfo(dtype).eps ** (2 / 3) * b.norm()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CG(rtol=-1), "rtol must be a non-negative number; got -1"),
        (lambda: GMRES(atol="x"), "atol must be a non-negative number; got 'x'"),
        (lambda: CG(max_steps=0), "max_steps must be a positive int; got 0"),
        (lambda: GMRES(restart=1.5), "restart must be a positive int; got 1.5"),
        (lambda: GMRES(max_restarts=-2), "max_restarts must be a positive int; got -2"),
        (lambda: CG(rtol=torch.tensor(1e-3)), "rtol must be a non-negative number"),
        (lambda: BiCGStab(rtol=-1), "rtol must be a non-negative number; got -1"),
        (lambda: LSMR(max_steps=0.5), "max_steps must be a positive int; got 0.5"),
    ],
)
def test_bad_options_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def counted(A, counts):
    """The operator of a symmetric matrix that counts its products, and has no dense matrix."""
    op = matrix_operator(A, tags=TAGS)

    def bind(*parameters):
        bound = op.bind(*parameters)

        def refuse():
            raise AssertionError("an iterative solver made a matrix")

        def count(product):
            def counting(v):
                counts.append(1)
                return product(v)

            return counting

        return bound._replace(matvec=count(bound.matvec), rmatvec=count(bound.rmatvec), dense=refuse, held=False)

    return dataclasses.replace(op, bind=bind)


@pytest.mark.parametrize(
    ("solver", "a_step", "else_at_most"),
    [
        (CG(), 1, 1),
        (NormalCG(), 2, 2),
        (GMRES(), 1, 1),
        (BiCGStab(), 2, 1),
        (LSMR(), 2, 2),
        (Neumann(400, 0.3), 1, 0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_no_matrix_is_made_and_products_are_as_few_as_promised(solver, a_step, else_at_most):
    A, b = definite(30, 3)
    counts = []
    x, stats = linear_solve(counted(A, counts), b, solver, has_aux=True)
    assert torch.allclose(x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)
    products = len(counts) - 1  # one more for the residual
    assert 0 <= products - a_step * stats.steps.item() <= else_at_most
    slope = grad(lambda b: linear_solve(counted(A, counts), b, solver).sum())(b)
    assert torch.allclose(slope, torch.linalg.solve(A, torch.ones_like(b)), rtol=1e-6, atol=1e-8)


def test_refinement_of_an_iterative_solver_makes_no_matrix():
    A, b = definite(20, 4)
    x = linear_solve(counted(A, []), b, IterativeRefinement(CG(rtol=1e-3)))
    assert (A @ x - b).norm() <= 1e-14 * b.norm()


@pytest.mark.parametrize("name", SOLVERS)
def test_one_unknown_and_lanes_with_steps_of_their_own(name):
    assert linear_solve(torch.full((1, 1), 4.0), torch.ones(1), GMRES()).item() == 0.25
    As = torch.stack([definite(12, 0)[0], torch.eye(12, dtype=F64), definite(12, 1)[0]])
    b = torch.ones(12, dtype=F64)

    def solve(A, b):
        return linear_solve(matrix_operator(A, tags=TAGS), b, SOLVERS[name], has_aux=True)

    x, stats = vmap(solve, in_dims=(0, None))(As, b)
    loop = [solve(A, b) for A in As]
    assert torch.allclose(x, torch.stack([one for one, _ in loop]), rtol=TOL)
    assert stats.steps.tolist() == [s.steps.item() for _, s in loop]
    assert stats.steps[1] <= 1 < stats.steps[0]
    single = linear_solve(matrix_operator(torch.full((1, 1), 4.0), tags=TAGS), torch.ones(1), SOLVERS["CG"])
    assert single.item() == 0.25


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 30), st.integers(0, 1000), st.sampled_from(["GMRES", "BiCGStab", "LSMR", "NormalCG"]))
def test_unsymmetric_solutions_are_right_or_raise(n, seed, name):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, dtype=F64, generator=generator) / n**0.5 + 2 * torch.eye(n, dtype=F64)
    b = torch.randn(n, dtype=F64, generator=generator)
    try:
        x = linear_solve(A, b, SOLVERS[name])
    except LinearSolveError:
        assert name != "GMRES"
        return
    assert (A @ x - b).norm() <= 1.1e-12 * b.norm()


def test_a_breakdown_is_found():
    rotation = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    with pytest.raises(LinearSolveError, match=r"BiCGStab did not solve.*the method broke down \(GMRES does not\)"):
        linear_solve(rotation, B[:2], BiCGStab())
    assert torch.allclose(linear_solve(rotation, B[:2], GMRES()), rotation.T @ B[:2])


@pytest.mark.parametrize("name", SOLVERS)
def test_warm_starts_save_steps(name):
    A, b = definite(40, 5)
    op = matrix_operator(A, tags=TAGS)
    x, cold = linear_solve(op, b, SOLVERS[name], has_aux=True)
    _, warm = linear_solve(op, b, SOLVERS[name], init=x * (1 + 1e-8), has_aux=True)
    assert warm.steps < cold.steps


def test_a_hessian_with_its_jacobi_preconditioner():
    scales = torch.logspace(0, 4, 50, dtype=F64)
    op = hessian_operator(lambda x: (scales * x**2).sum() / 2 + x.sum() ** 2, torch.ones_like(scales), tags=TAGS)
    b = scales.cos()
    _, plain = linear_solve(op, b, CG(rtol=1e-10), has_aux=True)
    _, better = linear_solve(op, b, CG(rtol=1e-10, preconditioner=jacobi(op)), has_aux=True)
    assert better.steps < plain.steps / 3
    with pytest.raises(ValueError, match=r"the preconditioner must have shape \(50, 50\); got \(3, 3\)"):
        linear_solve(op, b, CG(preconditioner=matrix_operator(S)))
