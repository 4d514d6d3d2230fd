r"""A generated quadratic bilevel problem of two finite sums, with its value function's gradient in closed form.

Of each problem a sample is (a, b, c, p, q), and its loss

.. math:: \frac12 (a^\top z)^2 + \frac12 (b^\top x)^2 + (x^\top U D c)(c^\top V^\top z) + p^\top z + q^\top x

with a and b Gaussian of covariances with log-spaced spectra in [0.1, 1], c standard Gaussian, D log-spaced in
[0.01, 0.1], U and V orthogonal, and p and q standard Gaussian: the spectra of benchmark_bilevel's
simulated quadratic.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import random
from diffopt.multilevel.single_loop import BilevelProblem

F64 = torch.float64
INNER, OUTER, SAMPLES, BATCH = 20, 10, 1024, 64
START = 11.2  # |grad h|^2 at the start


class Benchmark(NamedTuple):
    """The problem, the start, and the means over all samples of both losses' matrices."""

    problem: BilevelProblem
    z: Tensor
    x: Tensor
    inner: dict[str, Tensor]
    outer: dict[str, Tensor]

    def solution(self, x: Tensor) -> Tensor:
        """The inner solution."""
        return -torch.linalg.solve(self.inner["zz"], self.inner["xz"].mT @ x + self.inner["z"])

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of the value function."""
        z = self.solution(x)
        outer_z = self.outer["zz"] @ z + self.outer["xz"].mT @ x + self.outer["z"]
        outer_x = self.outer["xx"] @ x + self.outer["xz"] @ z + self.outer["x"]
        return outer_x - self.inner["xz"] @ torch.linalg.solve(self.inner["zz"], outer_z)

    def error(self, x: Tensor) -> float:
        """The squared norm of the gradient of the value function."""
        return self.gradient(x).square().sum().item()


def loss(z: Tensor, x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss over the samples of a batch: by two products, of `z` with (a, right, p), of `x` with the others."""
    of_z, of_x = (batch["z"] @ z).unbind(-1), (batch["x"] @ x).unbind(-1)
    return (of_z[0] ** 2 / 2 + of_x[0] ** 2 / 2 + of_z[1] * of_x[1] + of_z[2] + of_x[2]).mean()


def samples(key: Tensor, count: int, inner: int, outer: int) -> dict[str, Tensor]:
    """Draw the samples of one problem."""
    keys = list(random.split(key, 8).unbind())
    normal = lambda *shape: random.normal(keys.pop(), shape, dtype=F64)  # noqa: E731
    roots = {}
    for name, size in (("a", inner), ("b", outer)):
        basis = torch.linalg.qr(normal(size, size))[0]
        roots[name] = basis * torch.logspace(-0.5, 0, size, dtype=F64) @ basis.mT
    rank = min(inner, outer)
    left = torch.linalg.qr(normal(outer, outer))[0][:, :rank] * torch.logspace(-2, -1, rank, dtype=F64)
    right = torch.linalg.qr(normal(inner, inner))[0][:, :rank]
    c = normal(count, rank)
    a, b = normal(count, inner + outer).split([inner, outer], dim=1)
    p, q = normal(count, inner + outer).split([inner, outer], dim=1)
    return {
        "z": torch.stack([a @ roots["a"], c @ right.mT, p], dim=1),
        "x": torch.stack([b @ roots["b"], c @ left.mT, q], dim=1),
    }


def means(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices and vectors of the mean loss."""
    (a, right, p), (b, left, q), count = data["z"].unbind(1), data["x"].unbind(1), data["z"].shape[0]
    xz = left.mT @ right / count
    return {"zz": a.mT @ a / count, "xx": b.mT @ b / count, "xz": xz, "z": p.mean(0), "x": q.mean(0)}


def benchmark(count: int = SAMPLES, inner: int = INNER, outer: int = OUTER, seed: int = 0) -> Benchmark:
    """Generate the problem, and a start where |grad h|^2 is 11.2."""
    keys = random.split(random.key(seed), 4)
    inner_data, outer_data = samples(keys[0], count, inner, outer), samples(keys[1], count, inner, outer)
    z = random.normal(keys[2], (inner,), dtype=F64)
    x = random.normal(keys[3], (outer,), dtype=F64)
    made = Benchmark(BilevelProblem(loss, loss, inner_data, outer_data), z, x, means(inner_data), means(outer_data))
    minimum = -torch.linalg.solve(hessian(made), made.gradient(torch.zeros_like(x)))
    direction = x - minimum
    return made._replace(x=minimum + direction * (START / made.error(x)) ** 0.5)


def hessian(made: Benchmark) -> Tensor:
    """The Hessian of the value function."""
    return torch.func.jacrev(made.gradient)(made.x)
