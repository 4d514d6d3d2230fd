r"""Newton's method by truncated conjugate gradients, on a line or in a trust region, by Hessian products alone.

.. math:: \nabla^2 f(x_k)\,p_k \approx -\nabla f(x_k), \qquad x_{k+1} = x_k + \alpha_k p_k
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import grad, vjp, while_loop
from diffopt.linalg.stopping import nonzero
from diffopt.solvers.line_search import Backtracking, LineSearch
from diffopt.solvers.objective import Objective

__all__ = ["NewtonCG", "NewtonCGState", "hessian_product", "to_boundary", "truncated_cg"]


class NewtonCGState(NamedTuple):
    """The iterate, its gradient, whether the search failed, and the value."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor


@dataclasses.dataclass(frozen=True)
class NewtonCG:
    r"""Newton's method with conjugate gradients: quadratic convergence in memory of a few vectors.

    .. math:: \|\nabla^2 f(x_k)\,p_k + g_k\| \le \min(\tfrac12, \sqrt{\|g_k\|})\,\|g_k\|

    The inner solve stops at a direction of negative curvature, and the step so far, or the gradient, is taken.

    Args:
        line_search: How far to go.
        max_products: The most products with the Hessian in a step; None is twice the number of unknowns, at least 20.

    Example:
        >>> from diffopt.solvers import minimize
        >>> rosenbrock = lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        >>> minimize(rosenbrock, torch.zeros(2, dtype=torch.float64), solver=NewtonCG()).value
        tensor([1.0000, 1.0000], dtype=torch.float64)

    References:
        Nocedal and Wright (2006), Numerical Optimization, algorithm 7.1.
    """

    line_search: LineSearch = dataclasses.field(default_factory=Backtracking)
    max_products: int | None = None

    truncatable = False  # its inner steps stop early, at a solution at once

    def init(self, fn: Any, x: Tensor) -> NewtonCGState:
        """The state at the start."""
        value, slope = Objective.of(fn).value_and_grad(x)
        return NewtonCGState(x, slope, torch.zeros_like(value, dtype=torch.bool), value)

    def step(self, fn: Any, state: NewtonCGState) -> NewtonCGState:
        """The state after one step."""
        objective, g = Objective.of(fn), state.residual
        p, _ = truncated_cg(hessian_product(objective, state.x), g, None, self.max_products)
        p = torch.where(g @ p < 0, p, -g)
        point = self.line_search.search(objective, state.x, state.value, g, p, torch.ones_like(state.value))
        return NewtonCGState(point.x, point.slope, ~point.accepted, point.value)


def hessian_product(objective: Objective, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with the Hessian at a point, the gradient evaluated once."""
    _, pull = vjp(grad(objective.fn), x)
    return lambda v: pull(v)[0]


class _Inner(NamedTuple):
    z: Tensor
    Hz: Tensor
    r: Tensor
    p: Tensor
    square: Tensor
    done: Tensor


def truncated_cg(
    product: Callable[[Tensor], Tensor], g: Tensor, radius: Tensor | None, max_products: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Minimize :math:`g^\top z + \tfrac12 z^\top H z` roughly, within a radius where there is one.

    It stops at the tolerance of `NewtonCG`, at a direction of negative curvature, and at the radius. With a radius it
    goes along that direction until there; without, it stays where it is, or takes the first direction, :math:`-g`.

    Args:
        product: The product with `H`, symmetric.
        g: A vector.
        radius: A scalar, or None.
        max_products: The most products; None is twice the number of unknowns, at least 20.

    Returns:
        The minimizer `z`, and `H z`.

    Example:
        >>> truncated_cg(lambda v: 2 * v, torch.tensor([4.0, 0.0]), None)[0]
        tensor([-2., 0.])

    References:
        Nocedal and Wright (2006), Numerical Optimization, algorithms 7.1 and 7.2. Steihaug (1983).
    """
    size = torch.linalg.vector_norm(g)
    target = (size * torch.minimum(size.sqrt(), torch.full_like(size, 0.5))) ** 2
    zero = torch.zeros_like(g)
    square = g @ g
    begin = _Inner(zero, zero, g, -g, square, square == 0)

    def body(c: _Inner) -> _Inner:
        Hp = product(c.p)
        curvature = c.p @ Hp
        negative = ~(curvature > torch.finfo(g.dtype).eps * (c.p @ c.p))
        alpha = c.square / torch.where(negative, 1.0, curvature)
        if radius is None:
            first = negative & (c.square == square) & ~c.z.any()
            alpha = torch.where(negative, first.to(g.dtype), alpha)
            outside = torch.zeros_like(negative)
        else:
            outside = negative | (torch.linalg.vector_norm(c.z + alpha * c.p) >= radius)
            alpha = torch.where(outside, to_boundary(c.z, c.p, radius), alpha)
        r = c.r + alpha * Hp
        new = r @ r
        p = new / torch.where(c.square > 0, c.square, 1.0) * c.p - r
        done = negative | outside | (new <= target)
        return _Inner(c.z + alpha * c.p, c.Hz + alpha * Hp, r, p, new, done)

    most = max(20, 2 * g.numel()) if max_products is None else max_products
    end = while_loop(lambda c: ~c.done, body, begin, max_steps=most)
    return end.z, end.Hz


def to_boundary(z: Tensor, p: Tensor, radius: Tensor) -> Tensor:
    r"""The positive :math:`\tau` with :math:`\|z + \tau p\|` the radius, without cancellation."""
    a, b, c = p @ p, z @ p, (radius * radius - z @ z).clamp(min=0)
    root = (b * b + a * c).clamp(min=torch.finfo(p.dtype).tiny).sqrt()
    return torch.where(b > 0, c / nonzero(b + root), (root - b) / nonzero(a))
