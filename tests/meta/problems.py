"""Quadratic tasks, on which adaptation has a closed form, and a small network, in float64."""

import torch

from diffopt import tree

A = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.5, -0.3], [0.1, -0.3, 1.0]], dtype=torch.float64)
START = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def quadratic(w, centre):
    """(w - c)' A (w - c) / 2."""
    return 0.5 * (w - centre) @ A @ (w - centre)


def quadratic_tasks(count=4):
    """Centres of the support and query losses, each `(count, 3)`."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn((count, 3), dtype=torch.float64, generator=generator) for _ in range(2))


def end_of_descent(w, centre, rate, steps):
    """Where gradient descent on `quadratic` ends: c + (I - rate A)^steps (w - c)."""
    shrink = torch.linalg.matrix_power(torch.eye(3, dtype=w.dtype) - rate * A, steps)
    return centre + shrink @ (w - centre)


def network_params():
    """A network 2 - 4 - 1."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"body": {"w": (2, 4), "b": (4,)}, "head": {"w": (4, 1), "b": (1,)}}
    draw = lambda shape: 0.5 * torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    return {name: {k: draw(s) for k, s in layer.items()} for name, layer in shapes.items()}


def network(params, x):
    body, head = params["body"], params["head"]
    return torch.tanh(x @ body["w"] + body["b"]) @ head["w"] + head["b"]


def regression(params, data):
    """The squared error of the network."""
    return ((network(params, data["x"]) - data["y"]) ** 2).mean()


def regression_tasks(count=5, shots=4):
    """`(support, query)`, each `{"x": (count, shots, 2), "y": (count, shots, 1)}`."""
    generator = torch.Generator().manual_seed(3)

    def half():
        x = torch.randn((count, shots, 2), dtype=torch.float64, generator=generator)
        return {"x": x, "y": (x[..., :1] * torch.arange(1, count + 1)[:, None, None]).sin()}

    return half(), half()


def task(tasks, i):
    return tree.map(lambda leaf: leaf[i], tasks)


def assert_trees_close(got, want, **tolerances):
    tree.check_same_structure(got, want)
    for a, b in zip(tree.leaves(got), tree.leaves(want), strict=True):
        torch.testing.assert_close(a, b, **tolerances)


def slope_along(fn, at, direction, h=1e-5):
    """The derivative of a function of a tree along a direction, by central differences."""
    return (fn(tree.axpy(h, direction, at)) - fn(tree.axpy(-h, direction, at))) / (2 * h)


def check_slope(fn, at, rtol=1e-6, atol=1e-9):
    """Hold the gradient of a function of a tree against central differences, along one direction.

    With a width of 1e-5 these err by about 1e-10, in their own derivatives of third order and in what is rounded off.
    """
    direction = tree.map(lambda x: torch.cos(3 * x + torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape)), at)
    want = slope_along(fn, at, direction)
    assert want.abs() > 1e-8
    torch.testing.assert_close(tree.vdot(torch.func.grad(fn)(at), direction), want, rtol=rtol, atol=atol)
