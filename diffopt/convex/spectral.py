r"""The positive part of a symmetric matrix, with derivatives that are right where eigenvalues repeat.

.. math:: P = \tfrac12 (X + |X|), \qquad |X|\, \dot Y + \dot Y\, |X| = X \dot X + \dot X X \quad\text{for } Y = |X|

torch differentiates eigenvectors, which divides by the differences of eigenvalues. The equation above divides by the
sums of their moduli, and its solution is differentiated by an equation of the same kind, to any order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffopt.autodiff.custom_derivative import Rules, by_rule

__all__ = ["positive_part"]


def positive_part(X: Tensor) -> Tensor:
    r"""The symmetric part of a matrix with its negative eigenvalues set to 0: :math:`V \max(\Lambda, 0) V^\top`.

    Args:
        X: A matrix, shape (n, n).

    Returns:
        The positive semidefinite matrix. Between eigenvectors whose eigenvalues are both 0 (relative to the largest,
        at the precision of the dtype), where it is not differentiable, its derivative is half the identity.

    Example:
        >>> positive_part(torch.diag(torch.tensor([2.0, -1.0])))
        tensor([[2., 0.],
                [0., 0.]])
    """
    return _positive_part((X + X.mT) / 2)[0]


def _positive_part_of(X):
    values, vectors = _eigh(X)
    return (_assemble(vectors, torch.relu(values)),)


def _positive_part_vjp(inputs, outputs, cotangents, wanted):
    (X,), (P,), (W,) = inputs, outputs, cotangents
    half = _lyapunov(2 * P - X, W)[0]
    return ((W + X @ half + half @ X) / 2,)


def _positive_part_jvp(inputs, outputs, tangents):
    (X,), (P,), (H,) = inputs, outputs, tangents
    return ((H + _lyapunov(2 * P - X, X @ H + H @ X)[0]) / 2,)


def _eigh(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; NaN for a matrix that is not finite, which must not stop other lanes."""
    sound = X.isfinite().all()
    values, vectors = torch.linalg.eigh(torch.where(sound, X, 0.0))
    return torch.where(sound, values, torch.nan), vectors


def _assemble(vectors: Tensor, values: Tensor) -> Tensor:
    Y = (vectors * values) @ vectors.mT
    return (Y + Y.mT) / 2


def _lyapunov_of(Y, C):
    return (_lyapunov_solver(Y)(C),)


def _lyapunov_vjp(inputs, outputs, cotangents, wanted):
    (Y, _), (Z,) = inputs, outputs
    W = _lyapunov(Y, cotangents[0])[0]
    return -(W @ Z.mT + Z.mT @ W), W


def _lyapunov_jvp(inputs, outputs, tangents):
    (Y, _), (Z,), (dY, dC) = inputs, outputs, tangents
    return (_lyapunov(Y, dC - dY @ Z - Z @ dY)[0],)


def _lyapunov_solver(Y: Tensor) -> Callable[[Tensor], Tensor]:
    """The solution Z of Y Z + Z Y = C for a positive semidefinite Y, 0 between eigenvectors of eigenvalue 0."""
    values, V = _eigh(Y)
    sums = values.clamp(min=0)[:, None] + values.clamp(min=0)
    regular = sums > values.numel() * torch.finfo(Y.dtype).eps * values.abs().amax()
    weights = torch.where(regular, 1 / torch.where(regular, sums, 1.0), 0.0)
    return lambda C: V @ (weights * (V.mT @ C @ V)) @ V.mT


def _traceable_positive_part(X):
    """Corrections of value 0, each of which makes the derivatives right to one more order."""
    values, vectors = _eigh(X.detach())
    start = Y = _assemble(vectors, values.abs())
    solve = _lyapunov_solver(Y)
    for _ in range(3):
        excess = Y @ Y - X @ X
        Y = Y - solve(excess - excess.detach())
    return (_assemble(vectors, torch.relu(values)) + ((X - X.detach()) + (Y - start)) / 2,)


_lyapunov = by_rule(Rules(_lyapunov_of, _lyapunov_vjp, _lyapunov_jvp, "vmap"))
_positive_part = by_rule(
    Rules(_positive_part_of, _positive_part_vjp, _positive_part_jvp, "vmap"), _traceable_positive_part
)
