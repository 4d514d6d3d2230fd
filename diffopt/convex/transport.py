r"""Projections onto the transportation polytope and the Birkhoff polytope, by semismooth Newton steps on the dual.

.. math:: \min_P \tfrac12 \|P - X\|_F^2 \quad\text{s.t.}\quad P \ge 0, \quad P 1 = a, \quad P^\top 1 = b
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.convex.arguments import check_matrix, check_vector, report, unless
from diffopt.convex.simplex import project_rows

__all__ = ["check_marginals", "newton", "outer_sum", "projection_birkhoff", "projection_transport"]

# a step of the search line: from 2^-14 to 2^6 times Newton's, which is short where it was regularized
_STEPS = 2.0 ** torch.arange(-14, 7, dtype=torch.float64)


def projection_transport(
    X: Tensor, marginals: tuple[Tensor, Tensor], *, max_steps: int = 50, throw: bool = True
) -> Tensor:
    r"""Project onto the transportation polytope.

    .. math:: \arg\min_{P \ge 0,\ P 1 = a,\ P^\top 1 = b} \tfrac12 \|P - X\|_F^2 = \max(X + \alpha 1^\top + 1
              \beta^\top, 0)

    The support of P is found by Newton steps on the dual in float64; the derivatives are those of the closed form on
    it, which is linear in X and in the marginals. All second derivatives are 0.

    Args:
        X: The matrix, shape (n, m); entries may be -inf, which excludes them.
        marginals: The sums a of the rows, shape (n,), and b of the columns, shape (m,), not negative and of the same
            total. Their derivative is that along changes that keep the totals equal.
        max_steps: The most Newton steps; compiled, all of them are taken, and at most 64 are allowed.
        throw: Whether to raise where the steps did not converge. Compiled calls cannot raise: they return NaN there.

    Returns:
        The plan P, shape (n, m).

    Raises:
        TypeError: If an argument is not floating-point.
        ValueError: If shapes disagree, a marginal is negative, or the totals differ.
        ProjectionError: If the steps did not converge.

    Example:
        >>> X = torch.tensor([[1.0, 0.2], [0.1, 0.4]])
        >>> projection_transport(X, (torch.tensor([0.5, 0.5]), torch.tensor([0.3, 0.7])))
        tensor([[0.3000, 0.2000],
                [0.0000, 0.5000]])

    References:
        Blondel, Seguy and Rolet, "Smooth and sparse optimal transport", AISTATS 2018, eq. 7.
        Li, Sun and Toh, "On the efficient computation of a generalized Jacobian of the projector over the Birkhoff
        polytope", Mathematical Programming 2020, section 3.
    """
    rows, columns = check_marginals(X, marginals)
    fixed = [t.detach().double() for t in (X, rows, columns)]
    Z, converged = _shifted(*fixed, torch.finfo(X.dtype).eps, max_steps)
    support = Z > 0
    pattern = support.double()
    laplacian = torch.linalg.pinv(_hessian(pattern), hermitian=True)
    # X moved by the multipliers: the same projection, from which no digits are lost to large entries
    free = torch.where(support, X, 0.0).double()
    base = torch.where(support, Z, 0.0) + (free - free.detach())
    missing = torch.cat([rows.double() - base.sum(1), columns.double() - base.sum(0)])
    plan = torch.where(support, (base + outer_sum(laplacian @ missing, X.shape)).clamp(min=0), 0.0)
    return report(converged, plan.to(X.dtype), throw, _causes("projection_transport"))


def projection_birkhoff(X: Tensor, *, max_steps: int = 50, throw: bool = True) -> Tensor:
    r"""Project onto the Birkhoff polytope of doubly stochastic matrices.

    .. math:: \arg\min_{P \ge 0,\ P 1 = 1,\ P^\top 1 = 1} \tfrac12 \|P - X\|_F^2

    Args:
        X: The matrix, shape (n, n); entries may be -inf, which excludes them.
        max_steps: As in `projection_transport`.
        throw: As in `projection_transport`.

    Returns:
        The doubly stochastic matrix P, shape (n, n).

    Raises:
        TypeError: If X is not floating-point.
        ValueError: If X is not square.
        ProjectionError: If the steps did not converge.

    Example:
        >>> projection_birkhoff(torch.tensor([[0.7, 0.1], [0.0, 0.2]]))
        tensor([[0.7000, 0.3000],
                [0.3000, 0.7000]])

    References:
        Li, Sun and Toh, "On the efficient computation of a generalized Jacobian of the projector over the Birkhoff
        polytope", Mathematical Programming 2020, eq. 1.
    """
    return projection_transport(X, ones_like_marginals(X), max_steps=max_steps, throw=throw)


def ones_like_marginals(X: Tensor) -> tuple[Tensor, Tensor]:
    """The marginals of a doubly stochastic matrix."""
    check_matrix(X, "X")
    if X.shape[0] != X.shape[1]:
        raise ValueError(f"`X` must be square; got {tuple(X.shape)}. For other shapes, use `projection_transport`.")
    ones = torch.ones(X.shape[0], dtype=X.dtype, device=X.device)
    return ones, ones


def check_marginals(X: Tensor, marginals: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Check the shapes, the signs and the totals of marginals, and give them in the dtype of X."""
    check_matrix(X, "X")
    if not isinstance(marginals, (tuple, list)) or len(marginals) != 2:
        raise TypeError("`marginals` must be a pair: the sums of the rows and the sums of the columns.")
    rows, columns = marginals
    check_vector(rows, "marginals[0]", X.shape[0])
    check_vector(columns, "marginals[1]", X.shape[1])
    rows, columns = rows.to(X.dtype), columns.to(X.dtype)
    a, b = rows.detach(), columns.detach()
    unless((a >= 0).all() & (b >= 0).all(), "`marginals` must not be negative or NaN.")
    slack = torch.finfo(X.dtype).eps ** 0.5 * a.sum()
    unless(
        (a.sum() - b.sum()).abs() <= slack,
        "`marginals` must have the same total, for rows and columns sum over the same entries. Scale one to the other.",
    )
    return rows, columns


def newton(
    Z: Tensor,
    rows: Tensor,
    columns: Tensor,
    plan: Callable[[Tensor], tuple[Tensor, Tensor]],
    tolerance: Tensor,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Shift the rows and columns of a matrix until the plan :math:`p(Z)` has its marginals.

    .. math:: \max_{\alpha, \beta}\ a^\top \alpha + b^\top \beta - \sum_{ij} q(Z_{ij} + \alpha_i + \beta_j), \qquad
              q' = p

    Args:
        Z: The matrix, shape (n, m), in float64.
        rows: The sums of the rows.
        columns: The sums of the columns.
        plan: p and its derivative, entrywise: not negative and not falling.
        tolerance: The largest error of a marginal.
        max_steps: The most steps.

    Returns:
        The shifted matrix, the shifts (rows first), and whether it converged.
    """
    targets = torch.cat([rows, columns])

    def residual(Z):
        P = plan(Z)[0]
        return targets - torch.cat([P.sum(1), P.sum(0)])

    def body(carry):
        Z, shifts = carry
        found = residual(Z)
        H = _hessian(plan(Z)[1])
        ridge = 1e-3 * torch.minimum(found.abs().amax(), H.diagonal().amax()) + 1e-14
        factor = torch.linalg.cholesky_ex(H + ridge * torch.eye(H.shape[0], dtype=H.dtype, device=H.device))[0]
        direction = torch.cholesky_solve(found[:, None], factor)[:, 0]
        lines = _STEPS.to(Z.device)[:, None, None] * outer_sum(direction, Z.shape)
        P = plan(Z + lines)[0]
        n = rows.numel()
        slopes = (targets * direction).sum() - P.sum(2) @ direction[:n] - P.sum(1) @ direction[n:]
        step = _STEPS.to(Z.device).gather(0, slopes.abs().nan_to_num(torch.inf).argmin().reshape(1)).squeeze(0)
        return Z + step * outer_sum(direction, Z.shape), shifts + step * direction

    def live(carry):
        return ~(residual(carry[0]).abs().amax() <= tolerance)

    Z, shifts = while_loop(live, body, (Z, torch.zeros_like(targets)), max_steps=max_steps)
    return Z, shifts, ~live((Z, shifts))


def outer_sum(shifts: Tensor, shape: torch.Size) -> Tensor:
    """The matrix whose entries are the sum of their row's shift and their column's."""
    rows, columns = shifts.split([shape[0], shape[1]])
    return rows[:, None] + columns


def _shifted(X, rows, columns, precision, max_steps):
    """The matrix moved by the multipliers, whose positive part is the projection."""
    # rows first: their thresholds are known, and they take off whatever large numbers the rows share
    P = project_rows(X, rows[:, None])
    top = X.amax(1, keepdim=True)
    best = (X - top) == 0
    height = torch.where(best, P, 0.0).amax(1, keepdim=True)
    tolerance = 4 * precision * torch.maximum(rows.amax(), columns.amax())
    return newton(X - top + height, rows, columns, _positive_part, tolerance, max_steps)[::2]


def _positive_part(Z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(Z), (Z > 0).double()


def _hessian(slopes: Tensor) -> Tensor:
    """Of the dual, up to its sign: the sums of rows and columns, and the matrix between them."""
    top = torch.cat([torch.diag(slopes.sum(1)), slopes], 1)
    return torch.cat([top, torch.cat([slopes.mT, torch.diag(slopes.sum(0))], 1)])


def _causes(name: str) -> str:
    return (
        f"{name} did not reach the marginals. Likely causes: the argument holds NaN or inf; so many entries are -inf "
        "that no plan is left; its entries are of magnitudes too far apart; max_steps is too small."
    )
