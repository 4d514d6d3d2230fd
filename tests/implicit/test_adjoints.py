"""diffopt.implicit.adjoints: every adjoint under every transform, with captured tensors, and inside itself."""

import functools

import pytest
import torch
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from diffopt.implicit import Detached, Equation, Implicit, OneStep, Unrolled
from diffopt.linalg import CG, GMRES, Dense
from diffopt.solvers import LBFGS, Newton, ProximalGradient, minimize, root

F64 = torch.float64
START = torch.zeros(3, dtype=F64)
TIGHT = {"rtol": 0.0, "atol": 1e-11}
W = torch.tensor([[1.5, 0.2, -0.3], [0.2, 1.4, 0.1], [-0.3, 0.1, 1.8]], dtype=F64)
A = torch.tensor([0.7, -0.4, 1.1], dtype=F64)


def loss(x, a):
    """Strongly convex, and its minimizer is not linear in `a`."""
    return x @ W @ x / 2 + (x**4).sum() / 4 - a @ x


def slope(x, a):
    return W @ x + x**3 - a


def reference(a):
    """The minimizer by unrolled Newton steps, plain torch."""
    x = torch.zeros_like(a)
    for _ in range(12):
        x = x - torch.linalg.inv(W + torch.diag_embed(3 * x**2)) @ slope(x, a)
    return x


def solve(a, adjoint, **options):
    """Gradient steps of a fixed size, so that every adjoint, the truncated one too, has something to differentiate."""
    solver = ProximalGradient(0.3, accelerate=False)
    return minimize(
        loss, START, (a,), projection=lambda x: 1.0 * x, solver=solver, adjoint=adjoint, **{**TIGHT, **options}
    ).value


ADJOINTS = {
    "implicit": Implicit(),
    "implicit, GMRES": Implicit(GMRES(rtol=1e-13)),
    "unrolled": Unrolled(),
    "unrolled, sqrt": Unrolled(checkpoint="sqrt"),
    "unrolled, log": Unrolled(checkpoint="log"),
    "unrolled, 7": Unrolled(checkpoint=7),
    "truncated": Unrolled(truncate=60),
    "truncated, sqrt": Unrolled(truncate=60, checkpoint="sqrt"),
}


def close(ours, theirs, tol=1e-7):
    return torch.allclose(ours, theirs, rtol=tol, atol=tol)


def weighted(x):
    return (x * torch.tensor([0.3, 1.0, -0.6], dtype=F64)).sum() + (x**2).sum()


SLOW = ("unrolled, log", "truncated, sqrt")


@pytest.mark.parametrize(
    "adjoint",
    [pytest.param(a, marks=[pytest.mark.slow] * (name in SLOW)) for name, a in ADJOINTS.items()],
    ids=ADJOINTS,
)
def test_first_derivatives_under_every_transform(adjoint):
    ours, theirs = lambda a: weighted(solve(a, adjoint)), lambda a: weighted(reference(a))
    batch = torch.stack([A, 2 * A, A.flip(0)])
    assert close(solve(A, adjoint), reference(A))
    assert close(grad(ours)(A), grad(theirs)(A))
    assert close(jvp(ours, (A,), (A.flip(0),))[1], jvp(theirs, (A,), (A.flip(0),))[1])
    assert close(vmap(grad(ours))(batch), vmap(grad(theirs))(batch))
    assert close(grad(lambda b: vmap(ours)(b).sum())(batch), vmap(grad(theirs))(batch))
    tracked = A.clone().requires_grad_()
    ours(tracked).backward()
    assert close(tracked.grad, grad(theirs)(A))


@pytest.mark.parametrize("name", ["implicit", "implicit, GMRES", "unrolled"])
def test_second_derivatives(name):
    ours, theirs = lambda a: weighted(solve(a, ADJOINTS[name])), lambda a: weighted(reference(a))
    assert close(hessian(ours)(A), hessian(theirs)(A), 1e-6)
    tracked = A.clone().requires_grad_()
    (first,) = torch.autograd.grad(ours(tracked), tracked, create_graph=True)
    assert close(torch.autograd.grad(first.sum(), tracked)[0], hessian(theirs)(A).sum(0), 1e-6)


def test_truncation_converges_to_the_implicit_derivative():
    exact = jacrev(reference)(A)
    errors = [(jacrev(lambda a, k=k: solve(a, Unrolled(truncate=k)))(A) - exact).abs().amax() for k in (1, 5, 20)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert close(solve(A, Unrolled(truncate=1)), reference(A))


def test_one_step_is_a_step_of_the_equation():
    for size in (1.0, 0.4, torch.tensor(0.25, dtype=F64)):
        one = OneStep(size)
        ours = lambda a, one=one: minimize(loss, START, (a,), adjoint=one, **TIGHT).value  # noqa: E731
        assert torch.equal(ours(A), minimize(loss, START, (A,), **TIGHT).value), "the value is the solver's"
        expected = size * torch.eye(3, dtype=F64)
        for found in (jacrev(ours)(A), jacfwd(ours)(A), vmap(jacrev(ours))(A[None])[0]):
            assert close(found, expected)


def test_one_step_of_a_contraction_errs_by_its_rate():
    size = 2 / (W.diagonal().max() + 4)
    exact = jacrev(reference)(A)
    found = jacrev(lambda a: minimize(loss, START, (a,), adjoint=OneStep(size)).value)(A)
    H = W + torch.diag(3 * reference(A) ** 2)
    rate = torch.linalg.matrix_norm(torch.eye(3, dtype=F64) - size * H, 2)
    assert torch.linalg.matrix_norm(found - exact, 2) <= rate * torch.linalg.matrix_norm(exact, 2) + 1e-9
    assert rate < 0.6


@pytest.mark.parametrize("batching", ["vmap", "sequential"])
def test_detached_has_no_derivative_of_any_kind(batching):
    def run(a):
        def solver(init, a):
            return reference(a) if batching == "vmap" else torch.tensor(reference(a).tolist(), dtype=F64), ()

        return Detached().solve(solver, Equation(slope), START, (a,), batching=batching)[0]

    assert close(run(A), reference(A))
    assert (jacrev(run)(A) == 0).all()
    assert (jacfwd(run)(A) == 0).all()
    assert close(vmap(run)(A[None])[0], reference(A))
    assert (vmap(jacrev(run))(torch.stack([A, 2 * A])) == 0).all()
    assert (grad(lambda b: vmap(run)(b).sum())(A[None]) == 0).all()
    assert not run(A.clone().requires_grad_()).requires_grad
    assert (jvp(run, (A,), (A,))[1] == 0).all()


def test_detached_and_captured_tensors():
    def run(a, adjoint):
        return minimize(lambda x: loss(x, a), START, adjoint=adjoint).value

    assert (jacrev(run)(A, Detached()) == 0).all()
    assert (jacfwd(run)(A, Detached()) == 0).all()
    assert not run(A.clone().requires_grad_(), Detached()).requires_grad


class Module(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(a.clone())

    def forward(self, x):
        return loss(x, self.a)


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled(), OneStep(0.5)], ids=["implicit", "unrolled", "one step"])
def test_captured_tensors_are_differentiated(adjoint):
    expected = grad(lambda a: weighted(minimize(loss, START, (a,), adjoint=adjoint, **TIGHT).value))(A)
    closure = lambda a: lambda x: loss(x, a)  # noqa: E731
    partial = lambda a: functools.partial(loss, a=a)  # noqa: E731
    for make in (closure, partial):
        run = lambda a, make=make: weighted(minimize(make(a), START, adjoint=adjoint, **TIGHT).value)  # noqa: E731
        assert close(grad(run)(A), expected)
        assert close(vmap(grad(run))(A[None])[0], expected)
    module = Module(A)
    weighted(minimize(module, START, adjoint=adjoint, **TIGHT).value).backward()
    assert close(module.a.grad, expected)


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled(), OneStep(0.5)], ids=["implicit", "unrolled", "one step"])
def test_trees_and_static_leaves(adjoint):
    def fn(x, given):
        scale = 2.0 if given["kind"] == "double" else 1.0
        return scale * ((x["p"] - given["a"]) ** 2).sum() + given["times"] * x["q"] ** 2 + (x["q"] * x["p"]).sum()

    init = {"p": torch.zeros(3, dtype=F64), "q": torch.zeros((), dtype=F64)}

    def run(a):
        given = {"a": a, "kind": "double", "times": 3, "nothing": None}
        return minimize(fn, init, (given,), adjoint=adjoint, **TIGHT).value

    found = jacrev(lambda a: run(a)["p"])(A)
    assert close(found, jacfwd(lambda a: run(a)["p"])(A))
    assert set(run(A)) == {"p", "q"}
    if not isinstance(adjoint, OneStep):
        H = torch.block_diag(4 * torch.eye(3, dtype=F64), 6 * torch.ones(1, 1, dtype=F64))
        H[:3, 3] = H[3, :3] = 1.0
        assert close(found, torch.linalg.inv(H)[:3, :3] * 4)


def bilevel(a, adjoint, depth):
    """`minimize` inside of `minimize`: what is minimized is the loss at the minimizer of the level below."""
    if depth == 0:
        return ((a - 1) ** 2).sum() / 2
    return bilevel(solve(a, adjoint), adjoint, depth - 1) + (a**2).sum() / 2


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=["implicit", "unrolled"])
def test_a_minimization_inside_a_minimization(adjoint):
    def outer(scale, adjoint, atol):
        value = lambda a, scale: bilevel(a, adjoint, 1) + scale * a.sum()  # noqa: E731
        return minimize(value, START + 1, (scale,), solver=LBFGS(), rtol=0.0, atol=atol).value

    scale, step = torch.tensor(0.3, dtype=F64), 1e-4
    ends = [outer(scale + side * step, Implicit(), 1e-8) for side in (1, -1)]
    # unrolled, the number of the inner steps jumps with the outer unknown, and hides a smaller decrease
    atol = 1e-8 if isinstance(adjoint, Implicit) else 1e-5
    for jacobian in (jacrev, jacfwd):
        assert close(jacobian(outer)(scale, adjoint, atol), (ends[0] - ends[1]) / (2 * step), 1e3 * atol)


@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=["implicit", "unrolled"])
def test_two_levels_deep(adjoint):
    def plain(a, depth):
        return ((a - 1) ** 2).sum() / 2 if depth == 0 else plain(reference(a), depth - 1) + (a**2).sum() / 2

    assert close(bilevel(A, adjoint, 2), plain(A, 2))
    assert close(grad(bilevel)(A, adjoint, 2), grad(plain)(A, 2), 1e-6)
    if isinstance(adjoint, Implicit):
        assert close(hessian(lambda a: bilevel(a, adjoint, 2))(A), hessian(lambda a: plain(a, 2))(A), 1e-6)


def test_symmetric_equations_take_cg_and_others_do_not():
    symmetric = jacrev(lambda a: minimize(loss, START, (a,), adjoint=Implicit(CG(rtol=1e-13)), **TIGHT).value)(A)
    assert close(symmetric, jacrev(reference)(A))
    B = W + torch.tensor([[0.0, 0.9, 0.0], [-0.9, 0.0, 0.4], [0.0, -0.4, 0.0]], dtype=F64)
    found = jacrev(lambda a: root(lambda x, a: B @ x - a, START, (a,), adjoint=Implicit(Dense())).value)(A)
    assert close(found, torch.linalg.inv(B))
    assert not Equation(slope).symmetric


def test_the_implicit_derivative_does_not_depend_on_the_solver():
    equation = lambda a, solver: root(slope, START, (a,), solver=solver, **TIGHT).value  # noqa: E731
    assert close(jacrev(equation)(A, Newton()), jacrev(reference)(A))
    assert close(jacrev(lambda a: minimize(loss, START, (a,), **TIGHT).value)(A), jacrev(reference)(A))


def test_the_start_carries_gradient_only_when_unrolled():
    def from_start(start, adjoint):
        solver = ProximalGradient(0.1, accelerate=False)
        return minimize(
            loss, start, (A,), projection=lambda x: 1.0 * x, solver=solver, adjoint=adjoint, max_steps=3, throw=False
        ).value.sum()  # fmt: skip

    assert (grad(from_start)(START, Implicit()) == 0).all()
    assert (grad(from_start)(START, Unrolled(truncate=2)) == 0).all()
    assert (grad(from_start)(START, Unrolled()) != 0).all()


def test_steps_not_taken_have_no_derivative():
    at_solution = lambda a: minimize(loss, reference(A), (a,), adjoint=Unrolled(), atol=1e-6).value  # noqa: E731
    assert (jacrev(at_solution)(A) == 0).all(), "as documented: the start is no function of the argument"
    implicit = lambda a: minimize(loss, reference(A), (a,), atol=1e-6).value  # noqa: E731
    assert close(jacrev(implicit)(A), jacrev(reference)(A))


def test_wrong_options_raise_early():
    for truncate in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="truncate"):
            Unrolled(truncate=truncate)
    for checkpoint in ("cube", 0, -3, True, 1.5):
        with pytest.raises(ValueError, match="checkpoint"):
            Unrolled(checkpoint=checkpoint)
    with pytest.raises(TypeError, match="linear_solver"):
        Implicit(CG)
    with pytest.raises(TypeError, match="adjoint"):
        minimize(loss, START, (A,), adjoint=Implicit)
    with pytest.raises(ValueError, match="truncate"):
        minimize(loss, START, (A,), adjoint=Unrolled(truncate=3), solver=LBFGS())
    with pytest.raises(ValueError, match="cannot be unrolled"):
        Unrolled().solve(None, Equation(slope), START, (A,), batching="sequential")


@pytest.mark.parametrize("step_size", ["a", None])
def test_a_step_size_is_a_number(step_size):
    with pytest.raises(TypeError, match="step_size must be a number or a tensor"):
        OneStep(step_size)
