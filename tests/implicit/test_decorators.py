"""diffopt.implicit.decorators: any solver, any trees, any captured tensors; right or an error."""

import collections
import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from diffopt.implicit import custom_fixed_point, custom_root
from diffopt.linalg import CG, GMRES, Dense, NormalCG

F64 = torch.float64
A = torch.tensor([4.0, 9.0], dtype=F64)
ONE = torch.ones(2, dtype=F64)
TOL = 1e-10


def close(a, b, tol=TOL):
    return torch.allclose(a, b, rtol=tol, atol=tol)


def make_sqrt(solver=lambda init, a: a.sqrt(), **options):
    return custom_root(lambda x, a: x * x - a, **options)(solver)


@pytest.fixture(scope="module")
def ridge():
    """`(X, y, lam, w, dw/dlam)` in closed form."""
    from sklearn.datasets import make_regression

    X, y = (torch.as_tensor(a, dtype=F64) for a in make_regression(10, 3, random_state=0))
    lam = torch.tensor(5.0, dtype=F64)
    H = X.T @ X / len(y) + lam * torch.eye(3, dtype=F64)
    w = torch.linalg.solve(H, X.T @ y / len(y))
    return X, y, lam, w, -torch.linalg.solve(H, w)


def ridge_slope(w, lam, X, y):
    return X.T @ (X @ w - y) / len(y) + lam * w


def ridge_solver(init, lam, X, y):
    return torch.linalg.solve(X.T @ X / len(y) + lam * torch.eye(3, dtype=F64), X.T @ y / len(y))


@pytest.mark.parametrize("solve", [None, Dense(), CG(rtol=1e-13), GMRES(rtol=1e-13), NormalCG(rtol=1e-13)])
@pytest.mark.parametrize("form", ["root", "fixed point", "aux"])
def test_ridge_against_the_closed_form(ridge, solve, form):
    X, y, lam, w, dw = ridge
    if form == "fixed point":
        step = custom_fixed_point(lambda w, *args: w - ridge_slope(w, *args), solve=solve, symmetric=True)
        decorated = step(ridge_solver)
    elif form == "root":
        decorated = custom_root(ridge_slope, solve=solve, symmetric=True)(ridge_solver)
    else:
        with_aux = custom_root(ridge_slope, solve=solve, symmetric=True, has_aux=True)(
            lambda *args: (ridge_solver(*args), {"note": "exact", "lam": args[1]})
        )
        _, aux = with_aux(w, lam.clone().requires_grad_(), X, y)
        assert aux["note"] == "exact"
        assert not aux["lam"].requires_grad
        decorated = lambda *args: with_aux(*args)[0]  # noqa: E731
    init = torch.zeros(3, dtype=F64)
    assert close(decorated(init, lam, X, y), w)
    assert close(jacrev(decorated, 1)(init, lam, X, y), dw, 1e-8)
    assert close(jacfwd(decorated, 1)(init, lam, X, y), dw, 1e-8)
    tracked = lam.clone().requires_grad_()
    assert close(torch.autograd.grad(decorated(init, tracked, X, y).sum(), tracked)[0], dw.sum(), 1e-8)


def test_ridge_with_keywords_in_any_order(ridge):
    X, y, lam, _, dw = ridge
    decorated = custom_root(lambda w, lam, *, y, X: ridge_slope(w, lam, X, y))(
        lambda init, lam, *, X, y: ridge_solver(init, lam, X, y)
    )
    for names in itertools.permutations(["lam", "X", "y"]):
        given_ = {"lam": lam, "X": X, "y": y}

        def solution(lam):
            kwargs = {name: {**given_, "lam": lam}[name] for name in names}  # noqa: B023
            return decorated(torch.zeros(3, dtype=F64), **kwargs)

        assert close(jacrev(solution)(lam), dw, 1e-8)


@pytest.mark.parametrize("theta", [0.0, torch.pi / 2])
def test_cosine_fixed_point(theta):
    theta = torch.tensor(theta, dtype=F64)

    @custom_fixed_point(lambda x, theta: torch.cos(x) + theta)
    def solve(init, theta):
        x = init
        for _ in range(200):
            x = 0.5 * (x + torch.cos(x) + theta)
        return x

    x = solve(theta, theta)
    assert close(x, torch.tensor(0.7390851332151607 if theta == 0 else torch.pi / 2, dtype=F64))
    assert close(grad(solve, 1)(theta, theta), 1 / (1 + torch.sin(x)))


@pytest.mark.parametrize("solve", [None, GMRES(rtol=1e-12)])
def test_affine_fixed_point_of_two_hundred(solve):
    n = 200
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(n, n, dtype=F64, generator=generator)
    M = 0.45 * M / torch.linalg.matrix_norm(M, 2)
    b = torch.randn(n, dtype=F64, generator=generator)

    @custom_fixed_point(lambda x, M, b: M @ x + b, solve=solve)
    def iterate(init, M, b):
        x = init
        for _ in range(60):
            x = M @ x + b
        return x

    inverse = torch.linalg.inv(torch.eye(n, dtype=F64) - M)
    if solve is None:
        assert close(jacrev(iterate, 2)(torch.zeros(n, dtype=F64), M, b), inverse, 1e-9)
    by_M, by_b = grad(lambda M, b: M[0] @ iterate(0 * b, M, b), (0, 1))(M, b)
    x, w = inverse @ b, inverse.T @ M[0]
    assert close(by_b, w, 1e-9)
    assert close(by_M, torch.outer(w, x) + torch.outer(torch.eye(n, dtype=F64)[0], x), 1e-8)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=5), st.sampled_from(["vmap", "sequential"]))
def test_vmap_equals_the_loop(values, batching):
    a = torch.tensor(values, dtype=F64)
    one = torch.ones((), dtype=F64)
    sqrt = make_sqrt(batching=batching)
    assert close(vmap(sqrt, (None, 0))(one, a), a.sqrt())
    assert close(vmap(grad(sqrt, 1), (None, 0))(one, a), 0.5 / a.sqrt())
    assert close(grad(lambda a: vmap(sqrt, (None, 0))(one, a).sum())(a), 0.5 / a.sqrt())


def test_vmap_options():
    sqrt, Z = make_sqrt(), torch.stack([A, 4 * A])
    init = torch.ones(2, dtype=F64)
    assert close(vmap(sqrt, (None, -1), -1)(init, Z.T), Z.sqrt().T)
    assert close(vmap(sqrt, (0, None))(torch.ones(3, 2, dtype=F64), A), A.sqrt().expand(3, 2))
    assert close(vmap(sqrt, (None, 0), chunk_size=1)(init, Z), Z.sqrt())
    assert close(jacrev(lambda a: sqrt(init, a), chunk_size=1)(A), torch.diag(0.5 / A.sqrt()))
    noisy = make_sqrt(lambda init, a: a.sqrt() + 0 * torch.rand(()))
    assert close(vmap(lambda a: noisy(init, a), randomness="different")(Z), Z.sqrt())
    assert vmap(lambda a: sqrt(init, a))(torch.ones(0, 2, dtype=F64)).shape == (0, 2)


# What solvers may do.


def sgd_solver(init, a):
    x = init.clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.25)
    for _ in range(80):
        optimizer.zero_grad()
        ((x - a) ** 2).sum().backward()
        optimizer.step()
    return x


def scipy_solver(init, a):
    found = scipy.optimize.root(lambda x: x - a.numpy(), init.numpy(), tol=1e-14)
    return torch.as_tensor(found.x)


@pytest.mark.parametrize("solver", [sgd_solver, scipy_solver])
def test_solvers_with_backward_optimizers_or_scipy_inside(solver):
    decorated = custom_root(lambda x, a: x - a, batching="sequential")(solver)
    init = torch.zeros(2, dtype=F64)
    a = A.clone().requires_grad_()
    assert close(torch.autograd.grad((decorated(init, a) ** 2).sum(), a)[0], 2 * A)
    assert a.grad is None
    with torch.no_grad():
        assert close(decorated(init, a), A)
    if solver is scipy_solver:
        assert close(grad(lambda a: (decorated(init, a) ** 2).sum())(A), 2 * A)
        assert close(vmap(jacfwd(lambda a: decorated(init, a)))(A[None])[0], torch.eye(2, dtype=F64))


def test_the_solver_leaves_no_gradients_behind():
    w = torch.tensor(3.0, dtype=F64, requires_grad=True)

    def solver(init, a):
        x = init.clone().requires_grad_()
        ((x - a * w) ** 2).sum().backward()
        return (a * w).detach()

    a = A.clone().requires_grad_()
    by_a, by_w = torch.autograd.grad(custom_root(lambda x, a: x - a * w)(solver)(0 * A, a).sum(), (a, w))
    assert close(by_a, 3 * ONE)
    assert close(by_w, A.sum())
    assert a.grad is None
    assert w.grad is None


def test_nothing_decorated_changes_its_arguments():
    init, a = torch.ones(2, dtype=F64), A.clone()
    tree = {"a": a, "options": [1, None]}
    solve = custom_root(lambda x, t: x * x - t["a"])(lambda init, t: t["a"].sqrt())
    grad(lambda a: solve(init, {**tree, "a": a}).sum())(a)
    solve(init, tree)
    assert torch.equal(init, torch.ones(2, dtype=F64))
    assert torch.equal(a, A)
    assert tree["a"] is a
    assert tree["options"] == [1, None]


# Trees, static leaves, init and aux.


def test_trees_with_every_kind_of_node_and_static_leaves():
    Pair = collections.namedtuple("Pair", "p q")

    @custom_root(lambda x, t, mode, data: {"k": [x["k"][0] * t["m"].p - t["l"][0]], "none": None})
    def solve(init, t, mode, data):
        assert mode == "fast"
        assert isinstance(data, np.ndarray)
        return {"k": [t["l"][0] / t["m"].p], "none": None}

    def quotient(p, l):
        tree = {"m": Pair(p, None), "l": [l, 3, "s"], "e": {}, "z": ()}
        return solve({"k": [ONE], "none": None}, tree, "fast", np.ones(3))["k"][0]

    p, l = A, torch.tensor([1.0, -2.0], dtype=F64)
    for apply in (lambda f: f(p, l), lambda f: vmap(f)(p[None], l[None])):
        found = apply(jacrev(quotient, (0, 1)))
        assert close(found[0].reshape(2, 2), torch.diag(-l / p**2))
        assert close(found[1].reshape(2, 2), torch.diag(1 / p))


def test_the_order_of_dict_keys_does_not_matter():
    solve = custom_root(lambda x, t: {"b": x["b"] - t["b"], "a": x["a"] - 2 * t["a"]})(
        lambda init, t: {"b": t["b"] * 1, "a": 2 * t["a"]}
    )
    for order in (("a", "b"), ("b", "a")):

        def total(a, b):
            tree = {name: {"a": a, "b": b}[name] for name in order}  # noqa: B023
            x = solve({name: torch.zeros((), dtype=F64) for name in order[::-1]}, tree)  # noqa: B023
            return x["a"] + 3 * x["b"]

        assert [g.item() for g in grad(total, (0, 1))(A[0], A[1])] == [2, 3]


def test_integer_and_strided_and_expanded_arguments():
    power = custom_root(lambda x, a, n: x**n - a)(lambda init, a, n: a ** (1 / n.double()))
    n = torch.tensor([2, 3])
    assert close(grad(lambda a: power(ONE, a, n).sum())(A), A ** (1 / n.double() - 1) / n)
    assert close(vmap(grad(power, 1))(ONE, A, n), A ** (1 / n.double() - 1) / n)
    strided = (torch.rand(3, 4, 2, dtype=F64) + 1).transpose(0, 2)[..., 1].requires_grad_()
    found = torch.autograd.grad(make_sqrt()(torch.ones(2, 4, dtype=F64), strided).sum(), strided)[0]
    assert close(found, 0.5 / strided.detach().sqrt())
    scalar = torch.tensor([2.0], dtype=F64)
    for solver in (lambda init, a: a.sqrt(), lambda init, a: a[:1].sqrt().expand(5)):
        found = grad(lambda a: make_sqrt(solver)(ONE[:1].expand(5), a.expand(5)).sum())(scalar)  # noqa: B023
        assert close(found, 2.5 / scalar.sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalars_and_dtypes(dtype):
    a = torch.tensor(4.0, dtype=dtype)
    assert close(grad(make_sqrt(), 1)(torch.ones((), dtype=dtype), a), torch.tensor(0.25, dtype=dtype), 1e-6)
    assert close(hessian(make_sqrt(), 1)(torch.ones((), dtype=dtype), a), torch.tensor(-1 / 32, dtype=dtype), 1e-6)


def test_init_carries_no_gradient_and_may_be_none():
    sqrt = make_sqrt()
    init = ONE.clone().requires_grad_()
    assert not sqrt(init, A).requires_grad
    assert torch.equal(grad(lambda i: sqrt(i, A).sum())(ONE), torch.zeros(2, dtype=F64))
    assert torch.equal(jvp(lambda i: sqrt(i, A), (ONE,), (ONE,))[1], torch.zeros(2, dtype=F64))
    assert close(grad(lambda a: sqrt(None, a).sum())(A), 0.5 / A.sqrt())
    assert close(grad(lambda a: sqrt(a, a).sum())(A), 0.5 / A.sqrt())
    assert close(sqrt(init=ONE, a=A), A.sqrt())


def test_aux_of_any_kind_is_detached():
    solve = make_sqrt(
        lambda init, a: (a.sqrt(), {"s": "x", "n": 3, "t": 2 * a, "b": a > 5, "np": np.ones(2)}), has_aux=True
    )
    x, aux = solve(ONE, A.clone().requires_grad_())
    assert x.requires_grad
    assert not aux["t"].requires_grad
    assert (aux["s"], aux["n"]) == ("x", 3)
    assert torch.equal(aux["b"], torch.tensor([False, True]))
    assert torch.equal(grad(lambda a: solve(ONE, a)[1]["t"].sum())(A), torch.zeros(2, dtype=F64))
    assert torch.equal(jvp(lambda a: solve(ONE, a)[1]["t"], (A,), (ONE,))[1], torch.zeros(2, dtype=F64))
    counted = make_sqrt(lambda init, a: (a.sqrt(), (torch.tensor(7), a)), has_aux=True)
    roots, (steps, same) = vmap(lambda a: counted(torch.ones((), dtype=F64), a))(A)
    assert close(roots, A.sqrt())
    assert torch.equal(steps, torch.tensor([7, 7]))
    assert close(same, A)


def test_static_aux_that_differs_between_lanes_raises():
    solve = make_sqrt(lambda init, a: (a.sqrt(), {"steps": int(a)}), has_aux=True, batching="sequential")
    with pytest.raises(TypeError, match="differ between lanes; return them as tensors"):
        vmap(lambda a: solve(torch.ones((), dtype=F64), a)[0])(A)


# One object used twice, and nested uses.


def test_a_decorated_solver_inside_itself():
    sqrt = make_sqrt()

    def fourth_root(a):
        return sqrt(torch.ones_like(a), sqrt(torch.ones_like(a), a))

    assert close(grad(lambda a: fourth_root(a).sum())(A), 0.25 * A**-0.75)
    assert close(hessian(lambda a: fourth_root(a).sum())(A), torch.diag(-0.1875 * A**-1.75))
    outer = custom_root(lambda x, a: x - sqrt(torch.ones_like(a), a))(lambda init, a: sqrt(init, a))
    assert close(hessian(lambda a: outer(ONE, a).sum())(A), torch.diag(-0.25 * A**-1.5))
    assert close(vmap(grad(lambda a: outer(torch.ones_like(a), a)))(A), 0.5 * A**-0.5)


def test_one_pullback_called_twice():
    _, pull = vjp(lambda a: make_sqrt()(ONE, a), A)
    assert close(pull(ONE)[0], 0.5 / A.sqrt())
    assert close(pull(2 * ONE)[0], 1 / A.sqrt())


def test_captured_at_different_levels_of_nested_transforms():
    """x = 1 / (w u^2) with w and u captured at two levels."""

    def root(w, u):
        return custom_root(lambda x: x * w * u**2 - 1)(lambda init: 1 / (w * u**2))(torch.ones((), dtype=F64))

    w, u, one = (torch.tensor(t, dtype=F64) for t in (3.0, 2.0, 1.0))
    mixed = 2 / (w**2 * u**3)
    assert close(grad(lambda w: grad(lambda u: root(w, u))(u))(w), mixed)
    assert close(jvp(lambda w: jvp(lambda u: root(w, u), (u,), (one,))[1], (w,), (one,))[1], mixed)
    ws = torch.stack([w, 2 * w])
    assert close(vmap(lambda w: grad(lambda u: root(w, u))(u))(ws), -2 / (ws * u**3))
    assert close(vmap(grad(lambda w: jvp(lambda u: root(w, u), (u,), (one,))[1]))(ws), 2 / (ws**2 * u**3))


# Bad inputs.

TRACKED = A.clone().requires_grad_()
F = lambda x, a: x * x - a  # noqa: E731
BAD = {
    "solution shape": (F, lambda i, a: a.sqrt()[None], ValueError, r"the solver's output` must have shape \(2,\)"),
    "solution dtype": (
        F,
        lambda i, a: a.sqrt().float(),
        TypeError,
        "the solver's output` must have dtype torch.float6",
    ),
    "solution tree": (F, lambda i, a: (a.sqrt(), 3), ValueError, "the solver's output` must have the structure of `in"),
    "solution leaf": (F, lambda i, a: 3.0, TypeError, "the solver's output` must be a tensor, got float"),
    "equation sum": (lambda x, a: F(x, a).sum(), lambda i, a: a.sqrt(), ValueError, "one equation for each unknown"),
    "equation row": (lambda x, a: F(x, a)[None], lambda i, a: a.sqrt(), ValueError, r"has; got \(1, 2\)"),
    "equation dtype": (lambda x, a: F(x, a).float(), lambda i, a: a.sqrt(), TypeError, "must have dtype torch.float64"),
    "equation tree": (lambda x, a: [F(x, a)], lambda i, a: a.sqrt(), ValueError, "expected a leaf, got a list of 1"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("transformed", [False, True])
def test_wrong_shapes_raise_before_any_derivative(case, transformed):
    equation, solver, error, message = BAD[case]
    solve = custom_root(equation)(solver)
    with pytest.raises(error, match=message):
        vmap(lambda a: solve(ONE, a))(A[None]) if transformed else solve(ONE, TRACKED)


def test_fixed_point_errors_name_the_fixed_point():
    with pytest.raises(ValueError, match="fixed_point_fun must return a tree shaped like the solution"):
        custom_fixed_point(lambda x, a: x.sum())(lambda i, a: a)(ONE, TRACKED)


def test_mixed_dtypes_and_devices_raise():
    pair = ONE, ONE.float()
    with pytest.raises(TypeError, match="leaves of one dtype"):
        custom_root(lambda x, a: x)(lambda i, a: pair)(pair, TRACKED)
    with pytest.raises(ValueError, match="must have device cpu, as `init` has; got meta"):
        make_sqrt()(ONE, A.to("meta"))
    with pytest.raises(ValueError, match="at least one leaf"):
        custom_root(lambda x, a: x)(lambda i, a: ())((), TRACKED)


def test_other_misuse_raises():
    with pytest.raises(ValueError, match=r"with has_aux=True the solver must return \(solution, aux\); got Tensor"):
        make_sqrt(has_aux=True)(ONE, A)
    with pytest.raises(TypeError, match="the decorator takes a solver function; got int"):
        custom_root(F)(3)
    named = custom_root(F)(lambda i, a, tol=None: a.sqrt())
    with pytest.raises(TypeError, match=r"given tol=, which holds tensors.*add it to optimality_fun"):
        named(ONE, TRACKED, tol=ONE)
    assert named(ONE, TRACKED, tol=1e-3).requires_grad
    with pytest.raises(ValueError, match="CG needs a symmetric positive definite operator"):
        grad(lambda a: custom_root(lambda x, a: x - a, solve=NotSymmetric())(lambda i, a: a)(ONE, a).sum())(A)
    empty = make_sqrt(batching="sequential")
    with pytest.raises(ValueError, match="cannot map over an empty batch"):
        vmap(lambda a: empty(ONE, a))(A[None][:0])


class NotSymmetric:
    """A linear solver that passes its system on to CG without a tag."""

    def solve(self, bound, b, x, tags):
        from diffopt.linalg import linear_solve

        return linear_solve(bound.dense(), b, CG()), torch.tensor(True)

    def transposed(self):
        return self


def test_in_place_changes_between_forward_and_backward_raise():
    a = A.clone().requires_grad_()
    h = a * 1
    y = make_sqrt()(ONE, h).sum()
    h.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
