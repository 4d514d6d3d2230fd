import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap

from diffopt.zero_order import finite_difference_grad
from zero_order.smoothings import B, X, f64, quadratic


def f(x):
    return x.exp().sum() + (x[0] * x[1]).sin()


@pytest.mark.parametrize(("method", "tol"), [("central", 1e-9), ("forward", 1e-7)])
@pytest.mark.parametrize("x", [X, 1e4 * B.abs() / 1e4 + 2, f64(0.01, -0.02, 3.0)])
def test_it_is_the_gradient(method, tol, x):
    torch.testing.assert_close(finite_difference_grad(f, method=method)(x), grad(f)(x), rtol=tol, atol=tol)


def test_steps_scale_with_large_numbers():
    x = 1e6 * X
    found = finite_difference_grad(lambda x: (x * x).sum())(x)
    torch.testing.assert_close(found, 2 * x, rtol=1e-8, atol=0)


def test_steps_fit_the_dtype():
    x = X.float()
    torch.testing.assert_close(finite_difference_grad(f)(x), grad(f)(x), rtol=1e-3, atol=1e-3)
    given_step = finite_difference_grad(quadratic, step=0.5)(X)
    torch.testing.assert_close(given_step, grad(quadratic)(X))  # a quadratic has no error at any step


@settings(max_examples=10, deadline=None)
@given(chunk=st.integers(1, 5), method=st.sampled_from(["central", "forward"]))
def test_chunks_and_batching_change_nothing(chunk, method):
    def f(x):
        return (x * x.sin()).sum(-1)

    whole = finite_difference_grad(f, method=method)(X)
    for batching in ("vmap", "batched", "sequential"):
        found = finite_difference_grad(f, method=method, chunk_size=chunk, batching=batching)(X)
        torch.testing.assert_close(found, whole)


def test_trees_arguments_numpy_and_vmap():
    found = finite_difference_grad(lambda a, x: a * (x["u"] @ x["v"]), argnums=1)(3.0, {"u": X, "v": B})
    torch.testing.assert_close(found, {"u": 3 * B, "v": 3 * X})
    found = finite_difference_grad(lambda x: np.sum(x.numpy() ** 2).item(), batching="sequential")
    torch.testing.assert_close(found(X), 2 * X)
    points = torch.stack([X, B])
    torch.testing.assert_close(vmap(found)(points), 2 * points)
    torch.testing.assert_close(vmap(finite_difference_grad(f))(points), vmap(grad(f))(points))


def test_a_derivative_of_it_raises_under_transforms():
    g = finite_difference_grad(f)
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        grad(lambda x: g(x).sum())(X)
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        jvp(g, (X,), (B,))
    assert not g(X.clone().requires_grad_()).requires_grad
    twice = finite_difference_grad(lambda x: finite_difference_grad(quadratic, step=0.1)(x)[0], step=0.1)(X)
    torch.testing.assert_close(twice, torch.func.hessian(quadratic)(X)[0])


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (ValueError, "method", lambda: finite_difference_grad(f, method="complex")),
        (ValueError, "step", lambda: finite_difference_grad(f, step=0.0)),
        (ValueError, "chunk_size", lambda: finite_difference_grad(f, chunk_size=0)),
        (ValueError, "batching", lambda: finite_difference_grad(f, batching="loop")),
        (TypeError, "one number; got 3", lambda: finite_difference_grad(torch.sin)(X)),
        (TypeError, "floating-point", lambda: finite_difference_grad(torch.sum)(torch.tensor([1, 2]))),
    ],
)
def test_bad_input_is_refused(error, match, call):
    with pytest.raises(error, match=match):
        call()
