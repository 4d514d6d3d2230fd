"""diffopt.autodiff.gradients: the cheap path and torch.func give the same, in every situation."""

import functools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st

from diffopt.autodiff import grad as grad_of
from diffopt.autodiff import gradients, linearize, value_and_grad
from diffopt.autodiff import jvp as jvp_of
from diffopt.autodiff import vjp as vjp_of

F64 = torch.float64
X = torch.tensor([0.5, -0.3, 0.8], dtype=F64)
Y = torch.tensor([1.5, 0.7, -0.2], dtype=F64)
TOL = 1e-12


def close(a, b):
    return torch.allclose(a, b, rtol=TOL, atol=TOL)


def smooth(x, y):
    return (x.sin() * y).sum() + (x * y**2).prod()


@pytest.mark.parametrize("argnums", [0, 1, -1, -2, (0,), (1, 0), (-1, -2), [0, 1]])
def test_argnums_as_in_torch_func(argnums):
    value, found = value_and_grad(smooth, argnums)(X, Y)
    expected = torch.func.grad(smooth, tuple(argnums) if isinstance(argnums, list) else argnums)(X, Y)
    assert close(value, smooth(X, Y))
    assert isinstance(found, tuple) == isinstance(expected, tuple)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert all(close(f, e) for f, e in pairs)


@pytest.mark.parametrize("argnums", [2, -3, (0, 5)])
def test_argnums_out_of_range_raises(argnums):
    with pytest.raises(ValueError, match=r"argnums names argument -?\d, but 2 positional arguments"):
        value_and_grad(smooth, argnums)(X, Y)


def test_no_argnums_and_no_leaves_give_empty_gradients():
    assert value_and_grad(smooth, ())(X, Y)[1] == ()
    assert value_and_grad(lambda tree, x: x.sum())({}, X)[1] == {}
    assert torch.func.vmap(lambda x: value_and_grad(lambda tree, x: x * 2)({}, x)[0])(X).shape == (3,)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-2, 2), min_size=3, max_size=3), st.floats(-2, 2))
def test_both_paths_agree(values, weight):
    x = torch.tensor(values, dtype=F64)

    def f(x):
        return (x.sin() * weight + x**3).sum()

    assert close(grad_of(f)(x), torch.func.vmap(grad_of(f))(x[None])[0])


def test_trees_with_none_namedtuples_and_unused_leaves():
    tree = {"w": X, "unused": [Y], "none": None, "pair": (X.sum(), ())}
    _, found = value_and_grad(lambda t: (t["w"] ** 2).sum() * t["pair"][0])(tree)
    assert close(found["w"], 2 * X * X.sum())
    assert close(found["unused"][0], torch.zeros_like(Y))
    assert found["none"] is None
    assert close(found["pair"][0], (X**2).sum())
    assert tree["w"] is X
    assert not X.requires_grad


@pytest.mark.parametrize("leaf", [torch.tensor([1, 2]), torch.tensor([True]), 3.0, "x"])
def test_a_leaf_that_cannot_be_differentiated_raises(leaf):
    with pytest.raises(TypeError, match="must be a tree of floating-point tensors; found"):
        value_and_grad(lambda a: torch.zeros(()))(leaf)


@pytest.mark.parametrize("result", [X, 3.0, None, (X.sum(), 3), X.reshape(1, 3)[:, :1]])
def test_a_result_that_is_not_a_scalar_raises(result):
    with pytest.raises(TypeError, match=r"must return a scalar tensor; got .* Reduce it"):
        value_and_grad(lambda x: result)(X)


def test_a_constant_function_has_zero_gradient():
    value, found = value_and_grad(lambda x: torch.ones((), dtype=F64))(X)
    assert value == 1
    assert close(found, torch.zeros_like(X))


def test_aux_is_returned_whole_and_detached():
    def f(x):
        return (x**2).sum(), {"doubled": 2 * x, "steps": 3, "name": "f", "none": None}

    for apply in (lambda g: g(X), lambda g: torch.func.grad(lambda s: g(s * X)[1].sum())(torch.ones((), dtype=F64))):
        apply(value_and_grad(f, has_aux=True))
    (value, aux), found = value_and_grad(f, has_aux=True)(X)
    assert close(value, (X**2).sum())
    assert close(aux["doubled"], 2 * X)
    assert (aux["steps"], aux["name"], aux["none"]) == (3, "f", None)
    assert not aux["doubled"].requires_grad
    slope, same = grad_of(f, has_aux=True)(X)
    assert close(slope, found)
    assert close(same["doubled"], 2 * X)


def test_captured_parameters_keep_their_gradient():
    w = torch.tensor(2.0, dtype=F64, requires_grad=True)
    nonleaf = 3 * w
    for captured, scale in ((w, 1.0), (nonleaf, 3.0)):
        value, found = value_and_grad(lambda x, c=captured: (c * x**2).sum())(X)
        assert close(torch.autograd.grad(found.sum(), w, retain_graph=True)[0], scale * 2 * X.sum())
        assert close(torch.autograd.grad(value, w, retain_graph=True)[0], scale * (X**2).sum())


def test_captured_module_parameters_keep_their_gradient():
    net = torch.nn.Linear(3, 1).double()
    found = grad_of(lambda x: torch.tanh(net(x)).sum())(X)
    by_func = torch.func.grad(lambda x: torch.tanh(net(x)).sum())(X)
    mine = torch.autograd.grad(found.sum(), list(net.parameters()))
    theirs = torch.autograd.grad(by_func.sum(), list(net.parameters()))
    assert all(close(m, t) for m, t in zip(mine, theirs, strict=True))


def test_no_grad_detaches_the_result_and_keeps_the_graphs_outside():
    a = X.clone().requires_grad_()
    outside = a.exp()
    with torch.no_grad():
        value, found = value_and_grad(lambda x: (outside * x**2).sum())(outside)
    assert not value.requires_grad
    assert not found.requires_grad
    assert close(found, 2 * X.exp() ** 2)
    assert close(torch.autograd.grad(outside.sum(), a)[0], X.exp())
    assert a.grad is None


def test_results_without_a_need_for_a_graph_have_none():
    value, found = value_and_grad(lambda x: (x**3).sum())(X)
    assert value.grad_fn is None
    assert found.grad_fn is None


def test_higher_orders_by_plain_autograd():
    x = X.clone().requires_grad_()
    found = grad_of(lambda x: (x**4).sum())(x)
    for order, coefficient in ((2, 12.0), (3, 24.0), (4, 24.0)):
        (found,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        assert close(found, coefficient * X ** (4 - order))
    nested = grad_of(lambda x: grad_of(lambda x: grad_of(lambda x: (x**4).sum())(x).sum())(x).sum())(X)
    assert close(nested, 24 * X)


def test_gradient_of_a_gradient_in_another_argument():
    y = Y.clone().requires_grad_()
    value, (by_x, by_y) = value_and_grad(smooth, (0, 1))(X, y)
    expected = torch.func.jacrev(torch.func.grad(smooth), argnums=1)(X, Y).sum(0)
    assert close(torch.autograd.grad(by_x.sum(), y, retain_graph=True)[0], expected)
    assert value.requires_grad
    assert by_y.requires_grad


def test_the_same_tensor_as_two_arguments_or_captured():
    a = X.clone().requires_grad_()
    by_x, by_y = grad_of(lambda x, y: (x * y**2).sum(), (0, 1))(a, a)
    assert close(by_x, X**2)
    assert close(by_y, 2 * X**2)
    found = grad_of(lambda x: (x * a**2).sum())(a)
    assert close(found, X**2)
    assert close(torch.autograd.grad(found.sum(), a)[0], 2 * X)


def test_under_a_dual_level_and_with_a_captured_tangent():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        for f, at, expected in (
            (lambda x: (x**3).sum(), dual, 6 * X),
            (lambda x: (dual * x**3).sum(), X, 3 * X**2),
        ):
            found = grad_of(f)(at)
            assert close(forward_ad.unpack_dual(found).tangent, expected)


def test_captured_tensors_of_outer_levels():
    def slope(w):
        return grad_of(lambda x: (w * x**3).sum())(X)

    one = torch.ones((), dtype=F64)
    assert close(torch.func.jacrev(slope)(2 * one), 3 * X**2)
    assert close(torch.func.jvp(slope, (2 * one,), (one,))[1], 3 * X**2)
    assert close(torch.func.vmap(slope)(torch.stack([one, 2 * one])), torch.stack([3 * X**2, 6 * X**2]))


def test_arguments_are_not_changed_and_kwargs_pass_through():
    tree = {"a": X, "b": [Y]}

    def f(tree, *, scale):
        popped = tree.pop("a")
        return (popped * tree["b"][0]).sum() * scale

    _, found = value_and_grad(f)(tree, scale=2.0)
    assert close(found["a"], 2 * Y)
    assert set(tree) == {"a", "b"}


def test_wrapping_keeps_the_name_and_takes_partials():
    assert value_and_grad(smooth).__name__ == "smooth"
    assert close(grad_of(functools.partial(smooth, y=Y))(X), grad_of(smooth)(X, Y))


def test_linearize_evaluates_once():
    calls = []

    def f(x):
        calls.append(1)
        return x.sin(), x.prod()[None]

    outputs, pull, push = linearize(f, X)
    J = torch.func.jacrev(lambda x: torch.cat([x.sin(), x.prod()[None]]))(X)
    v, t = torch.linspace(-1, 1, 4, dtype=F64), Y
    for scale in (1.0, 2.0):
        assert close(pull(scale * v[:3], scale * v[3:])[0], scale * v @ J)
        assert close(torch.cat(push(scale * t)), scale * J @ t)
    assert len(calls) == 1
    assert close(outputs[0], X.sin())


def test_linearize_of_constant_and_partly_constant_functions():
    _, pull, push = linearize(lambda x, y: (y * 2, torch.ones(2, dtype=F64)), X, Y)
    assert close(pull(X, torch.ones(2, dtype=F64))[0], torch.zeros_like(X))
    assert close(pull(X, torch.ones(2, dtype=F64))[1], 2 * X)
    moved = push(X, Y)
    assert close(moved[0], 2 * Y)
    assert close(moved[1], torch.zeros(2, dtype=F64))


def test_vjp_and_jvp_of_linear_functions_keep_captured_gradients():
    w = torch.tensor(2.0, dtype=F64, requires_grad=True)
    _, tangent = jvp_of(lambda x: w * x, (X,), (Y,))
    assert close(torch.autograd.grad(tangent.sum(), w)[0], Y.sum())
    _, pull = vjp_of(lambda x: w * x, X)
    assert close(torch.autograd.grad(pull(Y)[0].sum(), w)[0], Y.sum())
    y = Y.clone().requires_grad_()
    _, tangent = jvp_of(lambda x: x**2, (X,), (y,))
    assert close(torch.autograd.grad(tangent.sum(), y)[0], 2 * X)


def test_jvp_in_a_dual_level_is_two_reverse_passes():
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        _, tangent = jvp_of(lambda x: x**3, (dual,), (dual,))
        assert close(tangent, 3 * X**3)
        assert close(forward_ad.unpack_dual(tangent).tangent, 9 * X**2)


@pytest.mark.parametrize("transformed", [False, True])
def test_a_cotangent_of_a_wrong_shape_raises(transformed):
    def pull(x):
        return vjp_of(lambda x: 2 * x, x)[1](torch.ones((), dtype=F64))[0].sum()

    with pytest.raises((ValueError, RuntimeError), match="shape"):
        torch.func.grad(pull)(X) if transformed else pull(X)


# What follows fails when torch changes the engine that gradients.py calls without its checks.


def test_torch_engine_runs_a_backward_pass_as_autograd_grad_does():
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    out = (x.sin() * x).sum()
    found = gradients._engine.run_backward(
        (out,), (torch.ones_like(out),), True, True, (x, y), allow_unreachable=True, accumulate_grad=False
    )
    assert close(found[0], X.sin() + X * X.cos())
    assert found[0].requires_grad
    assert found[1] is None
    assert x.grad is None
    freed = gradients._engine.run_backward(
        (out,), (torch.ones_like(out),), False, False, (x,), allow_unreachable=True, accumulate_grad=False
    )
    assert not freed[0].requires_grad
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, x)


def test_torch_graph_nodes_show_their_leaves():
    w = X.clone().requires_grad_()
    out = (2 * w).sum()
    (accumulate,) = {
        parent for node, _ in out.grad_fn.next_functions for parent, _ in node.next_functions if parent is not None
    }
    assert accumulate.variable is w
    assert accumulate.next_functions == ()


def test_a_gradient_within_a_gradient_leaves_no_graph_behind():
    def inner(x, a):
        return (a * x**3).sum()

    def outer(a):
        return (
            grad_of(inner)(torch.tensor([2.0, 3.0]), a).sum()
            + vjp_of(lambda x: inner(x, a), torch.ones(2))[1](torch.ones(()))[0].sum()
        )

    found = grad_of(outer)(torch.tensor(1.5))
    assert not found.requires_grad
    assert found == 3 * (4 + 9) + 6


def test_a_gradient_within_a_gradient_keeps_that_of_captured_leaves():
    b = torch.tensor(2.0, requires_grad=True)
    found = grad_of(lambda a: grad_of(lambda x: b * a**2 * x**2)(torch.tensor(3.0)))(torch.tensor(1.5))
    assert torch.autograd.grad(found, b)[0] == 2 * 1.5 * 2 * 3
