import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from diffopt import random
from diffopt.zero_order import coordinate, forward_gradient, noise, orthogonal, rademacher, sphere
from zero_order.smoothings import B, X, check_mean, keys, trace_of_variance

KEY = random.key(3)


def f(x):
    return x.exp().sum() + (x[0] * x[1]).sin()


SLOPE = grad(f)(X)
SQUARE = SLOPE @ SLOPE


def estimate(num_samples=1, **options):
    g = forward_gradient(f, num_samples, **options)
    return lambda key: g(key, X)[0]


@pytest.mark.parametrize("sampler", [None, rademacher(), sphere(), orthogonal(), coordinate()])
@pytest.mark.parametrize("num_samples", [1, 4])
def test_it_is_unbiased(sampler, num_samples):
    check_mean(estimate(num_samples, sampler=sampler), SLOPE)


def test_it_is_the_directional_derivative_times_the_direction():
    u = noise(KEY, 3, 4, dtype=torch.float64)
    g, info = forward_gradient(f, 4, chunk_size=3)(KEY, X)
    torch.testing.assert_close(g, ((u @ SLOPE)[:, None] * u).mean(0))
    torch.testing.assert_close(info.loss, f(X))


@pytest.mark.parametrize(
    ("sampler", "factor"), [(None, 4.0), (rademacher(), 2.0), (sphere(), 2.0)], ids=["normal", "signs", "sphere"]
)
def test_its_variance(sampler, factor):
    """(n + 1) |g|^2 with normal directions, (n - 1) |g|^2 with signs."""
    one = estimate(sampler=sampler)
    torch.testing.assert_close(trace_of_variance(one), factor * SQUARE, rtol=0.05, atol=0)
    g = forward_gradient(f, 10, sampler=sampler)
    told = vmap(lambda key: g(key, X)[1].variance)(keys(2000)).mean()
    torch.testing.assert_close(told, factor * SQUARE / 10, rtol=0.05, atol=0)


def test_all_coordinates_give_the_gradient():
    torch.testing.assert_close(estimate(3, sampler=coordinate())(KEY), SLOPE)
    assert forward_gradient(f, 3, sampler=orthogonal())(KEY, X)[1].signal_to_noise > 0


def test_it_is_differentiable():
    g = forward_gradient(lambda x, a: (a * x.sin()).sum() + x @ x, 3, sampler=coordinate())
    exact = grad(lambda x, a: (a * x.sin()).sum() + x @ x)
    for outer in (jacrev, jacfwd):
        for n in (0, 1):
            found = outer(lambda x, a: g(KEY, x, a)[0], n)(X, B)
            torch.testing.assert_close(found, outer(exact, n)(X, B))
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(g(KEY, x, B)[0].sum(), x)
    torch.testing.assert_close(slope, hessian(lambda x: (B * x.sin()).sum() + x @ x)(X).sum(0))


def test_trees_and_arguments():
    g = forward_gradient(lambda a, x: a * (x["u"] @ x["v"]), 6, sampler=coordinate(), argnums=1)
    torch.testing.assert_close(g(KEY, 3.0, {"u": X, "v": B})[0], {"u": 3 * B, "v": 3 * X})


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="one number; got 3"):
        forward_gradient(torch.sin)(KEY, X)
    with pytest.raises(ValueError, match="at least 1"):
        forward_gradient(f, 0)
    with pytest.raises(TypeError, match="floating-point"):
        forward_gradient(torch.sum)(KEY, torch.tensor([1, 2]))
