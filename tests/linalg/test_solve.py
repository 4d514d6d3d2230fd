"""diffopt.linalg.solve: which solver is chosen, what is checked, and derivatives by rule."""

import dataclasses
import warnings

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from diffopt.linalg import (
    CG,
    GMRES,
    BiCGStab,
    ConvergenceWarning,
    Dense,
    LinearSolveError,
    function_operator,
    linear_solve,
    matrix_operator,
)
from diffopt.linalg.solve import _automatic, report

F64 = torch.float64
A = torch.tensor([[3.0, 1.0], [0.5, 2.0]], dtype=F64)
B = torch.tensor([1.0, -1.0], dtype=F64)
TOL = 1e-12


def close(a, b):
    return torch.allclose(a, b, rtol=TOL, atol=TOL)


@pytest.mark.parametrize(
    ("size", "tags", "expected"),
    [
        (256, [], Dense()),
        (257, [], GMRES()),
        (257, ["symmetric"], GMRES()),
        (257, ["positive_definite"], CG()),
        (1000, ["diagonal"], Dense()),
        (1000, ["tridiagonal"], Dense()),
    ],
)
def test_the_solver_is_chosen_by_size_and_structure(size, tags, expected):
    assert _automatic(matrix_operator(torch.eye(size), tags=tags)) == expected


def test_trees_and_matrices():
    op = matrix_operator(A, domain={"x": B[:1], "y": B[1:]}, codomain=(B[:1], B[1]))
    found = linear_solve(op, (B[:1], B[1]))
    expected = torch.linalg.solve(A, B)
    assert close(torch.cat([found["x"], found["y"]]), expected)
    assert close(linear_solve(A, B[:, None]), expected[:, None])


def test_gradients_are_the_textbook_ones():
    x = torch.linalg.solve(A, B)
    w = torch.linalg.solve(A.T, torch.ones(2, dtype=F64))
    by_A, by_b = grad(lambda A, b: linear_solve(A, b).sum(), (0, 1))(A, B)
    assert close(by_A, -torch.outer(w, x))
    assert close(by_b, w)


def test_one_operator_serves_many_solves():
    w = torch.tensor([2.0, 3.0], dtype=F64, requires_grad=True)
    op = function_operator(lambda w, v: w * v, w, B)
    y = linear_solve(op, linear_solve(op, B))
    assert close(torch.autograd.grad(y.sum(), w)[0], (-2 * B / w**3).detach())


def test_the_iterations_are_not_in_the_graph():
    """A solver that breaks the graph by `.data` still has the right gradient, because none is taken through it."""

    @dataclasses.dataclass(frozen=True)
    class Opaque:
        def solve(self, bound, b, x, tags):
            return torch.linalg.solve(bound.dense().detach(), b.detach()), torch.tensor(True)

        def transposed(self):
            return self

    found = jacrev(lambda b: linear_solve(A, b, Opaque()))(B)
    assert close(found, torch.linalg.inv(A))


def test_nothing_to_solve():
    empty = torch.ones(0, dtype=F64)
    assert linear_solve(torch.ones(0, 0, dtype=F64), empty).shape == (0,)
    assert grad(lambda b: linear_solve(torch.ones(0, 0, dtype=F64), b).sum())(empty).shape == (0,)
    assert vmap(lambda b: linear_solve(A, b))(torch.ones(0, 2, dtype=F64)).shape == (0, 2)
    zero = torch.zeros(2, dtype=F64)
    for solver in (Dense(), GMRES()):
        assert torch.equal(linear_solve(A, zero, solver), zero)
        assert close(jacrev(lambda b: linear_solve(A, b, solver))(zero), torch.linalg.inv(A))  # noqa: B023


def test_arguments_are_not_changed():
    matrix, side = A.clone(), B.clone()
    for solver in (Dense(), GMRES()):
        linear_solve(matrix, side, solver, init=side)
    assert torch.equal(matrix, A)
    assert torch.equal(side, B)


BAD = {
    "not square": (lambda: linear_solve(A[:1], B[:1]), ValueError, r"needs a square operator; got shape \(1, 2\)"),
    "size of b": (lambda: linear_solve(A, torch.ones(3, dtype=F64)), ValueError, "b must have 2 elements; got 3"),
    "size of init": (lambda: linear_solve(A, B, GMRES(), init=B[:1]), ValueError, "init must have 2 elements"),
    "dtype": (lambda: linear_solve(A, B.float()), TypeError, "b must be torch.float64 on cpu.*got torch.float32"),
    "device": (lambda: linear_solve(A, B.to("meta")), TypeError, "b must be torch.float64 on cpu.*meta"),
    "batch": (lambda: linear_solve(torch.stack([A, A]), B), ValueError, "Map over batches with vmap"),
    "integers": (lambda: linear_solve(torch.eye(2, dtype=torch.long), B), TypeError, "A must be a real floating-point"),
    "empty tree": (lambda: linear_solve(A, ()), ValueError, "at least one leaf"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_raise(case):
    solve, error, message = BAD[case]
    with pytest.raises(error, match=message):
        solve()


def test_a_failure_is_reported_as_asked():
    good, bad = torch.tensor(True), torch.tensor(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for failure in ("raise", "warn", "ignore"):
            report(good, failure, "CG")
        report(bad, "ignore", "CG")
    with pytest.warns(ConvergenceWarning, match=r"did not converge \(CG\), so that derivative cannot be trusted"):
        report(bad, "warn", "CG")


def test_several_right_sides_are_columns():
    Bs = torch.stack([B, B.cos(), 0 * B], 1)
    expected = torch.linalg.solve(A, Bs)
    op = function_operator(lambda A, v: A @ v, A, B)
    for solver in (None, Dense(), GMRES(rtol=1e-13), BiCGStab(rtol=1e-13)):
        assert close(linear_solve(A, Bs, solver), expected)
        assert close(linear_solve(op, Bs, solver), expected)
    assert close(linear_solve(op, Bs[:, :1]), expected[:, :1])
    assert linear_solve(A, Bs[:, :0]).shape == (2, 0)
    by_A, by_B = grad(lambda A, Bs: linear_solve(A, Bs).sin().sum(), (0, 1))(A, Bs)
    weight = torch.linalg.solve(A.T, expected.cos())
    assert close(by_A, -weight @ expected.T)
    assert close(by_B, weight)
    assert close(vmap(lambda s: linear_solve(s * A, Bs))(B), expected / B[:, None, None])


def test_several_right_sides_take_one_factorization_and_stop_on_their_own():
    made = []
    op = matrix_operator(A)

    def bind(A):
        def dense():
            made.append(1)
            return A

        return op.bind(A)._replace(dense=dense)

    linear_solve(dataclasses.replace(op, bind=bind), torch.eye(2, dtype=F64))
    assert len(made) == 1
    S = torch.diag(torch.linspace(1, 2, 10, dtype=F64))
    Bs = torch.stack([torch.ones(10, dtype=F64), S[0], 0 * S[0]], 1)
    x, stats = linear_solve(matrix_operator(S, tags=["positive_definite"]), Bs, CG(), has_aux=True)
    assert torch.allclose(S @ x, Bs, rtol=1e-9)
    assert stats.steps.tolist()[1:] == [1, 0]
    assert stats.steps[0] > 5
    _, warm = linear_solve(matrix_operator(S, tags=["positive_definite"]), Bs, CG(), init=x, has_aux=True)
    assert warm.steps.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"init must have shape \(10, 3\)"):
        linear_solve(S, Bs, GMRES(), init=x[:, :1])


def test_statistics_tell_how_it_went_and_carry_no_gradient():
    x, stats = linear_solve(A, B, GMRES(rtol=1e-13), has_aux=True)
    assert close(x, torch.linalg.solve(A, B))
    assert stats.converged.dtype == torch.bool
    assert stats.steps.dtype == torch.int64
    assert stats.steps == 2
    assert stats.residual <= 1e-13
    leaf = A.clone().requires_grad_()
    _, stats = linear_solve(leaf, B, Dense(), has_aux=True)
    assert not stats.residual.requires_grad
    for derivative in (jacrev, jacfwd):
        assert torch.equal(derivative(lambda A: linear_solve(A, B, has_aux=True)[1].residual)(A), torch.zeros_like(A))
    _, failed = linear_solve(A, B, GMRES(restart=1, max_restarts=1), has_aux=True, throw=False)
    assert not failed.converged
    assert failed.residual > 0.01
    x, stats = vmap(lambda b: linear_solve(A, b, has_aux=True))(torch.stack([B, 0 * B]))
    assert stats.converged.tolist() == [True, True]
    assert stats.residual.shape == (2,)
    empty = torch.ones(0, dtype=F64)
    assert linear_solve(torch.ones(0, 0, dtype=F64), empty, has_aux=True)[1].converged


def test_a_solver_may_say_only_whether_it_converged():
    @dataclasses.dataclass(frozen=True)
    class Own:
        good: bool

        def solve(self, bound, b, x, tags):
            return torch.linalg.solve(bound.dense(), b), torch.tensor(self.good)

        def transposed(self):
            return self

    x, stats = linear_solve(A, B, Own(True), has_aux=True)
    assert close(x, torch.linalg.solve(A, B))
    assert stats.converged
    with pytest.raises(LinearSolveError, match="Own did not solve"):
        linear_solve(A, B, Own(False))


def test_columns_of_a_wrong_kind_raise():
    with pytest.raises(TypeError, match=r"b must be torch.float64 on cpu"):
        linear_solve(A, torch.ones(2, 3))
    with pytest.raises(ValueError, match="b must have 2 elements; got 6"):
        linear_solve(A, torch.ones(3, 2, dtype=F64))
    op = matrix_operator(A, domain=B[:, None], codomain=B[:, None])
    with pytest.raises(ValueError, match="b must have 2 elements; got 6"):
        linear_solve(op, torch.ones(2, 3, dtype=F64))


@pytest.mark.parametrize("solver", [Dense(), GMRES()])
def test_no_right_sides_have_no_solutions(solver):
    A = torch.tensor([[2.0, 1.0], [0.5, 3.0]])
    x, stats = linear_solve(A, torch.ones(2, 0), solver, has_aux=True)
    assert x.shape == (2, 0)
    assert stats.converged.shape == (0,)
