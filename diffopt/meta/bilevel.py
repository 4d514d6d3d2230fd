r"""`bilevel`: an outer objective at the minimizer of an inner one, as one function with its hypergradient.

.. math:: F(\theta) = f(x^\star(\theta), \theta), \qquad x^\star(\theta) = \arg\min_x g(x, \theta)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.implicit import Adjoint
from diffopt.solvers import minimize
from diffopt.solvers.verb import check_solver
from diffopt.transforms.leaves import check_scalar
from diffopt.typing import Tree

__all__ = ["bilevel"]


def bilevel(
    inner: Callable[..., Tensor],
    outer: Callable[..., Tensor],
    *,
    solver: Any = None,
    adjoint: Adjoint | None = None,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    r"""Make the outer objective as a function of the outer parameters alone.

    .. math:: F(\theta) = f(x^\star(\theta), \theta), \qquad x^\star(\theta) = \arg\min_x g(x, \theta), \\
              \nabla F = \partial_\theta f - \partial_\theta \partial_x g\, (\partial_x^2 g)^{-1}\, \partial_x f

    `diffopt.grad` of it is the hypergradient, `diffopt.value_and_grad` gives both.

    Args:
        inner: `g(x, theta, *args)`, a scalar, smooth in `x`.
        outer: `f(x, theta, *args)`, a scalar.
        solver: A solver of `minimize`, by default `LBFGS()`, or what fits `options`.
        adjoint: How the minimizer is differentiated, by default `Implicit()`: CG for more than 256 unknowns.
        has_aux: Whether to return the minimizer too, a constant: the start of the next solve.
        **options: Further ones of `minimize`: `rtol`, `atol`, `norm`, `max_steps`, `throw`; `bounds`, `projection` and
            other structures, where they do not depend on the outer parameters.

    Returns:
        `hyper_loss(theta, init, *args)`, a scalar; or `(scalar, minimizer)`. `theta` is a tree; `init`, where the solve
        starts, carries no gradient; `args` are trees that both functions are given, such as data.

    Raises:
        SolverError: If the solver did not converge, and `throw` is not False.
        TypeError: If `outer` returns no scalar, `solver` is an optimizer, or `inner` or `outer` no function.
        ValueError: If `inner` returns no scalar.

    Example:
        >>> from diffopt.autodiff import value_and_grad
        >>> ridge = lambda x, theta: ((x - 3.0) ** 2).sum() + theta * (x**2).sum()
        >>> valid = lambda x, theta: ((x - 1.0) ** 2).sum()
        >>> value_and_grad(bilevel(ridge, valid))(torch.tensor(1.0), torch.zeros(1))
        (tensor(0.2500), tensor(-0.7500))

    References:
        Pedregosa (2016), Hyperparameter optimization with approximate gradient, eq. 3.
    """
    if solver is not None:
        check_solver(solver, "bilevel")
    for name, fn in (("inner", inner), ("outer", outer)):
        if not callable(fn):
            raise TypeError(f"`{name}` must be a function of (x, theta); got {type(fn).__name__}.")

    def hyper_loss(theta: Tree, init: Tree, *args: Tree) -> Any:
        x = minimize(inner, init, (theta, *args), solver=solver, adjoint=adjoint, **options).value
        value = check_scalar(outer(x, theta, *args), "`outer`")
        return (value, tree.map(torch.detach, x)) if has_aux else value

    return hyper_loss
