r"""Projections onto the second-order cone and the cone of positive semidefinite matrices.

.. math:: \{(x, t) : \|x\|_2 \le t\}, \qquad \{X : X = X^\top,\ v^\top X v \ge 0 \ \forall v\}
"""

import torch
from torch import Tensor

from diffopt.convex.arguments import check_matrix, flatten_vector, norm
from diffopt.convex.spectral import positive_part
from diffopt.linalg.protocol import check_precision
from diffopt.typing import Tree

__all__ = ["projection_psd_cone", "projection_second_order_cone"]


def projection_second_order_cone(point: tuple[Tree, Tensor]) -> tuple[Tree, Tensor]:
    r"""Project onto the second-order cone.

    .. math:: P(x, t) = \begin{cases} (x, t) & \|x\| \le t \\ (0, 0) & \|x\| \le -t \\
              \frac{\|x\| + t}{2} \left(\frac{x}{\|x\|}, 1\right) & \text{else} \end{cases}

    Args:
        point: The pair (x, t): a tree of floating-point tensors of one dtype, taken as one vector, and a 0-d tensor.

    Returns:
        A pair like point. On the cone, its apex among it, the derivative is the identity; on its polar it is 0.

    Raises:
        TypeError: If point is no pair, or not of floating-point tensors of one dtype.
        ValueError: If t has dimensions, or x is empty.

    Example:
        >>> projection_second_order_cone((torch.tensor([3.0, 4.0]), torch.tensor(1.0)))
        (tensor([1.8000, 2.4000]), tensor(3.))

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.3.2.
    """
    if not isinstance(point, (tuple, list)) or len(point) != 2:
        raise TypeError("`point` must be a pair (x, t) of a vector and a 0-d tensor, for the cone of |x| <= t.")
    vector, unravel = flatten_vector(point[0], "x")
    t = point[1]
    if not isinstance(t, Tensor) or t.dtype != vector.dtype:
        found = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"`t` must be a 0-d tensor of {vector.dtype}, as `x` is; got {found}.")
    if t.ndim:
        raise ValueError(f"`t` must be a 0-d tensor; got shape {tuple(t.shape)}. Map over several cones by vmap.")
    length = norm(vector)
    inside, polar = length <= t, length <= -t
    height = (length + t) / 2
    direction = vector / torch.where(inside | polar, 1.0, length)
    x = torch.where(inside, vector, torch.where(polar, 0.0, height * direction))
    return unravel(x), torch.where(inside, t, torch.where(polar, 0.0, height))


def projection_psd_cone(X: Tensor) -> Tensor:
    r"""Project onto the cone of positive semidefinite matrices.

    .. math:: \arg\min_{Y \succeq 0} \tfrac12 \|Y - X\|_F^2 = V \max(\Lambda, 0) V^\top, \qquad
              \tfrac12 (X + X^\top) = V \Lambda V^\top

    The derivatives are those of the matrix function, not of its eigenvectors, so they are right also where eigenvalues
    repeat. Where an eigenvalue is 0 the projection is not differentiable: the element of its generalized Jacobian with
    the factor 1/2 between eigenvectors of eigenvalue 0 is taken. Compiled, derivatives are right to the third order.

    Args:
        X: The matrix, shape (n, n); the projection of its symmetric part is returned.

    Returns:
        The symmetric positive semidefinite matrix, shape (n, n).

    Raises:
        TypeError: If X is not a floating-point tensor.
        ValueError: If X is not a square matrix.

    Example:
        >>> projection_psd_cone(torch.tensor([[0.5, 2.0], [2.0, 0.5]]))
        tensor([[1.2500, 1.2500],
                [1.2500, 1.2500]])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.3.3.
        Malick and Sendov, "Clarke generalized Jacobian of the projection onto the cone of positive semidefinite
        matrices", Set-Valued Analysis 2006, theorem 3.7.
    """
    check_matrix(X, "X")
    check_precision(X.dtype, "projection_psd_cone")
    if X.shape[0] != X.shape[1]:
        raise ValueError(f"`X` must be square; got {tuple(X.shape)}. Map over several matrices by torch.func.vmap.")
    return positive_part(X)
