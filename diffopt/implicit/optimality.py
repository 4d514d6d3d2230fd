r"""Optimality maps: the equation that the solution of a problem satisfies, for implicit differentiation.

.. math:: F(x^\star, \theta) = 0

Each takes the functions of a problem and returns :math:`F(x, \theta)`, shaped like `x`, for `custom_root` or
`Equation`. The functions may be of trees; what they capture is differentiated, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from diffopt import tree
from diffopt.autodiff import grad
from diffopt.typing import Tree

__all__ = ["KKT", "fixed_point_map", "kkt_map", "projected_map", "proximal_map", "stationarity_map"]


class KKT(NamedTuple):
    """A point of a constrained problem with its multipliers.

    Attributes:
        primal: The unknowns.
        equality: The multipliers of the equality constraints, like their values; () where there are none.
        inequality: The multipliers of the inequality constraints, not negative.
    """

    primal: Tree
    equality: Tree = ()
    inequality: Tree = ()


def stationarity_map(fn: Callable[..., Tensor]) -> Callable[..., Tree]:
    r"""The gradient of a smooth objective.

    .. math:: F(x, \theta) = \nabla_x f(x, \theta)

    Args:
        fn: `f(x, *args)`, a scalar.

    Returns:
        `F(x, *args)`; its Jacobian is the Hessian, symmetric.

    Example:
        >>> import torch
        >>> stationarity_map(lambda x, a: ((x - a) ** 2).sum())(torch.tensor(3.0), torch.tensor(1.0))
        tensor(4.)
    """
    return grad(fn)


def fixed_point_map(fixed_point_fun: Callable[..., Tree]) -> Callable[..., Tree]:
    r"""The residual of a fixed point.

    .. math:: F(x, \theta) = x - T(x, \theta)

    Args:
        fixed_point_fun: `T(x, *args)`, shaped like `x`.

    Returns:
        `F(x, *args)`.

    Example:
        >>> import torch
        >>> fixed_point_map(torch.cos)(torch.tensor(0.0))
        tensor(-1.)
    """
    return lambda x, *args: tree.sub(x, fixed_point_fun(x, *args))


def proximal_map(
    fn: Callable[..., Tensor], prox: Callable[[Tree, Any], Tree], step_size: float | Tensor = 1.0
) -> Callable[..., Tree]:
    r"""The residual of a proximal gradient step, zero at the minimizers of :math:`f + g`.

    .. math:: F(x, \theta) = x - \operatorname{prox}_{\eta g}(x - \eta\,\nabla_x f(x, \theta))

    Args:
        fn: `f(x, *args)`, a scalar, smooth.
        prox: `(x, scaling) -> argmin_y |x - y|^2 / 2 + scaling g(y)`.
        step_size: :math:`\eta`; the solution does not depend on it.

    Returns:
        `F(x, *args)`; its Jacobian is not symmetric.

    Example:
        >>> import torch
        >>> soft = lambda x, s: x.sign() * (x.abs() - s).clamp(min=0)
        >>> proximal_map(lambda x: (x - 3) ** 2 / 2, soft)(torch.tensor(2.0))
        tensor(0.)

    References:
        Blondel et al. (2022), Efficient and modular implicit differentiation, eq. 9.
    """

    def residual(x: Tree, *args: Tree) -> Tree:
        return tree.sub(x, prox(tree.axpy(-step_size, grad(fn)(x, *args), x), step_size))

    return residual


def projected_map(
    fn: Callable[..., Tensor], projection: Callable[[Tree], Tree], step_size: float | Tensor = 1.0
) -> Callable[..., Tree]:
    r"""The residual of a projected gradient step, zero at the minimizers of `f` over a convex set.

    .. math:: F(x, \theta) = x - P(x - \eta\,\nabla_x f(x, \theta))

    Args:
        fn: `f(x, *args)`, a scalar, smooth.
        projection: `P(x)`.
        step_size: :math:`\eta`; the solution does not depend on it.

    Returns:
        `F(x, *args)`; its Jacobian is not symmetric.

    Example:
        >>> import torch
        >>> projected_map(lambda x: (x + 3) ** 2 / 2, lambda x: x.clamp(min=0))(torch.tensor(0.0))
        tensor(0.)

    References:
        Blondel et al. (2022), Efficient and modular implicit differentiation, eq. 8.
    """
    return proximal_map(fn, lambda x, scaling: projection(x), step_size)


def kkt_map(
    fn: Callable[..., Tensor],
    equality: Callable[..., Tree] | None = None,
    inequality: Callable[..., Tree] | None = None,
) -> Callable[..., KKT]:
    r"""The conditions of Karush, Kuhn and Tucker, for :math:`\min f` subject to :math:`h = 0` and :math:`g \le 0`.

    .. math:: \nabla f + \partial h^\top \lambda + \partial g^\top \mu = 0, \qquad h = 0, \qquad
              \mu - \max(\mu + g, 0) = 0

    The last says at once that :math:`g \le 0`, :math:`\mu \ge 0` and :math:`\mu g = 0`.

    Args:
        fn: `f(x, *args)`, a scalar.
        equality: `h(x, *args)`, a tree, or None.
        inequality: `g(x, *args)`, a tree, or None.

    Returns:
        `F(point, *args)` of a `KKT` point, shaped like it. Its Jacobian is regular where the active constraints are
        independent and no multiplier of an active one vanishes.

    Example:
        >>> import torch
        >>> F = kkt_map(lambda x: (x**2).sum(), equality=lambda x: x.sum() - 2)
        >>> F(KKT(torch.ones(2), torch.tensor(-2.0)))
        KKT(primal=tensor([0., 0.]), equality=tensor(0.), inequality=())

    References:
        Nocedal and Wright (2006), Numerical Optimization, theorem 12.1.
    """

    def residual(point: KKT, *args: Tree) -> KKT:
        def lagrangian(x: Tree) -> Tensor:
            value = fn(x, *args)
            for constraint, multipliers in ((equality, point.equality), (inequality, point.inequality)):
                value = value if constraint is None else value + tree.vdot(multipliers, constraint(x, *args))
            return value

        slope = grad(lagrangian)(point.primal)
        h, c = (() if g is None else g(point.primal, *args) for g in (equality, inequality))
        return KKT(slope, h, tree.map(lambda mu, c: mu - (mu + c).clamp(min=0), point.inequality, c))

    return residual
