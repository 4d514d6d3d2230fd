r"""Projections onto the transportation polytope and the Birkhoff polytope, by an interior-point method.

.. math:: \min_P \tfrac12 \|P - X\|_F^2 \quad\text{s.t.}\quad P \ge 0, \quad P 1 = a, \quad P^\top 1 = b
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.convex.arguments import check_matrix, check_vector, report, unless

__all__ = [
    "causes",
    "check_marginals",
    "hessian",
    "ones_like_marginals",
    "outer_sum",
    "projection_birkhoff",
    "projection_transport",
]

_TOLERANCE = 1e-11  # of a marginal and of complementarity, relative to the largest marginal


class _State(NamedTuple):
    """The plan and its reduced costs, whose difference is always X plus the multipliers."""

    plan: Tensor
    cost: Tensor


def projection_transport(
    X: Tensor, marginals: tuple[Tensor, Tensor], *, max_steps: int = 50, throw: bool = True
) -> Tensor:
    r"""Project onto the transportation polytope.

    .. math:: \arg\min_{P \ge 0,\ P 1 = a,\ P^\top 1 = b} \tfrac12 \|P - X\|_F^2 = \max(X + \alpha 1^\top + 1
              \beta^\top, 0)

    The support of P is found by an interior-point method in float64; the derivatives are those of the closed form on
    it, which is linear in X and in the marginals. All second derivatives are 0.

    Args:
        X: The matrix, shape (n, m); entries may be -inf, which excludes them.
        marginals: The sums a of the rows, shape (n,), and b of the columns, shape (m,), not negative and of the same
            total. Their derivative is that along changes that keep the totals equal.
        max_steps: The most steps of the method; compiled, all of them are taken, and at most 64 are allowed.
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
        Mehrotra, "On the implementation of a primal-dual interior point method", SIAM J. Optim. 1992, section 2.
    """
    rows, columns = check_marginals(X, marginals)
    rows, columns = rows.double(), columns.double()
    columns = columns * (rows.sum() / columns.sum()).detach()  # no plan would have both totals
    found, converged = _interior_point(X.detach().double(), rows.detach(), columns.detach(), max_steps)
    support = found > 0
    pattern = support.double()
    laplacian = torch.linalg.pinv(hessian(pattern), hermitian=True)
    # in place of X, what it became by the multipliers: no digits are lost to large entries
    free = torch.where(support, X, 0.0).double()
    base = found + (free - free.detach())
    missing = torch.cat([rows - base.sum(1), columns - base.sum(0)])
    plan = torch.where(support, (base + outer_sum(laplacian @ missing, X.shape)).clamp(min=0), 0.0)
    return report(converged, plan.to(X.dtype), throw, causes("projection_transport"))


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
    if not X.numel():
        raise ValueError(f"`X` must have at least one entry; got shape {tuple(X.shape)}.")
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


def outer_sum(shifts: Tensor, shape: torch.Size) -> Tensor:
    """The matrix whose entries are the sum of their row's shift and their column's."""
    rows, columns = shifts.split([shape[0], shape[1]])
    return rows[:, None] + columns


def _interior_point(X: Tensor, rows: Tensor, columns: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
    """Where the projection is positive, as a matrix that is X plus multipliers there and 0 elsewhere; and success."""
    allowed = X.isfinite() & (rows > 0)[:, None] & (columns > 0)
    targets, largest = torch.cat([rows, columns]), torch.maximum(rows.amax(), columns.amax())
    below = torch.where(allowed, X - torch.where(allowed, X, -torch.inf).amax(1, keepdim=True), 0.0)
    plan = torch.where(allowed, rows[:, None] * columns / torch.where(rows.sum() > 0, rows.sum(), 1.0), 0.0)
    start = _State(plan, torch.where(allowed, plan - below + torch.maximum(largest, below.abs().amax()), 1.0))
    tolerance = _TOLERANCE * largest

    def missing(plan):
        return targets - torch.cat([plan.sum(1), plan.sum(0)])

    def live(state):
        overlap = torch.minimum(state.plan, state.cost).amax()
        return ~((missing(state.plan).abs().amax() <= tolerance) & (overlap <= tolerance))

    def body(state):
        P, S = state
        total, need = P + S, missing(P)
        slope = torch.where(allowed, P / total, 0.0)
        H = hessian(slope)
        ridge = 1e-14 * H.diagonal().amax() + 1e-300
        factor = torch.linalg.cholesky_ex(H + ridge * torch.eye(H.shape[0], dtype=H.dtype, device=H.device))[0]

        def direction(gap):
            """Newton's, for a given change of the products of plan and cost."""
            part = torch.where(allowed, gap / total, 0.0)
            side = need - torch.cat([part.sum(1), part.sum(0)])
            shift = outer_sum(torch.cholesky_solve(side[:, None], factor)[:, 0], P.shape)
            dP = part + slope * shift
            return dP, torch.where(allowed, dP - shift, 0.0)

        dP, dS = direction(-P * S)
        t = _longest(P, dP, S, dS).clamp(max=1.0)
        before, after = (P * S).sum(), ((P + t * dP) * (S + t * dS)).sum()
        center = before / allowed.sum() * (after / before).clamp(0, 1) ** 3
        dP, dS = direction(center - P * S - dP * dS)
        t = (0.995 * _longest(P, dP, S, dS)).clamp(max=1.0)
        return _State(P + t * dP, S + t * dS)

    state = while_loop(live, body, start, max_steps=max_steps)
    support = allowed & (state.plan > state.cost)
    return torch.where(support, state.plan, 0.0), ~live(state) & (torch.inf > X).all()  # of NaN, no


def _longest(P: Tensor, dP: Tensor, S: Tensor, dS: Tensor) -> Tensor:
    """The step at which the first entry becomes 0."""
    value, change = torch.stack([P, S]), torch.stack([dP, dS])
    falling = change < 0
    return torch.where(falling, value / torch.where(falling, -change, 1.0), torch.inf).amin()


def hessian(slopes: Tensor) -> Tensor:
    """Of the dual, up to its sign: the sums of rows and columns, and the matrix between them."""
    top = torch.cat([torch.diag(slopes.sum(1)), slopes], 1)
    return torch.cat([top, torch.cat([slopes.mT, torch.diag(slopes.sum(0))], 1)])


def causes(name: str, advice: str = "") -> str:
    """What to say where the marginals were not reached, with what to do about magnitudes."""
    return (
        f"{name} did not reach the marginals. Likely causes: the argument holds NaN or inf; so many entries are -inf "
        f"that no plan is left; its entries are of magnitudes too far apart{advice}; max_steps is too small."
    )
