r"""Proximal operators.

.. math:: \mathrm{prox}(x) = \arg\min_y \tfrac12 \|y - x\|^2 + s\, g(y)

The scaling s is that of proximal gradient methods: their step size. It and the hyperparameters of g may be tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diffopt import tree
from diffopt.convex.arguments import check_matrix, flatten_floating, flatten_vector, norm, scalar, spread
from diffopt.convex.spectral import positive_part
from diffopt.linalg.protocol import check_precision
from diffopt.typing import Numeric, Tree

__all__ = [
    "prox_elastic_net",
    "prox_from_projection",
    "prox_group_lasso",
    "prox_lasso",
    "prox_non_negative_lasso",
    "prox_non_negative_ridge",
    "prox_none",
    "prox_nuclear",
    "prox_ridge",
]


def prox_none(x: Tree, scaling: Numeric = 1.0) -> Tree:
    r"""Return the point: :math:`g(y) = 0`.

    Args:
        x: A tree of floating-point tensors.
        scaling: Not used; it is there so that all proxes are called alike.

    Returns:
        A tree like x.

    Raises:
        TypeError: If a leaf is not a floating-point tensor.

    Example:
        >>> prox_none(torch.tensor([1.0, -2.0]))
        tensor([ 1., -2.])
    """
    leaves, treespec = flatten_floating(x, "x")
    return tree.unflatten(treespec, leaves)


def prox_lasso(x: Tree, l1reg: Tree = 1.0, scaling: Numeric = 1.0) -> Tree:
    r"""Shrink each entry towards 0 (soft thresholding): :math:`g(y) = \lambda \|y\|_1`.

    .. math:: \mathrm{prox}(x) = \mathrm{sign}(x) \max(|x| - s \lambda, 0)

    Args:
        x: A tree of floating-point tensors of any shapes.
        l1reg: The strength, at least 0: a number, a tensor that broadcasts to each leaf, or a tree like x of those.
        scaling: The scaling s, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x. At a threshold the derivative is that of the flat part.

    Raises:
        TypeError: If a leaf or a hyperparameter is not floating-point.
        ValueError: If a number is negative, or a tensor does not broadcast.

    Example:
        >>> prox_lasso(torch.tensor([3.0, -0.5, -2.0]), 1.0)
        tensor([ 2.,  0., -1.])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.5.2.
    """
    return _entrywise(_soften, x, scaling, l1reg=l1reg)


def prox_non_negative_lasso(x: Tree, l1reg: Tree = 1.0, scaling: Numeric = 1.0) -> Tree:
    r"""Shrink each entry towards 0 and drop negative ones: :math:`g(y) = \lambda \|y\|_1` for :math:`y \ge 0`.

    .. math:: \mathrm{prox}(x) = \max(x - s \lambda, 0)

    Args:
        x: A tree of floating-point tensors of any shapes.
        l1reg: The strength, as in `prox_lasso`.
        scaling: The scaling s, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x.

    Raises:
        TypeError: If a leaf or a hyperparameter is not floating-point.
        ValueError: If a number is negative, or a tensor does not broadcast.

    Example:
        >>> prox_non_negative_lasso(torch.tensor([3.0, -0.5, -2.0]), 1.0)
        tensor([2., 0., 0.])

    References:
        Beck, "First-order methods in optimization", 2017, lemma 6.5.
    """
    return _entrywise(lambda v, s, strength: torch.relu(v - s * strength), x, scaling, l1reg=l1reg)


def prox_elastic_net(x: Tree, lam: Tree = 1.0, gamma: Tree = 1.0, scaling: Numeric = 1.0) -> Tree:
    r"""Shrink each entry twice: :math:`g(y) = \lambda (\|y\|_1 + \tfrac{\gamma}{2} \|y\|_2^2)`.

    .. math:: \mathrm{prox}(x) = \frac{\mathrm{sign}(x) \max(|x| - s \lambda, 0)}{1 + s \lambda \gamma}

    Args:
        x: A tree of floating-point tensors of any shapes.
        lam: The strength of both penalties, at least 0: a number, a tensor that broadcasts to each leaf, or a tree
            like x of those.
        gamma: The ratio of the ridge penalty to the lasso penalty, likewise.
        scaling: The scaling s, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x.

    Raises:
        TypeError: If a leaf or a hyperparameter is not floating-point.
        ValueError: If a number is negative, or a tensor does not broadcast.

    Example:
        >>> prox_elastic_net(torch.tensor([3.0, -0.5, -2.0]), 1.0, 1.0)
        tensor([ 1.0000,  0.0000, -0.5000])

    References:
        Zou and Hastie, "Regularization and variable selection via the elastic net", JRSS B 2005, eq. 6.
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.5.3.
    """
    return _entrywise(lambda v, s, lam, g: _soften(v, s, lam) / (1 + s * lam * g), x, scaling, lam=lam, gamma=gamma)


def prox_ridge(x: Tree, l2reg: Tree = 1.0, scaling: Numeric = 1.0) -> Tree:
    r"""Scale each entry down: :math:`g(y) = \tfrac{\lambda}{2} \|y\|_2^2`.

    .. math:: \mathrm{prox}(x) = \frac{x}{1 + s \lambda}

    Args:
        x: A tree of floating-point tensors of any shapes.
        l2reg: The strength, at least 0: a number, a tensor that broadcasts to each leaf, or a tree like x of those.
        scaling: The scaling s, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x.

    Raises:
        TypeError: If a leaf or a hyperparameter is not floating-point.
        ValueError: If a number is negative, or a tensor does not broadcast.

    Example:
        >>> prox_ridge(torch.tensor([3.0, -1.0]), 1.0)
        tensor([ 1.5000, -0.5000])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.1.1.
    """
    return _entrywise(lambda v, s, strength: v / (1 + s * strength), x, scaling, l2reg=l2reg)


def prox_non_negative_ridge(x: Tree, l2reg: Tree = 1.0, scaling: Numeric = 1.0) -> Tree:
    r"""Scale each entry down and drop negative ones: :math:`g(y) = \tfrac{\lambda}{2} \|y\|_2^2` for :math:`y \ge 0`.

    .. math:: \mathrm{prox}(x) = \frac{\max(x, 0)}{1 + s \lambda}

    Args:
        x: A tree of floating-point tensors of any shapes.
        l2reg: The strength, as in `prox_ridge`.
        scaling: The scaling s, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x.

    Raises:
        TypeError: If a leaf or a hyperparameter is not floating-point.
        ValueError: If a number is negative, or a tensor does not broadcast.

    Example:
        >>> prox_non_negative_ridge(torch.tensor([3.0, -1.0]), 1.0)
        tensor([1.5000, 0.0000])

    References:
        Beck, "First-order methods in optimization", 2017, section 6.2.3.
    """
    return _entrywise(lambda v, s, strength: torch.relu(v) / (1 + s * strength), x, scaling, l2reg=l2reg)


def prox_group_lasso(x: Tree, l2reg: Numeric = 1.0, scaling: Numeric = 1.0) -> Tree:
    r"""Shrink a whole vector towards 0: :math:`g(y) = \lambda \|y\|_2`.

    .. math:: \mathrm{prox}(x) = x \max\left(1 - \frac{s \lambda}{\|x\|_2}, 0\right)

    Args:
        x: A tree of floating-point tensors of one dtype, which are one group. Map over groups, such as the rows of a
            matrix, by `torch.func.vmap`.
        l2reg: The strength, at least 0, a number or a 0-d tensor.
        scaling: The scaling s, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x. Where the group is shrunk to 0, and at x = 0 always, all derivatives are 0.

    Raises:
        TypeError: If a leaf is not a floating-point tensor, or dtypes are mixed.
        ValueError: If a number is negative, a tensor has dimensions, or x is empty.

    Example:
        >>> rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
        >>> torch.func.vmap(prox_group_lasso)(rows)
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000],
                [0.0000, 0.0000]])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.5.4.
    """
    vector, unravel = flatten_vector(x, "x")
    threshold = _threshold(vector, "l2reg", l2reg, scaling)
    length = norm(vector)
    kept = length > threshold
    factor = torch.where(kept, 1 - threshold / torch.where(kept, length, 1.0), 0.0)
    return unravel(factor * vector)


def prox_nuclear(x: Tensor, l1reg: Numeric = 1.0, scaling: Numeric = 1.0) -> Tensor:
    r"""Shrink the singular values of a matrix towards 0: :math:`g(Y) = \lambda \|Y\|_*`.

    .. math:: \mathrm{prox}(X) = U \max(\Sigma - s \lambda, 0) V^\top, \qquad X = U \Sigma V^\top

    It is read off the projection of a symmetric matrix of n + m rows onto the positive semidefinite cone, so its
    derivatives are right also where singular values repeat or are 0. Where one equals the threshold, it is not
    differentiable: an element of its generalized Jacobian is taken. Compiled, they are right to the third order.

    Args:
        x: The matrix, shape (n, m).
        l1reg: The strength, at least 0, a number or a 0-d tensor.
        scaling: The scaling s, at least 0, a number or a 0-d tensor.

    Returns:
        The matrix, shape (n, m).

    Raises:
        TypeError: If x is not a floating-point tensor.
        ValueError: If x is not a matrix, a number is negative, or a tensor has dimensions.

    Example:
        >>> prox_nuclear(torch.diag(torch.tensor([3.0, 3.0, 0.5])), 1.0)
        tensor([[2.0000, 0.0000, 0.0000],
                [0.0000, 2.0000, 0.0000],
                [0.0000, 0.0000, 0.0000]])

    References:
        Cai, Candes and Shen, "A singular value thresholding algorithm for matrix completion", SIAM J. Optim. 2010,
        theorem 2.1.
    """
    check_matrix(x, "x")
    check_precision(x.dtype, "prox_nuclear")
    threshold = _threshold(x, "l1reg", l1reg, scaling)
    n, m = x.shape
    # the eigenvalues of this matrix are the singular values and their negatives
    top = torch.cat([x.new_zeros(n, n), x], 1)
    both = torch.cat([top, torch.cat([x.mT, x.new_zeros(m, m)], 1)])
    return 2 * positive_part(both - threshold * torch.eye(n + m, dtype=x.dtype, device=x.device))[:n, n:]


def prox_from_projection(projection: Callable[[Tree], Tree]) -> Callable[..., Tree]:
    r"""Make the proximal operator of the indicator of a set from its projection.

    .. math:: g(y) = \begin{cases} 0 & y \in C \\ \infty & \text{else} \end{cases}
              \quad\Rightarrow\quad \mathrm{prox}(x) = P_C(x)

    Args:
        projection: A function of the point; give it its hyperparameters by a lambda or `functools.partial`.

    Returns:
        `prox(x, scaling=1.0)`, which does not depend on the scaling.

    Raises:
        TypeError: If projection is not callable.

    Example:
        >>> from diffopt.convex import projection_simplex
        >>> prox = prox_from_projection(lambda x: projection_simplex(x, 2.0))
        >>> prox(torch.tensor([1.0, 2.0]), scaling=0.1)
        tensor([0.5000, 1.5000])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, eq. 1.2.
    """
    if not callable(projection):
        raise TypeError(f"`projection` must be a function of the point; got {type(projection).__name__}.")

    def prox(x: Tree, scaling: Numeric = 1.0) -> Tree:
        return projection(x)

    return prox


def _entrywise(rule, x: Tree, scaling: Numeric, **hyperparameters: Tree) -> Tree:
    leaves, treespec = flatten_floating(x, "x")
    columns = [spread(value, leaves, treespec, name, at_least=0.0) for name, value in hyperparameters.items()]
    scalings = [scalar(scaling, "scaling", leaf, at_least=0.0) for leaf in leaves]
    return tree.unflatten(treespec, [rule(*row) for row in zip(leaves, scalings, *columns, strict=True)])


def _soften(x: Tensor, scaling: Numeric, strength: Numeric) -> Tensor:
    threshold = scaling * strength
    return torch.relu(x - threshold) - torch.relu(-x - threshold)


def _threshold(x: Tensor, name: str, strength: Numeric, scaling: Numeric) -> Numeric:
    return scalar(strength, name, x, at_least=0.0) * scalar(scaling, "scaling", x, at_least=0.0)
