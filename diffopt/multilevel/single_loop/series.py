r"""Neumann series in sampled Hessians, for the linear system of the hypergradient.

.. math:: -\big(\nabla^2_{11} G\big)^{-1} b \approx -\eta \sum_{q=0}^{Q} \prod_{k=1}^{q}
          \big(I - \eta \nabla^2_{11} G_{I_k}\big)\, b
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffopt.multilevel.single_loop.problem import Products
from diffopt.typing import Numeric

__all__ = ["random_term", "recursive_mean", "series_gradient", "summed_series"]


def summed_series(
    products: Products, z: Tensor, x: Tensor, b: Tensor, eta: Numeric, batches: Sequence[Tensor]
) -> Tensor:
    r"""Sum the first terms of the series.

    .. math:: v = -\eta \sum_{q=0}^{Q} r_q, \qquad r_0 = b, \quad r_q = r_{q-1} - \eta \nabla^2_{11} G_{I_q}\, r_{q-1}

    Args:
        products: The vector products of the problem.
        z: The inner variable.
        x: The outer variable.
        b: The right side, shape like `z`.
        eta: The factor :math:`\eta`, below 2 over the largest eigenvalue.
        batches: One batch of indices for each power.

    Returns:
        The vector `v`.

    Example:
        >>> from diffopt.multilevel.single_loop.problem import BilevelProblem, products_of
        >>> loss = lambda z, x, batch: ((z - x - batch) ** 2).mean() / 2
        >>> problem = BilevelProblem(loss, loss, torch.ones(3), torch.ones(2))
        >>> products, z, x = products_of(problem, torch.tensor(1.0), torch.tensor(1.0))
        >>> summed_series(products, z, x, torch.tensor([1.0]), 0.5, [torch.tensor([0, 2])] * 2)
        tensor([-0.8750])

    References:
        Ji, Yang and Liang (2021), Bilevel optimization: convergence analysis and enhanced design, algorithm 3.
    """
    total = r = b
    for batch in batches:
        r = r - eta * products.hessian(z, x, r, batch)
        total = total + r
    return -eta * total


def random_term(
    products: Products, z: Tensor, x: Tensor, b: Tensor, eta: Numeric, batches: Sequence[Tensor], power: Tensor
) -> Tensor:
    r"""Take one term of the series, of a random power, as often as there are terms.

    .. math:: v = -K \eta \prod_{k=1}^{q} \big(I - \eta \nabla^2_{11} G_{I_k}\big)\, b, \qquad q \in \{0, \dots, K - 1\}

    Its mean over :math:`q` is the sum of the K terms.

    Args:
        products: The vector products of the problem.
        z: The inner variable.
        x: The outer variable.
        b: The right side, shape like `z`.
        eta: The factor :math:`\eta`.
        batches: The :math:`K - 1` batches of indices of the highest power; lower ones use the first of them.
        power: The power :math:`q`, an integer 0-d tensor.

    Returns:
        The vector `v`.

    Example:
        >>> from diffopt.multilevel.single_loop.problem import BilevelProblem, products_of
        >>> loss = lambda z, x, batch: ((z - x - batch) ** 2).mean() / 2
        >>> problem = BilevelProblem(loss, loss, torch.ones(3), torch.ones(2))
        >>> products, z, x = products_of(problem, torch.tensor(1.0), torch.tensor(1.0))
        >>> random_term(products, z, x, torch.tensor([1.0]), 0.5, [torch.tensor([0, 2])] * 2, torch.tensor(1))
        tensor([-0.7500])

    References:
        Ghadimi and Wang (2018), Approximation methods for bilevel programming, section 3.
    """
    r = b
    for q, batch in enumerate(batches):
        r = torch.where(power > q, r - eta * products.hessian(z, x, r, batch), r)
    return -(len(batches) + 1) * eta * r


def series_gradient(products: Products, z: Tensor, x: Tensor, v: Tensor, slope: Tensor, batch: Tensor) -> Tensor:
    r"""Give the hypergradient that a solution of the linear system means: :math:`\nabla_2 F + \nabla^2_{21} G\, v`.

    Args:
        products: The vector products of the problem.
        z: The inner variable.
        x: The outer variable.
        v: The solution.
        slope: The slope :math:`\nabla_2 F`.
        batch: The indices of the cross derivative.

    Returns:
        A vector like `x`.

    Example:
        >>> from diffopt.multilevel.single_loop.problem import BilevelProblem, products_of
        >>> loss = lambda z, x, batch: ((z - x - batch) ** 2).mean() / 2
        >>> problem = BilevelProblem(loss, loss, torch.ones(3), torch.ones(2))
        >>> products, z, x = products_of(problem, torch.tensor(1.0), torch.tensor(1.0))
        >>> series_gradient(products, z, x, torch.tensor([-2.0]), torch.tensor([1.0]), torch.tensor([0]))
        tensor([3.])
    """
    return slope + products.cross(z, x, v, batch)


def recursive_mean(now: Tensor, before: Tensor, mean: Tensor, weight: Numeric, count: Tensor) -> Tensor:
    r"""Update a mean of gradients that follows the point: momentum with the change of the gradient on one batch.

    .. math:: u_t = g_t + (1 - \beta_t) \big(u_{t-1} - g_t^{\text{before}}\big), \qquad u_0 = g_0

    Args:
        now: The gradient :math:`g_t` of this batch at this point.
        before: The gradient of the same batch at the point of the step before.
        mean: The mean :math:`u_{t-1}`.
        weight: The weight :math:`\beta_t`.
        count: The steps taken; at 0 the mean is the gradient.

    Returns:
        The mean :math:`u_t`.

    Example:
        >>> recursive_mean(torch.tensor(3.0), torch.tensor(2.0), torch.tensor(4.0), 0.5, torch.tensor(1))
        tensor(4.)

    References:
        Cutkosky and Orabona (2019), Momentum-based variance reduction in non-convex SGD, eq. 2.
    """
    return torch.where(count == 0, now, now + (1 - weight) * (mean - before))
