r"""Projections onto transportation polytopes by Kullback-Leibler divergence: what Sinkhorn's iterations converge to.

.. math:: \min_P \mathrm{KL}(P, e^X) \quad\text{s.t.}\quad P 1 = a, \quad P^\top 1 = b
"""

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.convex.arguments import report, unless
from diffopt.convex.transport import causes, check_marginals, hessian, ones_like_marginals, outer_sum
from diffopt.implicit import custom_root

__all__ = ["kl_projection_birkhoff", "kl_projection_transport"]

_TOLERANCE = 1e-12  # of a marginal, relative to the largest
# along Newton's direction, which is short where it was regularized
_STEPS = torch.cat([torch.zeros(1), 2.0 ** torch.arange(-14, 9)]).double()


def kl_projection_transport(
    X: Tensor, marginals: tuple[Tensor, Tensor], *, max_steps: int = 50, throw: bool = True
) -> Tensor:
    r"""Project onto the transportation polytope by Kullback-Leibler divergence: entropic optimal transport.

    .. math:: \arg\min_{P 1 = a,\ P^\top 1 = b} \mathrm{KL}(P, e^X) = e^{X + \alpha 1^\top + 1 \beta^\top}

    With X = -cost / epsilon this is the limit of Sinkhorn's iterations. It is found by Newton steps on the dual, in
    logarithms and in float64, which converge where the iterations would take thousands of rounds; the derivatives are
    those of the dual's equation.

    Args:
        X: The matrix, shape (n, m); entries may be -inf, which excludes them.
        marginals: The sums a of the rows, shape (n,), and b of the columns, shape (m,), positive and of the same
            total. Their derivative is that along changes that keep the totals equal.
        max_steps: The most Newton steps; compiled, all of them are taken, and at most 64 are allowed.
        throw: Whether to raise where the steps did not converge. Compiled calls cannot raise: they return NaN there.

    Returns:
        The plan P, shape (n, m).

    Raises:
        TypeError: If an argument is not floating-point.
        ValueError: If shapes disagree, a marginal is not positive, or the totals differ.
        ProjectionError: If the steps did not converge.

    Example:
        >>> X = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> kl_projection_transport(X, (torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5])))
        tensor([[0.3655, 0.1345],
                [0.1345, 0.3655]])

    References:
        Cuturi, "Sinkhorn distances", NeurIPS 2013, algorithm 1.
        Cuturi et al., "Supervised quantile normalization for low-rank matrix approximation", ICML 2020, section 3, for
        its implicit derivative.
    """
    rows, columns = check_marginals(X, marginals)
    least = torch.cat([rows, columns]).detach().amin()
    unless(least > 0, "`marginals` must be positive for KL projections; leave out rows and columns whose sum is 0.")
    Z, a, b = X.double(), rows.double(), columns.double()
    b = b * (a.sum() / b.sum()).detach()  # no plan would have both totals
    if X.shape[0] > X.shape[1]:  # the unknowns are the multipliers of the fewer
        Z, a, b = Z.mT, b, a
    alpha, converged = _multipliers(Z.detach(), a.detach(), b.detach(), max_steps)
    alpha = _solution(alpha, Z, a, b)
    plan = _plan(alpha, Z, b)
    missing = (plan.detach().sum(1) - a.detach()).abs().amax()
    converged = converged & (missing <= 1e-6 * a.detach().amax())  # large entries take the digits of the multipliers
    plan = plan.mT if X.shape[0] > X.shape[1] else plan
    return report(converged, plan.to(X.dtype), throw, causes("kl_projection_transport", " (raise the temperature)"))


def kl_projection_birkhoff(X: Tensor, *, max_steps: int = 50, throw: bool = True) -> Tensor:
    r"""Project onto the Birkhoff polytope by Kullback-Leibler divergence: the Sinkhorn operator.

    .. math:: \arg\min_{P 1 = 1,\ P^\top 1 = 1} \mathrm{KL}(P, e^X)

    Args:
        X: The matrix, shape (n, n); entries may be -inf, which excludes them.
        max_steps: As in `kl_projection_transport`.
        throw: As in `kl_projection_transport`.

    Returns:
        The doubly stochastic matrix P, shape (n, n).

    Raises:
        TypeError: If X is not floating-point.
        ValueError: If X is not square.
        ProjectionError: If the steps did not converge.

    Example:
        >>> kl_projection_birkhoff(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])

    References:
        Mena et al., "Learning latent permutations with Gumbel-Sinkhorn networks", ICLR 2018, eq. 2.
    """
    return kl_projection_transport(X, ones_like_marginals(X), max_steps=max_steps, throw=throw)


def _multipliers(X: Tensor, rows: Tensor, columns: Tensor, max_steps: int) -> tuple[Tensor, Tensor]:
    r"""The multipliers of the rows, of mean 0, and whether they were found.

    .. math:: \max_{\alpha, \beta}\ a^\top \alpha + b^\top \beta - \sum_{ij} e^{X_{ij} + \alpha_i + \beta_j}

    Each step is one round of Sinkhorn's, for all columns and then for all rows, and then one along Newton's direction
    for both.
    """
    targets = torch.cat([rows, columns])
    tolerance = _TOLERANCE * targets.amax()
    steps = _STEPS.to(X.device)
    # shifting all rows up and all columns down changes nothing, and must not be part of a direction
    signs = torch.cat([torch.ones_like(rows), -torch.ones_like(columns)])
    free = targets.mean() * torch.outer(signs, signs)

    def residual(Z):
        P = Z.exp()
        return targets - torch.cat([P.sum(1), P.sum(0)])

    def balance(Z):
        by_column = _balance(Z.mT, columns)
        by_row = _balance(Z + by_column, rows)
        return torch.cat([by_row, by_column])

    def direction(Z):
        found, H = residual(Z), hessian(Z.exp()) + free
        ridge = 1e-3 * torch.minimum(found.abs().amax(), H.diagonal().amax()) + 1e-14
        factor = torch.linalg.cholesky_ex(H + ridge * torch.eye(H.shape[0], dtype=H.dtype, device=H.device))[0]
        return torch.cholesky_solve(found[:, None], factor)[:, 0]

    def best_step(Z, d):
        """The step after which the dual is level, by interpolation between the steps where it rises and falls."""
        P = (Z + steps[:, None, None] * outer_sum(d, Z.shape)).exp()
        slopes = (targets - torch.cat([P.sum(2), P.sum(1)], 1)) @ d  # residuals first: they lose fewer digits
        last = (slopes >= 0).sum().clamp(1, steps.numel() - 1)
        (t, u), (f, g) = ([v.gather(0, (last - k).reshape(1)).squeeze(0) for k in (1, 0)] for v in (steps, slopes))
        inside = (f >= 0) & (g < 0) & g.isfinite()
        return torch.where(inside, t + (u - t) * f / torch.where(inside, f - g, 1.0), torch.where(f >= 0, t, 0.0))

    def body(carry):
        Z, shifts = carry
        found = balance(Z)
        Z = Z + outer_sum(found, Z.shape)
        d = direction(Z)
        move = best_step(Z, d) * d
        return Z + outer_sum(move, Z.shape), shifts + found + move

    def live(carry):
        return ~(residual(carry[0]).abs().amax() <= tolerance)

    Z, shifts = while_loop(live, body, (X, torch.zeros_like(targets)), max_steps=max_steps)
    alpha = shifts[: rows.numel()]
    return alpha - alpha.mean(), ~live((Z, shifts))


def _balance(Z: Tensor, sums: Tensor) -> Tensor:
    """The shift of each row after which its exponential has that sum: half a round of Sinkhorn's."""
    return sums.log() - Z.logsumexp(1)


def _plan(alpha: Tensor, X: Tensor, b: Tensor) -> Tensor:
    """The plan of the rows' multipliers, whose columns are scaled to their sums."""
    return b * torch.softmax(X + alpha[:, None], 0)


def _equation(alpha: Tensor, X: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # adding a constant to all multipliers changes no plan: their sum is set to 0
    return _plan(alpha, X, b).sum(1) - a + alpha.sum()


@custom_root(_equation, symmetric=True)
def _solution(alpha: Tensor, X: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return alpha
