import numpy as np
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from diffopt import autodiff, random
from diffopt.zero_order import (
    noise,
    smoothed,
)
from zero_order.smoothings import SIGMA, B, H, X, check_mean, f64, keys, quadratic

KEY = random.key(3)


@pytest.mark.parametrize("batching", ["vmap", "sequential"])
def test_captured_tensors_get_the_mean_of_the_derivatives(batching):
    u = noise(KEY, 3, 2, dtype=torch.float64)
    members = torch.cat([X + SIGMA * u, X - SIGMA * u])

    def outer(w):
        return smoothed(lambda x: (w * x.sin()).sum(), SIGMA, 4, batching=batching)(KEY, X)

    torch.testing.assert_close(grad(outer)(B), members.sin().mean(0))
    w = B.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(outer(w), w)[0], members.sin().mean(0))
    torch.testing.assert_close(jvp(outer, (B,), (X,))[1], X @ members.sin().mean(0))
    # the argument itself, captured: its own derivative, beside the estimate
    both = grad(lambda x: smoothed(lambda y: (x * y).sum(), SIGMA, 4, batching=batching)(KEY, x))(X)
    estimate = grad(smoothed(lambda y: (X * y).sum(), SIGMA, 4), argnums=1)(KEY, X)
    torch.testing.assert_close(both, estimate + members.mean(0))


def test_outputs_may_be_tensors_and_trees():
    def f(x):
        return {"v": torch.outer(x, x.sin()), "n": (x > 0).sum(), "p": 2.0}

    F = smoothed(f, SIGMA, 6)
    out, pull = vjp(lambda x: F(KEY, x), X)
    assert out["v"].shape == (3, 3)
    assert out["n"].dtype == out["p"].dtype == torch.float64
    single = grad(lambda x: smoothed(lambda x: f(x)["v"][1, 2], SIGMA, 6)(KEY, x))(X)
    seed = {"v": torch.zeros(3, 3, dtype=torch.float64), "n": f64(0.0), "p": f64(0.0)}
    seed["v"][1, 2] = 1
    torch.testing.assert_close(pull(seed)[0], single)
    torch.testing.assert_close(jacfwd(lambda x: F(KEY, x))(X)["v"], jacrev(lambda x: F(KEY, x))(X)["v"])


def test_trees_and_argnums():
    def f(scale, x, y):
        return scale * quadratic(torch.cat([x["a"], x["b"], y]))

    F = smoothed(f, SIGMA, 10, argnums=(1, 2))
    x, y = {"a": X[:1], "b": X[1:2]}, X[2:]
    found = grad(lambda x, y: F(KEY, f64(2.0), x, y), argnums=(0, 1))(x, y)
    flat = 2 * grad(smoothed(quadratic, SIGMA, 10), argnums=1)(KEY, X)
    torch.testing.assert_close(torch.cat([found[0]["a"], found[0]["b"], found[1]]), flat)
    check_mean(lambda key: grad(lambda y: smoothed(f, SIGMA, 8, argnums=-1)(key, 1.0, x, y))(y), (H @ X + B)[2:])


def test_numpy_under_transforms():
    def black_box(x):
        return np.abs(x.numpy()).sum().item()

    F = smoothed(black_box, SIGMA, 8, batching="sequential")
    same = smoothed(lambda x: x.abs().sum(), SIGMA, 8)
    for transform in (
        lambda F: F(KEY, X),
        lambda F: grad(F, argnums=1)(KEY, X),
        lambda F: hessian(F, argnums=1)(KEY, X),
        lambda F: jvp(lambda x: F(KEY, x), (X,), (B,))[1],
        lambda F: vmap(grad(F, argnums=1), in_dims=(0, None))(keys(2), X),
        lambda F: vmap(hessian(lambda x: F(KEY, x)))(torch.stack([X, B])),
    ):
        torch.testing.assert_close(transform(F), transform(same))
    x = X.clone().requires_grad_()
    F(KEY, x).backward()
    torch.testing.assert_close(x.grad, grad(same, argnums=1)(KEY, X))


def test_an_argument_that_a_loop_disconnects_is_refused():
    F = smoothed(lambda x, a: float(x.sum()) * a.item(), SIGMA, 4, batching="sequential")
    with pytest.raises(RuntimeError, match="argnums"):
        grad(lambda a: F(KEY, X, a))(f64(1.0))
    with pytest.raises(RuntimeError, match="argnums"):
        jvp(lambda a: F(KEY, X, a), (f64(1.0),), (f64(1.0),))
    torch.testing.assert_close(grad(F, argnums=1)(KEY, X, f64(1.0)).shape, X.shape)


def test_a_loop_may_train_inside():
    def f(x):
        w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        ((w - x) ** 2).sum().backward()
        return -(w.grad * x).sum().item()

    found = grad(smoothed(f, SIGMA, 4, batching="sequential"), argnums=1)(KEY, X)
    torch.testing.assert_close(found, grad(smoothed(lambda x: 2 * x @ x, SIGMA, 4), argnums=1)(KEY, X))


def test_aux_comes_back_from_all_members():
    for options in ({}, {"chunk_size": 2}, {"batching": "sequential"}):
        F = smoothed(lambda x: (x.sum(), {"x": x, "name": "m"}), SIGMA, 6, has_aux=True, **options)
        u = noise(KEY, 3, 3, dtype=torch.float64)
        value, aux = F(KEY, X)
        torch.testing.assert_close(aux["x"], torch.cat([X + SIGMA * u, X - SIGMA * u]))
        torch.testing.assert_close(value, aux["x"].sum(1).mean())
        assert aux["name"] == "m"
        slope, aux = autodiff.grad(F, argnums=1, has_aux=True)(KEY, X)
        assert slope.shape == (3,)
    with pytest.raises(TypeError, match="has_aux"):
        smoothed(torch.sum, SIGMA, 2, has_aux=True)(KEY, X)
