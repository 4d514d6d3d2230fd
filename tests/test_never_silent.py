"""What would lose a gradient in silence gives the right one, or raises: ways to hide a tensor, and odd modes."""

import contextvars
import itertools
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, jvp, vmap

import diffopt
from diffopt import autodiff
from diffopt.autodiff import checkpoint, custom_derivative, fused_op, unroll, value_and_grad
from diffopt.implicit import custom_root, root_jvp, root_vjp
from diffopt.linalg import (
    CG,
    GMRES,
    Dense,
    NormalCG,
    function_operator,
    jacobian_operator,
    linear_solve,
    matrix_operator,
)
from diffopt.linalg.solve import LinearSolveError

F64 = torch.float64
ONE = torch.ones(2, dtype=F64)
A = torch.tensor([4.0, 9.0], dtype=F64)
THETA = torch.tensor([2.0, 3.0], dtype=F64)
HIDDEN = "Its gradient would be lost: pass it as an argument"


class Slotted:
    """Holds a tensor where nothing finds it."""

    __slots__ = ("t",)

    def __init__(self, t):
        self.t = t

    def __call__(self, x):
        return self.t * x


def scan(fn, carry, _):
    return fn(carry), None


def second(fn, _, v):
    return fn(v)


def minus(fn, x, a):
    return fn(x) - a


def minus_one(fn, x):
    return fn(x) - 1


OPERATORS = {
    "checkpoint": lambda t: checkpoint(Slotted(t))(ONE),
    "unroll": lambda t: unroll(partial(scan, Slotted(t)), ONE, length=1, checkpoint="sqrt")[0],
    "function_operator": lambda t: linear_solve(function_operator(partial(second, Slotted(t)), (), ONE), ONE),
    "jacobian_operator": lambda t: linear_solve(jacobian_operator(Slotted(t), ONE), ONE),
    "custom_root": lambda t: custom_root(partial(minus_one, Slotted(t)))(lambda init: 1 / t.detach())(ONE),
}


def tangent(f):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(THETA, ONE))


def through_class(t):
    class Scaled:
        w = t

        def __call__(self, x):
            return self.w * x

    return Scaled()


def through_method(t):
    class Net(torch.nn.Module):
        def forward(self, x):
            return t * x

    return Net()


WAYS = {
    "class attribute": through_class,
    "code of a class": through_method,
    "bound builtin": lambda t: partial(lambda get, x: x * get("w"), {"w": t}.get),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("transform", [grad, diffopt.grad])
def test_what_a_class_or_a_builtin_holds_raises(way, transform):
    make = WAYS[way]
    for operator in (
        lambda t: checkpoint(make(t))(ONE),
        lambda t: linear_solve(jacobian_operator(make(t), ONE), ONE),
        lambda t: root_vjp(partial(minus, make(t)), (1 / t).detach(), (ONE,), ONE)[0],
        lambda t: custom_root(partial(minus_one, make(t)))(lambda init: (1 / t).detach())(ONE),
    ):
        with pytest.raises(ValueError, match=HIDDEN):
            transform(lambda t, operator=operator: operator(t).sum() + t.sum())(THETA)


def test_a_tree_of_other_shapes_is_refused():
    operator = matrix_operator(torch.eye(5, dtype=F64), domain={"a": ONE, "b": torch.ones(3, dtype=F64)})
    with pytest.raises(ValueError, match="shape"):
        operator.matvec({"a": torch.ones(3, dtype=F64), "b": ONE})
    with pytest.raises(ValueError, match="shape"):
        linear_solve(matrix_operator(torch.eye(2, dtype=F64)), ONE[None])


def test_convergence_is_judged_by_the_true_residual():
    Q = torch.linalg.qr(torch.linspace(-1, 1, 900, dtype=F64).sin().reshape(30, 30) + torch.eye(30, dtype=F64))[0]
    A = Q @ torch.diag(torch.logspace(0, 10, 30, dtype=F64)) @ Q.mT
    operator = matrix_operator((A + A.mT) / 2, tags=["positive_definite"])
    b = torch.ones(30, dtype=F64)
    for solver in (CG(rtol=1e-13), NormalCG(rtol=1e-10)):
        try:
            x = linear_solve(operator, b, solver)
        except LinearSolveError:
            continue
        assert (operator.matvec(x) - b).norm() <= 11 * solver.rtol * b.norm()


def test_the_transposed_preconditioner_is_used_in_the_adjoint():
    products = []

    def weigh(parameters, v):
        products.append(1)
        return parameters * v

    M = function_operator(weigh, 1 / THETA, ONE)
    solver = GMRES(preconditioner=M)
    rhs = ONE.clone().requires_grad_()
    x = linear_solve(torch.diag(THETA), rhs, solver)
    before = len(products)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), rhs)[0], 1 / THETA)
    assert len(products) > before


MODES = {
    "grad": lambda f: grad(lambda t: f(t).sum())(THETA),
    "jvp": lambda f: jvp(f, (THETA,), (ONE,)),
    "dual_level": tangent,
    "autograd": lambda f: f(THETA.clone().requires_grad_()),
}


@pytest.mark.parametrize(("name", "mode"), list(itertools.product(OPERATORS, MODES)))
def test_a_hidden_tensor_raises(name, mode):
    with pytest.raises(ValueError, match=HIDDEN):
        MODES[mode](OPERATORS[name])


def test_a_tensor_hidden_in_a_context_raises():
    hidden = contextvars.ContextVar("hidden")

    def f(a):
        hidden.set(a)
        return checkpoint(lambda x: x * hidden.get())(a)

    with pytest.raises(ValueError, match=HIDDEN):
        grad(lambda a: f(a).sum())(A)


OPTIMIZERS = {
    "sgd": lambda rate: diffopt.sgd(rate, momentum=rate),
    "adamw": lambda rate: diffopt.adamw(rate, weight_decay=rate),
    "schedule": lambda rate: diffopt.sgd(lambda count: rate / (1 + count)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("strategy", ["sqrt", "log", 1])
def test_a_captured_optimizer_keeps_the_gradient_of_its_hyperparameters(name, strategy):
    def outer(rate, strategy):
        optimizer = OPTIMIZERS[name](rate)

        def step(carry, _):
            w, state = carry
            return diffopt.step(optimizer, 2 * w, state, w), None

        return unroll(step, (ONE, optimizer.init(ONE)), length=3, checkpoint=strategy)[0][0].sum()

    rate = torch.tensor(0.1, dtype=F64)
    expected = grad(outer)(rate, None)
    assert expected.abs() > 0.1
    torch.testing.assert_close(grad(outer)(rate, strategy), expected)
    torch.testing.assert_close(jvp(lambda r: outer(r, strategy), (rate,), (torch.ones_like(rate),))[1], expected)
    torch.testing.assert_close(diffopt.grad(outer)(rate, strategy), expected)
    rates = torch.stack([rate, 2 * rate])
    second = vmap(grad(grad(outer)), in_dims=(0, None))
    torch.testing.assert_close(second(rates, strategy), second(rates, None))


def test_functions_and_modules_as_arguments_are_differentiated():
    solve = custom_root(lambda x, a, g: g(x) - a)(lambda init, a, g: (a / g(torch.ones_like(a))).detach())
    grad(lambda a: solve(ONE, a, lambda x: 3 * x).sum())(ONE)
    torch.testing.assert_close(grad(lambda t: solve(ONE, ONE, lambda x: t * x).sum())(THETA), -1 / THETA**2)
    net = torch.nn.Linear(2, 2, bias=False).double()
    linear = custom_root(lambda x, a, net: net(x) - a)(lambda i, a, net: torch.linalg.solve(net.weight, a).detach())
    x = linear(ONE, A, net)
    (found,) = torch.autograd.grad(x.sum(), net.weight)
    (expected,) = torch.autograd.grad(torch.linalg.solve(net.weight, A).sum(), net.weight)
    torch.testing.assert_close(found, expected)


def test_many_parameters_and_deep_networks_are_found():
    params = [torch.ones(2, dtype=F64, requires_grad=True) for _ in range(300)]
    solve = custom_root(lambda x, a: x - a * sum(params))(lambda init, a: (a * sum(params)).detach())
    torch.testing.assert_close(torch.autograd.grad(solve(ONE, A).sum(), params[7])[0], A)
    net = torch.nn.Sequential(*[torch.nn.Linear(2, 2).double() for _ in range(800)])
    x = custom_root(lambda x, a: x - net(a))(lambda init, a: net(a).detach())(ONE, A)
    assert torch.autograd.grad(x.sum(), net[-1].bias)[0].tolist() == [1.0, 1.0]


def test_captures_of_rules_and_references_raise():
    def op(t):
        rules = {"vjp": lambda i, o, c, w: (t * c[0],), "jvp": lambda i, o, d: (t * d[0],)}
        return custom_derivative(lambda x: (t * x,), **rules)(ONE)[0]

    with pytest.raises(ValueError, match="make it an input"):
        grad(lambda t: op(t).sum())(THETA)
    with pytest.raises(ValueError, match="make it an input"):
        grad(lambda t: fused_op(lambda x: (x * t,), lambda c, s: ([c[0][0] * 2],))([[ONE]])[0][0].sum())(THETA)


def test_inference_mode_gives_the_derivatives():
    with torch.inference_mode():
        torch.testing.assert_close(value_and_grad(lambda x: (x**2).sum())(A)[1], 2 * A)
        torch.testing.assert_close(autodiff.vjp(lambda x: x**2, A)[1](ONE)[0], 2 * A)
        torch.testing.assert_close(autodiff.jvp(lambda x: x**2, (A,), (ONE,))[1], 2 * A)
        torch.testing.assert_close(jacobian_operator(lambda x: x**2, A).matvec(ONE), 2 * A)
        slope = 0.5 / A.sqrt()
        torch.testing.assert_close(root_vjp(lambda x, a: x**2 - a, A.sqrt(), (A,), ONE)[0], slope)
        torch.testing.assert_close(root_jvp(lambda x, a: x**2 - a, A.sqrt(), (A,), (ONE,)), slope)


def test_aux_keeps_the_gradient_of_what_it_captured():
    w = torch.tensor(2.0, dtype=F64, requires_grad=True)
    (_, aux), _ = value_and_grad(lambda x: ((x**2).sum(), (w * x).sum()), has_aux=True)(A)
    torch.testing.assert_close(torch.autograd.grad(aux, w)[0], A.sum())


def test_gradient_arguments_are_checked():
    with pytest.raises(ValueError, match="different arguments"):
        value_and_grad(lambda x: (x**2).sum(), (0, 0))(A)
    with pytest.raises(TypeError, match="must return"):
        value_and_grad(lambda x: 2 * x, has_aux=True)(A)
    with pytest.raises(TypeError, match="real scalar"):
        value_and_grad(lambda x: (x * 1j).sum())(A)


@pytest.mark.parametrize("name", ["root", "linear_solve", "checkpoint", "jvp"])
def test_vmap_and_grad_inside_a_dual_level(name):
    sqrt = custom_root(lambda x, a: x * x - a)(lambda init, a: a.sqrt())
    scalar = {
        "root": lambda a: sqrt(torch.ones_like(a), a),
        "linear_solve": lambda a: linear_solve(a[None, None], torch.ones(1, dtype=F64))[0],
        "checkpoint": checkpoint(torch.sin),
        "jvp": lambda a: autodiff.jvp(lambda a: a**2, (a,), (a,))[1],
    }[name]
    expected = vmap(grad(scalar))(A)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(A, ONE)
        found = forward_ad.unpack_dual(vmap(scalar)(dual)).tangent
        second = forward_ad.unpack_dual(grad(lambda a: scalar(a[0]) + scalar(a[1]))(dual)).tangent
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(second, vmap(grad(grad(scalar)))(A))


@pytest.mark.parametrize("solver", [CG(), NormalCG(), GMRES()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-25, torch.float32), (1e25, torch.float32), (1e-170, F64), (1e200, F64)]
)
def test_right_sides_of_any_magnitude(solver, scale, dtype):
    operator = matrix_operator(torch.diag(THETA).to(dtype), tags=["positive_definite"])
    found = linear_solve(operator, ONE.to(dtype) * scale, solver) / scale
    torch.testing.assert_close(found, (1 / THETA).to(dtype))


@pytest.mark.parametrize("tags", [(), ("diagonal",), ("upper_triangular",), ("positive_definite",)])
def test_nan_in_a_dense_solve_raises(tags):
    with pytest.raises(LinearSolveError, match="NaN"):
        linear_solve(matrix_operator(torch.diag(THETA * torch.nan), tags=tags), ONE, Dense())


def test_one_lane_of_nan_leaves_the_others_alone():
    lanes = torch.stack([torch.diag(THETA), torch.full((2, 2), torch.nan, dtype=F64)])
    found = vmap(lambda A: linear_solve(A, ONE, GMRES(), throw=False))(lanes)
    torch.testing.assert_close(found[0], 1 / THETA)


def test_a_tag_that_lies_raises():
    skewed = torch.tensor([[4.0, 1.0], [2.0, 3.0]], dtype=F64)
    with pytest.raises(LinearSolveError, match="tagged so"):
        linear_solve(matrix_operator(skewed, tags=["positive_definite"]), ONE, Dense())


def test_an_affine_function_is_no_operator():
    with pytest.raises(ValueError, match="must be linear"):
        function_operator(lambda p, v: p * v + 1, THETA, ONE)


def test_complex_is_refused():
    C = torch.ones(2, dtype=torch.complex128)
    with pytest.raises(TypeError, match="real"):
        linear_solve(torch.diag(C), C)
    with pytest.raises(TypeError, match="view_as_real"):
        custom_root(lambda x, a: x * x - a)(lambda init, a: a.sqrt())(C, C)


def test_a_result_shares_no_memory_with_an_argument():
    a, init = A.clone(), ONE.clone()
    same = custom_root(lambda x, a: x - a)(lambda init, a: a)
    same(init, a).mul_(0)
    custom_root(lambda x, a: x - a)(lambda init, a: init)(init, a).mul_(0)
    custom_root(lambda x, a: x - a)(lambda init, a: a.detach())(init, a).mul_(0)
    custom_root(lambda x, a: x - a, batching="sequential")(lambda init, a: torch.from_numpy(a.numpy()))(init, a).mul_(0)
    assert torch.equal(a, A)
    assert torch.equal(init, ONE)


def test_older_batching_is_refused_with_advice():
    sqrt = custom_root(lambda x, a: x * x - a)(lambda init, a: a.sqrt())
    a = A.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"torch\.func\.jacrev"):
        torch.autograd.grad(sqrt(ONE, a), a, torch.eye(2, dtype=F64), is_grads_batched=True)


def test_checkpoints_save_memory_under_our_grad_also_within_vmap():
    """What the backward pass keeps alive at once is bounded by the segments, not by the steps."""
    alive, most = 0, 0

    class Counted(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            nonlocal alive, most
            ctx.token = Token()
            ctx.save_for_backward(*inputs)
            alive += 1
            most = max(most, alive)

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].cos()

    class Token:
        def __del__(self):
            nonlocal alive
            alive -= 1

    def loss(x, strategy):
        return unroll(lambda c, _: (Counted.apply(c), None), x, length=64, checkpoint=strategy)[0].sum()

    peaks = {}
    for strategy in (None, "sqrt"):
        alive = most = 0
        vmap(lambda x, s=strategy: diffopt.grad(loss)(x, s))(torch.stack([A, 2 * A]))
        peaks[strategy] = most
    assert peaks["sqrt"] <= peaks[None] / 3, peaks
