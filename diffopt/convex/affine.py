r"""Projections onto hyperplanes, halfspaces and affine sets.

.. math:: \min_y \tfrac12 \|y - x\|^2 \quad\text{s.t.}\quad A y = b \ \text{ or }\ a^\top y \le b
"""

import torch
from torch import Tensor

from diffopt.convex.arguments import check_matrix, check_vector, flatten_vector, like_vector, scalar, unless
from diffopt.linalg import linear_solve, matrix_operator
from diffopt.typing import Numeric, Tree

__all__ = ["project_active_rows", "projection_affine_set", "projection_halfspace", "projection_hyperplane"]


def projection_hyperplane(x: Tree, a: Tree, b: Numeric) -> Tree:
    r"""Project onto a hyperplane.

    .. math:: \arg\min_{a^\top y = b} \tfrac12 \|y - x\|^2 = x - \frac{a^\top x - b}{\|a\|^2}\, a

    Args:
        x: A tree of floating-point tensors of one dtype, taken as one vector.
        a: The normal, a tree like x, not 0.
        b: The offset, a number or a 0-d tensor.

    Returns:
        A tree like x.

    Raises:
        TypeError: If a leaf is not a floating-point tensor, or dtypes are mixed.
        ValueError: If a is not shaped like x or is 0, or b has dimensions.

    Example:
        >>> projection_hyperplane(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]), 1.0)
        tensor([1., 0.])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.2.2.
    """
    return _onto(x, a, b, lambda excess: excess)


def projection_halfspace(x: Tree, a: Tree, b: Numeric) -> Tree:
    r"""Project onto a halfspace.

    .. math:: \arg\min_{a^\top y \le b} \tfrac12 \|y - x\|^2 = x - \frac{\max(a^\top x - b, 0)}{\|a\|^2}\, a

    Args:
        x: A tree of floating-point tensors of one dtype, taken as one vector.
        a: The outward normal, a tree like x, not 0.
        b: The offset, a number or a 0-d tensor.

    Returns:
        A tree like x. On the boundary the derivative is that of the inside.

    Raises:
        TypeError: If a leaf is not a floating-point tensor, or dtypes are mixed.
        ValueError: If a is not shaped like x or is 0, or b has dimensions.

    Example:
        >>> projection_halfspace(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]), 1.0)
        tensor([1., 0.])
        >>> projection_halfspace(torch.tensor([0.2, 0.3]), torch.tensor([1.0, 1.0]), 1.0)
        tensor([0.2000, 0.3000])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.2.3.
    """
    return _onto(x, a, b, torch.relu)


def projection_affine_set(x: Tree, A: Tensor, b: Tensor) -> Tree:
    r"""Project onto the solutions of linear equations.

    .. math:: \arg\min_{A y = b} \tfrac12 \|y - x\|^2 = x - A^\top (A A^\top)^{-1} (A x - b)

    Args:
        x: A tree of floating-point tensors of one dtype, taken as one vector of n entries.
        A: The matrix, shape (m, n), of linearly independent rows.
        b: The right side, shape (m,).

    Returns:
        A tree like x.

    Raises:
        TypeError: If an argument is not floating-point, or dtypes are mixed.
        ValueError: If shapes disagree.
        LinearSolveError: If the rows of A are linearly dependent.

    Example:
        >>> A = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> projection_affine_set(torch.tensor([2.0, 1.0, 5.0]), A, torch.tensor([1.0, 3.0]))
        tensor([1., 0., 3.])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.2.1.
    """
    vector, unravel = flatten_vector(x, "x")
    check_matrix(A, "A", vector.numel())
    check_vector(b, "b", A.shape[0])
    every = torch.ones(A.shape[0], dtype=torch.bool, device=A.device)
    A, b = A.to(vector.dtype), b.to(vector.dtype)
    projected = project_active_rows(vector, A, b, every)
    _check_equations(A.detach(), b.detach(), projected.detach())
    return unravel(projected)


def project_active_rows(x: Tensor, C: Tensor, d: Tensor, active: Tensor) -> Tensor:
    """The projection onto `C y = d` in the active rows, which must be independent; the others play no part."""
    C = torch.where(active[:, None], C, 0.0)
    inert = torch.diag(torch.where(active, 0.0, 1.0).to(C.dtype))

    def project(x, C, d):
        gram = matrix_operator(C @ C.mT + inert, tags=["positive_definite"])
        return x - C.mT @ linear_solve(gram, torch.where(active, C @ x - d, 0.0))

    y = project(x, C, d)
    # projecting again changes no derivative, and takes off the rounding errors of a large x
    corrected = y.detach()
    for _ in range(2):
        corrected = project(corrected, C.detach(), d.detach())
    return y + (corrected - y.detach())


def _check_equations(A: Tensor, b: Tensor, x: Tensor) -> None:
    """Raise where rows depend on one another so nearly that the factorization did not notice."""
    size = A.abs() @ x.abs() + b.abs()
    missed = (A @ x - b).abs() > torch.finfo(x.dtype).eps ** 0.5 * size
    unless(
        ~missed.any(), "`A` must have independent rows: the equations depend on one another. Leave out those that do."
    )


def _onto(x: Tree, a: Tree, b: Numeric, part) -> Tree:
    vector, unravel = flatten_vector(x, "x")
    normal = like_vector(a, x, vector, "a")
    offset = scalar(b, "b", vector)
    size = normal.detach().abs().amax()
    unless(size > 0, "`a` must not be 0 or NaN: it is the normal of the hyperplane.")
    scaled, offset = normal / size, offset / size
    squares = (scaled * scaled).sum()

    def project(x):
        return x - part((scaled * x).sum() - offset) / squares * scaled

    y = project(vector)
    # projecting again changes no derivative, and takes off the rounding errors of a large x
    return unravel(y + (project(project(y)) - y).detach())
