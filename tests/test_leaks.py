"""A thousand calls leave nothing behind: no classes, no tensors."""

import gc
import weakref

import pytest
import torch
from torch.func import grad, jvp, vmap

from diffopt.autodiff import checkpoint, custom_derivative, fused_op, unroll, value_and_grad, while_loop
from diffopt.implicit import custom_fixed_point, custom_root, root_jvp, root_vjp
from diffopt.linalg import CG, GMRES, function_operator, hessian_operator, linear_solve, matrix_operator

F64 = torch.float64
A = torch.tensor([4.0, 9.0], dtype=F64)
ONE = torch.ones(2, dtype=F64)
CALLS = 1000
FEW = 25  # under transforms, where torch itself makes classes that only gc frees

exp_op = custom_derivative(
    lambda x: (x.exp(),),
    vjp=lambda inputs, outputs, c, wanted: (outputs[0] * c[0],),
    jvp=lambda inputs, outputs, t: (outputs[0] * t[0],),
)
fused = fused_op(
    lambda x: (x * x,),
    lambda columns, scalars: ([x.square() for x in columns[0]],),
    lambda columns, scalars, seeds, *wanted: (([2 * x * v for x, v in zip(columns[0], seeds[0], strict=True)],), None),
)
sqrt = custom_root(lambda x, a: x * x - a)(lambda init, a: a.sqrt())
sqrt_gmres = custom_root(lambda x, a: x * x - a, solve=GMRES())(lambda init, a: a.sqrt())
sqrt_aux = custom_root(lambda x, a: x * x - a, has_aux=True)(lambda init, a: (a.sqrt(), {"a": a}))
sqrt_fixed = custom_fixed_point(lambda x, a: (x + a / x) / 2)(lambda init, a: a.sqrt())
sqrt_sequential = custom_root(lambda x, a: x * x - a, batching="sequential")(lambda init, a: a.sqrt())


def captured_root(a):
    return custom_root(lambda x: x * x - a)(lambda init: a.sqrt())(ONE)


def solved_by_cg(a):
    op = function_operator(lambda a, v: a * v, a, a, tags=["positive_definite"])
    return linear_solve(op, ONE, CG())


OPERATORS = {
    "custom_derivative": lambda a: exp_op(a)[0],
    "fused_op": lambda a: fused([[a]])[0][0],
    "checkpoint": checkpoint(lambda a: a.sin()),
    "unroll": lambda a: unroll(lambda c, _: (c.sin(), None), a, length=3, checkpoint="sqrt")[0],
    "while_loop": lambda a: while_loop(lambda c: (c > 3).any(), lambda c: c * 0.5, a, max_steps=5),
    "value_and_grad": lambda a: value_and_grad(lambda a: (a**3).sum())(a)[1],
    "linear_solve": lambda a: linear_solve(matrix_operator(torch.diag(a)), ONE),
    "linear_solve, CG": solved_by_cg,
    "linear_solve, Hessian": lambda a: linear_solve(hessian_operator(lambda x: (x**3).sum(), a), ONE),
    "custom_root": lambda a: sqrt(ONE, a),
    "custom_root, GMRES": lambda a: sqrt_gmres(ONE, a),
    "custom_root, aux": lambda a: sqrt_aux(ONE, a)[0],
    "custom_root, captured": captured_root,
    "custom_root, sequential": lambda a: sqrt_sequential(ONE, a),
    "custom_fixed_point": lambda a: sqrt_fixed(ONE, a),
    "root_vjp": lambda a: root_vjp(lambda x, a: x * x - a, a.sqrt(), (a,), ONE)[0],
    "root_jvp": lambda a: root_jvp(lambda x, a: x * x - a, a.sqrt(), (a,), (ONE,)),
}


def live():
    """How many classes of autograd Functions, and how many tensors, are alive."""
    kinds = len(weakref.WeakSet(_descendants(torch.autograd.Function)))
    return kinds, sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def _descendants(kind):
    found = set(kind.__subclasses__())
    return found.union(*(_descendants(k) for k in found)) if found else found


def autograd(operator):
    a = A.clone().requires_grad_()
    torch.autograd.grad(operator(a).sum(), a)


def transforms(operator):
    grad(lambda a: operator(a).sum())(A)
    jvp(operator, (A,), (ONE,))
    vmap(operator)(A[None])


@pytest.fixture
def _no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    gc.collect()


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("name", OPERATORS)
def test_plain_autograd_leaves_nothing_even_without_collection(name):
    for _ in range(3):
        autograd(OPERATORS[name])  # caches fill
    gc.collect()
    before = live()
    for _ in range(CALLS):
        autograd(OPERATORS[name])
    assert live() == before


@pytest.mark.parametrize("name", OPERATORS)
def test_transforms_leave_nothing_after_a_collection(name):
    for _ in range(3):
        transforms(OPERATORS[name])
    gc.collect()
    before = live()
    for _ in range(FEW):
        transforms(OPERATORS[name])
    gc.collect()
    assert live() == before


def test_the_count_sees_a_leak():
    before = live()
    kept = [torch.ones(1), type("Leaked", (torch.autograd.Function,), {})]
    assert live() == (before[0] + 1, before[1] + 1)
    del kept
