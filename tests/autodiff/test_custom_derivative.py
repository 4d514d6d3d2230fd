"""diffopt.autodiff.custom_derivative: derivatives by rule, and what its rules must not do."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, jacrev, jvp, vmap

from diffopt.autodiff import choose, custom_derivative, rules_of

F64 = torch.float64
X = torch.tensor([0.5, -0.3, 0.8], dtype=F64)
TOL = 1e-12


def exp_vjp(inputs, outputs, cotangents, wanted):
    return (outputs[0] * cotangents[0],)


def exp_jvp(inputs, outputs, tangents):
    return (outputs[0] * tangents[0],)


def make_exp(primal=lambda x: (x.exp(),), **options):
    return custom_derivative(primal, vjp=exp_vjp, jvp=exp_jvp, **options)


def close(a, b):
    return torch.allclose(a, b, rtol=TOL, atol=TOL)


def test_forward_over_forward_is_right_where_torch_is_not():
    f = make_exp()

    def order(n):
        if n == 0:
            return lambda x: f(x)[0]
        return lambda x: jvp(order(n - 1), (x,), (torch.ones_like(x),))[1]

    for n in range(5):
        assert close(order(n)(X), X.exp())


@pytest.mark.parametrize("batching", ["vmap", "sequential", "folded"])
def test_batching_keeps_values_and_derivatives(batching):
    def fold(primal, dims, size):
        return lambda x: tuple(o.movedim(dims[0], 0) for o in primal(x))

    f = make_exp(batching=fold if batching == "folded" else batching)
    Z = torch.stack([X, 2 * X])
    assert close(vmap(lambda x: f(x)[0])(Z), Z.exp())
    assert close(vmap(grad(lambda x: f(x)[0].sum()))(Z), Z.exp())
    assert close(vmap(vmap(lambda x: f(x)[0]))(Z), Z.exp())
    assert close(vmap(lambda x: f(x)[0], in_dims=-1, out_dims=-1)(Z), Z.exp())
    assert close(vmap(lambda x: f(x)[0], chunk_size=1)(Z), Z.exp())


def test_sequential_calls_once_a_lane_and_refuses_an_empty_batch():
    calls = []
    f = make_exp(lambda x: (calls.append(x.item()), (x.exp(),))[1], batching="sequential")
    vmap(lambda x: f(x)[0])(X)
    assert calls == X.tolist()
    with pytest.raises(ValueError, match=r"sequential.*cannot map over an empty batch"):
        vmap(lambda x: f(x)[0])(X[:0])


def test_unbatched_inputs_get_the_sum_of_the_lanes():
    product = custom_derivative(
        lambda x, y: (x * y,),
        vjp=lambda inputs, outputs, c, wanted: (inputs[1] * c[0], inputs[0] * c[0]),
        jvp=lambda inputs, outputs, t: (inputs[0] * t[1] + inputs[1] * t[0],),
    )
    Z, y = torch.stack([X, 2 * X]), X.cos()
    found = grad(lambda y: vmap(lambda x: product(x, y)[0].sum())(Z).sum())(y)
    assert close(found, Z.sum(0))


def test_integer_inputs_and_outputs_carry_nothing():
    def vjp(inputs, outputs, cotangents, wanted):
        assert cotangents[1] is None
        assert wanted == (True, False)
        return inputs[1] * cotangents[0], None

    def rule_jvp(inputs, outputs, tangents):
        assert tangents[1] is None
        return inputs[1] * tangents[0], None

    f = custom_derivative(lambda x, n: (n * x, n + 1), vjp=vjp, jvp=rule_jvp)
    n = torch.tensor([2, 3, 4])
    assert close(grad(lambda x: f(x, n)[0].sum())(X), n.to(F64))
    values, tangents = jvp(lambda x: f(x, n), (X,), (torch.ones_like(X),))
    assert close(tangents[0], n.to(F64))
    assert torch.equal(values[1], n + 1)
    assert close(vmap(grad(lambda x, n: f(x, n)[0]))(X, n), n.to(F64))
    assert close(jvp(lambda x: vmap(f)(x, n)[0], (X,), (torch.ones_like(X),))[1], n.to(F64))


def test_outputs_that_alias_inputs_or_each_other_are_separate():
    def twice(x):
        y = 2 * x
        return y, y, x

    vjp, rule_jvp = rules_of(twice)
    f = custom_derivative(twice, vjp=vjp, jvp=rule_jvp)
    x = X.clone().requires_grad_()
    a, b, c = f(x)
    assert c is not x
    (found,) = torch.autograd.grad((a + 3 * b + 5 * c).sum(), x)
    assert close(found, torch.full_like(X, 13.0))


def test_a_graph_of_rules_is_freed_and_guarded_like_any_other():
    x = X.clone().requires_grad_()
    y = make_exp()(x)[0]
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    z = make_exp()(x)[0]
    z.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("returned", [lambda x: x.exp(), lambda x: [x.exp()], lambda x: (x.exp(), 3)])
def test_primal_must_return_a_tuple_of_tensors(returned):
    with pytest.raises(TypeError, match="primal must return a tuple of tensors"):
        make_exp(returned)(X)


@pytest.mark.parametrize("batching", ["loop", None, 3])
def test_batching_is_checked_when_made(batching):
    with pytest.raises(ValueError, match=r'batching must be "vmap", "sequential" or a callable'):
        make_exp(batching=batching)


def test_a_primal_that_captures_a_tracked_tensor_raises():
    w = torch.tensor(2.0, dtype=F64, requires_grad=True)

    def primal(x):
        with torch.enable_grad():
            return (x * w,)

    with pytest.raises(ValueError, match=r"captured a tensor.*make it an input"):
        make_exp(primal)(X.clone().requires_grad_())


def test_a_cotangent_or_tangent_of_a_wrong_shape_raises():
    f = custom_derivative(lambda x: (x * 2,), vjp=lambda i, o, c, w: (c[0].sum(),), jvp=lambda i, o, t: (t[0].sum(),))
    with pytest.raises(TypeError, match=r"entry 0 of the vjp rule's result must have shape"):
        grad(lambda x: f(x)[0].sum())(X)
    with pytest.raises(TypeError, match=r"entry 0 of the jvp rule's result must have shape"):
        jvp(lambda x: f(x)[0], (X,), (X,))


def test_compiling_without_a_traceable_form_says_what_to_do():
    f = make_exp()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="give custom_derivative a `traceable` one"):
        torch.compile(lambda x: f(x)[0], fullgraph=True, backend="eager")(X)


def test_choose_holds_the_others_fixed():
    part, primals = choose(lambda x, y, z: x - y * z, [X, 2 * X, 3 * X], [True, False, True])
    assert primals[0] is X
    assert close(part(X, X), X - 2 * X * X)


# What follows fails when torch changes what custom_derivative.py relies on.


def test_torch_apply_of_the_base_is_the_raw_function_apply():
    """The class method below `torch.autograd.Function` runs forward, setup_context and backward on its own."""
    calls = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return 2 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            calls.append("setup")

        @staticmethod
        def backward(ctx, cotangent):
            return 2 * cotangent

    x = X.clone().requires_grad_()
    base = super(torch.autograd.Function, Double)
    y = base.apply(x)
    assert calls == ["setup"]
    assert close(torch.autograd.grad(y.sum(), x)[0], torch.full_like(X, 2.0))


def test_torch_needs_input_grad_tells_what_is_wanted():
    seen = []

    def vjp(inputs, outputs, cotangents, wanted):
        seen.append(wanted)
        return inputs[1] * cotangents[0], inputs[0] * cotangents[0]

    f = custom_derivative(lambda x, y: (x * y,), vjp=vjp, jvp=lambda i, o, t: (i[0] * t[1] + i[1] * t[0],))
    f(X.clone().requires_grad_(), X)[0].sum().backward()
    f(X, X.clone().requires_grad_())[0].sum().backward()
    assert seen == [(True, False), (False, True)]


def test_dual_level_and_gradients_of_gradients_share_one_function():
    f = make_exp()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        slope = grad(lambda x: f(x)[0].sum())(dual)
        assert close(forward_ad.unpack_dual(slope).tangent, X.exp())
    assert close(jacrev(jacrev(lambda x: f(x)[0].sum()))(X), torch.diag(X.exp()))
