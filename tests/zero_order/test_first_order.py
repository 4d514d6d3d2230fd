import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from diffopt import random
from diffopt.zero_order import (
    guided,
    noise,
    rademacher,
    smoothed,
    sphere,
)
from zero_order.smoothings import SIGMA, B, X, f64, quadratic

KEY = random.key(3)


def test_clipped_differences_and_signs():
    def f(x):
        return 3 * x.exp().sum()

    u = noise(KEY, 3, 10, dtype=torch.float64)
    difference = vmap(f)(X + SIGMA * u) - vmap(f)(X - SIGMA * u)
    for options, shape in (({"clip": 1.5}, lambda d: d.clamp(-1.5, 1.5)), ({"sign": True}, torch.sign)):
        F = smoothed(f, SIGMA, 20, **options)
        expected = (shape(difference)[:, None] * u).mean(0) / (2 * SIGMA)
        torch.testing.assert_close(grad(F, argnums=1)(KEY, X), expected)
        torch.testing.assert_close(F(KEY, X), smoothed(f, SIGMA, 20)(KEY, X))
        with pytest.raises(RuntimeError, match="no second derivative"):
            hessian(F, argnums=1)(KEY, X)
        with pytest.raises(RuntimeError, match="no derivative in sigma"):
            grad(lambda s, o=options: smoothed(f, s, 4, **o)(KEY, X))(f64(0.3))


@pytest.mark.parametrize("sampler", [rademacher(), sphere(), guided(torch.eye(3, 1, dtype=torch.float64))])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_derivative_that_the_directions_do_not_have_raises(sampler, chunk_size):
    def f(x, a):
        return a * (x * x).sum()

    F = smoothed(f, SIGMA, 8, sampler=sampler, chunk_size=chunk_size)
    a = f64(0.7)
    for second in (hessian, lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f))):
        with pytest.raises(RuntimeError, match="no second derivative in x"):
            second(lambda x: F(KEY, x, a))(X)
        with pytest.raises(RuntimeError, match="no second derivative in x"):
            vmap(second(lambda x: F(KEY, x, a)))(torch.stack([X, B]))
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F(KEY, x, a), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in x"):
        slope.sum().backward()
    slope = grad(lambda x, a: F(KEY, x, a))(X, a)
    for outer in (jacrev, jacfwd):  # in x and then in another argument
        torch.testing.assert_close(outer(grad(lambda x, a: F(KEY, x, a)), 1)(X, a), slope / a)
    with pytest.raises(RuntimeError, match="no derivative in sigma"):
        grad(lambda s: smoothed(f, s, 8, sampler=sampler)(KEY, X, a))(f64(0.3))


def test_a_subspace_has_no_derivative():
    U = torch.eye(3, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="a tensor of its sampler"):
        grad(lambda U: smoothed(quadratic, SIGMA, 4, sampler=guided(U))(KEY, X))(U)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_directions_without_a_second_derivative(backend):
    F = smoothed(quadratic, SIGMA, 8, sampler=rademacher())
    torch._dynamo.reset()
    slope = grad(lambda x: F(KEY, x))
    both = torch.compile(lambda x: (slope(x), grad(lambda x: slope(x) @ B)(x)), backend=backend, fullgraph=True)
    first, second = both(X)
    torch.testing.assert_close(first, slope(X))
    assert second.isnan().all()  # compiled code cannot raise
