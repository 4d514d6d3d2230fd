import pytest
import torch
from torch.func import grad, hessian, vmap

import diffopt
from diffopt import tree
from diffopt.implicit import Implicit, Unrolled
from diffopt.linalg import CG
from diffopt.meta import bilevel
from diffopt.optimizers import sgd
from diffopt.solvers import GradientDescent
from diffopt.testing import check_hypergradient
from meta.problems import assert_trees_close, f64

TIGHT = {"rtol": 0.0, "atol": 1e-11}
GENERATOR = torch.Generator().manual_seed(5)
X, V = (torch.randn(shape, dtype=torch.float64, generator=GENERATOR) for shape in ((8, 3), (6, 3)))
Y, Z = X @ f64([1.0, -0.5, 0.3]) + 0.3 * X[:, 0].sin(), V @ f64([0.8, -0.6, 0.4])
LOG_RIDGE, ZERO = f64([-0.3, 0.2, 0.5]), torch.zeros(3, dtype=torch.float64)


def ridge(x, theta):
    return 0.5 * ((X @ x - Y) ** 2).sum() + 0.5 * (theta.exp() * x**2).sum()


def valid(x, theta):
    return 0.5 * ((V @ x - Z) ** 2).mean() + 0.01 * theta.square().sum()


def closed_form(theta):
    return valid(torch.linalg.inv(X.mT @ X + torch.diag(theta.exp())) @ X.mT @ Y, theta)


@pytest.mark.parametrize(
    "options",
    [{}, {"adjoint": Implicit(CG(rtol=1e-12))}, {"solver": GradientDescent(0.05), "adjoint": Unrolled()}],
)
def test_ridge_is_its_closed_form(options):
    hyper_loss = bilevel(ridge, valid, **options, **TIGHT)
    for take in (torch.func.grad_and_value, lambda f: lambda *a: diffopt.value_and_grad(f)(*a)[::-1]):
        slope, value = take(hyper_loss)(LOG_RIDGE, ZERO + 0.1)
        torch.testing.assert_close(value, closed_form(LOG_RIDGE))
        torch.testing.assert_close(slope, grad(closed_form)(LOG_RIDGE), rtol=1e-7, atol=1e-9)


def test_higher_orders_and_vmap():
    hyper_loss = lambda theta: bilevel(ridge, valid, **TIGHT)(theta, ZERO)  # noqa: E731
    torch.testing.assert_close(hessian(hyper_loss)(LOG_RIDGE), hessian(closed_form)(LOG_RIDGE))
    lanes = torch.stack([LOG_RIDGE, -LOG_RIDGE])
    torch.testing.assert_close(vmap(grad(hyper_loss))(lanes), torch.stack([grad(closed_form)(t) for t in lanes]))


def test_backward_reaches_captured_tensors():
    scale = f64(1.2).requires_grad_()
    bilevel(lambda x, theta: ridge(x, theta * scale), valid, **TIGHT)(LOG_RIDGE, ZERO).backward()
    direct = lambda s: valid(  # noqa: E731
        torch.linalg.inv(X.mT @ X + torch.diag((LOG_RIDGE * s).exp())) @ X.mT @ Y, LOG_RIDGE
    )
    torch.testing.assert_close(scale.grad, grad(direct)(f64(1.2)))


def test_trees_data_and_the_minimizer_as_aux():
    def inner(x, theta, train, test):
        return 0.5 * ((train @ x["w"] + x["b"] - Y) ** 2).sum() + theta["w"].exp() * (x["w"] ** 2).sum()

    def outer(x, theta, train, test):
        return ((test @ x["w"] + x["b"] - Z) ** 2).mean()

    init, theta = {"w": ZERO, "b": f64(0.1)}, {"w": f64(-0.5)}
    hyper_loss = bilevel(inner, outer, has_aux=True, **TIGHT)
    slope, x = grad(hyper_loss, has_aux=True)(theta, init, X, V)
    torch.testing.assert_close(grad(inner)(x, theta, X, V)["w"], ZERO, rtol=0, atol=1e-9)
    assert_trees_close(grad(hyper_loss, has_aux=True)(theta, x, X, V)[0], slope)
    check_hypergradient(lambda t: bilevel(inner, outer, **TIGHT)(t, init, X, V), (theta,))
    live = tree.map(lambda t: t.clone().requires_grad_(), theta)
    assert not any(leaf.requires_grad for leaf in tree.leaves(hyper_loss(live, init, X, V)[1]))


def test_bounds_are_passed_on():
    value, x = bilevel(ridge, valid, has_aux=True, bounds=(0.0, None), **TIGHT)(LOG_RIDGE, ZERO + 0.1)
    assert (x >= 0).all()
    assert value > closed_form(LOG_RIDGE)


def test_bad_arguments_raise_early():
    with pytest.raises(TypeError, match="`outer` must be a function"):
        bilevel(ridge, 1.0)
    with pytest.raises(TypeError, match="FromOptimizer"):
        bilevel(ridge, valid, solver=sgd(0.1))
    with pytest.raises(TypeError, match=r"`outer` must return a 0-d floating-point tensor; got shape \(3,\)"):
        bilevel(ridge, lambda x, theta: x, **TIGHT)(LOG_RIDGE, ZERO)
    with pytest.raises(TypeError, match=r"got .* of torch.int64"):
        bilevel(ridge, lambda x, theta: (x > 0).sum(), **TIGHT)(LOG_RIDGE, ZERO)
    with pytest.raises(ValueError, match="scalar"):
        bilevel(lambda x, theta: x, valid)(LOG_RIDGE, ZERO)
