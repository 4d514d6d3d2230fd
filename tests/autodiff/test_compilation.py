"""diffopt.autodiff.compile: the full graph, outermost, or an error."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import grad, vmap

import diffopt.autodiff as autodiff
from diffopt.linalg import GMRES, linear_solve

X = torch.tensor([0.5, -0.3, 0.8])
TOL = 1e-6  # float32


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def test_transforms_inside_are_compiled():
    compiled = autodiff.compile(vmap(grad(lambda x: (x**3).sin())), backend="eager")
    assert torch.allclose(compiled(X), 3 * X**2 * torch.cos(X**3), atol=TOL)


def test_options_reach_torch_compile():
    compiled = autodiff.compile(grad(lambda x: (x**3).sum()), backend="aot_eager")
    assert torch.allclose(compiled(X), 3 * X**2, atol=TOL)


def in_dual_level(fn):
    def call(x):
        with forward_ad.dual_level():
            return fn(x)

    return call


@pytest.mark.parametrize("around", [vmap, grad, in_dual_level], ids=["vmap", "grad", "dual_level"])
def test_a_live_transform_around_it_raises(around):
    transformed = around(autodiff.compile(lambda x: x.sum(), backend="eager"))
    with pytest.raises(RuntimeError, match=r"called under a live transform.*with compile outermost"):
        transformed(X)


def test_plain_autograd_may_go_through_it():
    x = X.clone().requires_grad_()
    y = autodiff.compile(lambda x: (x**2).sum(), backend="aot_eager")(x)
    assert torch.allclose(torch.autograd.grad(y, x)[0], 2 * X, atol=TOL)


def test_one_compiled_function_may_call_another():
    inner = autodiff.compile(lambda x: 2 * x, backend="eager")
    assert torch.equal(autodiff.compile(vmap(lambda x: inner(x) + 1), backend="eager")(X), 2 * X + 1)


def test_fullgraph_is_not_an_option():
    with pytest.raises(TypeError, match="compile always takes the full graph"):
        autodiff.compile(torch.sin, fullgraph=False)


def test_modules_and_names():
    net = torch.nn.Linear(3, 2)
    assert torch.allclose(autodiff.compile(net, backend="eager")(X), net(X))

    def named(x):
        return x

    assert autodiff.compile(named, backend="eager").__name__ == "named"


REFUSED = {
    "any_lane": (lambda x: x * autodiff.any_lane(x > 0), "depends on data and cannot be compiled"),
    "iterative solve": (lambda x: linear_solve(torch.diag(1 + x**2), x, GMRES()), "use its dense or fixed-iteration"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_data_is_refused_with_advice(name):
    fn, advice = REFUSED[name]
    with pytest.raises(torch._dynamo.exc.Unsupported, match=advice):
        autodiff.compile(fn, backend="eager")(X)
