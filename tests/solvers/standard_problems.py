"""Test functions with known minimizers, of Moré, Garbow and Hillstrom (1981) and others, and regressions on data."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PROBLEMS", "Problem", "batch_of_starts", "digits", "f64", "finite_difference", "quartic", "rosenbrock"]


class Problem(NamedTuple):
    """A function of a vector, the usual start, the minimizers, and the least value."""

    fn: Callable[[Tensor], Tensor]
    start: Tensor
    minimizers: Tensor
    least: float


def f64(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    """sum 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def beale(x):
    """Residuals c_i - x_1 (1 - x_2^i)."""
    powers = torch.arange(1, 4, dtype=x.dtype)
    return ((f64(1.5, 2.25, 2.625) - x[0] * (1 - x[1] ** powers)) ** 2).sum()


def powell_singular(x):
    """The Hessian is singular at the minimizer."""
    return (x[0] + 10 * x[1]) ** 2 + 5 * (x[2] - x[3]) ** 2 + (x[1] - 2 * x[2]) ** 4 + 10 * (x[0] - x[3]) ** 4


def brown_badly_scaled(x):
    """Unknowns that differ by twelve orders of magnitude."""
    return (x[0] - 1e6) ** 2 + (x[1] - 2e-6) ** 2 + (x[0] * x[1] - 2) ** 2


def brown_dennis(x):
    """Twenty residuals whose least sum of squares is 85822."""
    t = torch.arange(1, 21, dtype=x.dtype) / 5
    return (((x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2) ** 2).sum()


def wood(x):
    """A saddle near the way."""
    first = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2 + 90 * (x[3] - x[2] ** 2) ** 2 + (1 - x[2]) ** 2
    return first + 10 * (x[1] + x[3] - 2) ** 2 + 0.1 * (x[1] - x[3]) ** 2


def himmelblau(x):
    """Four minimizers."""
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def matyas(x):
    """A quadratic."""
    return 0.26 * (x * x).sum() - 0.48 * x[0] * x[1]


def zakharov(x):
    """A quadratic with a quartic valley."""
    slant = (0.5 * torch.arange(1, x.numel() + 1, dtype=x.dtype) * x).sum()
    return (x * x).sum() + slant**2 + slant**4


def _rosenbrock(n: int) -> Problem:
    return Problem(rosenbrock, f64(-1.2, 1.0).repeat(n // 2), torch.ones(1, n, dtype=torch.float64), 0.0)


PROBLEMS = {
    "rosenbrock_2": _rosenbrock(2),
    "rosenbrock_10": _rosenbrock(10)._replace(start=f64(0.8, 1.3).repeat(5)),
    "rosenbrock_100": _rosenbrock(100)._replace(start=f64(0.8, 1.3).repeat(50)),
    "beale": Problem(beale, f64(1.0, 1.0), f64([3.0, 0.5]), 0.0),
    "powell_singular": Problem(powell_singular, f64(3.0, -1.0, 0.5, 1.0), f64([0.0, 0.0, 0.0, 0.0]), 0.0),
    "brown_badly_scaled": Problem(brown_badly_scaled, f64(1.0, 1.0), f64([1e6, 2e-6]), 0.0),
    "brown_dennis": Problem(
        brown_dennis,
        f64(25.0, 5.0, -5.0, -1.0),
        f64([-11.594439904762, 13.203630051207, -0.403439488177, 0.236778774456]),
        85822.2016263563,
    ),
    "wood": Problem(wood, f64(-3.0, -1.0, -3.0, -1.0), f64([1.0, 1.0, 1.0, 1.0]), 0.0),
    "himmelblau": Problem(
        himmelblau,
        f64(0.5, 1.0),
        f64(
            [3.0, 2.0],
            [-2.805118086952745, 3.131312518250573],
            [-3.779310253377747, -3.283185991286170],
            [3.584428340330492, -1.848126526964404],
        ),
        0.0,
    ),
    "matyas": Problem(matyas, f64(3.0, -4.0), f64([0.0, 0.0]), 0.0),
    "zakharov": Problem(zakharov, f64(0.5, -1.0, 0.7, 1.5, -0.3), f64([0.0, 0.0, 0.0, 0.0, 0.0]), 0.0),
}


def batch_of_starts(count: int, n: int) -> Tensor:
    """Starts around the minimizer of Rosenbrock's function, shape `(count, n)`."""
    noise = torch.randn(count, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return 1.0 + 0.5 * noise


def quartic(x: Tensor, theta: Tensor) -> Tensor:
    """A strictly convex function whose minimizer depends smoothly on `theta`, of two numbers."""
    a = theta[0] * torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype)
    coupling = 0.3 * (x[1:] * x[:-1]).sum()
    return ((x - a.sin()) ** 2).sum() + theta[1].exp() * (x**4).sum() + coupling


def finite_difference(fn: Callable[[Tensor], Tensor], theta: Tensor, h: float = 1e-4) -> Tensor:
    """Central differences of a function of a vector, a column for each of its entries; the error is of order h^2."""
    steps = h * torch.eye(theta.numel(), dtype=theta.dtype)
    return torch.stack([(fn(theta + s) - fn(theta - s)) / (2 * h) for s in steps], -1).detach()


def digits(count: int = 500) -> tuple[Tensor, Tensor]:
    """Images of digits, scaled to [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.as_tensor(images[:count] / 16.0, dtype=torch.float64), torch.as_tensor(labels[:count])
