r"""iMAML: adapt to the end, but stay near the start, and differentiate the minimizer instead of the steps.

.. math:: \phi^\star_i(\theta) = \arg\min_\phi\; L(\phi, D_i^{\text{support}}) + \frac\lambda2 |\phi - \theta|^2
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.implicit import Adjoint
from diffopt.meta.adapt import check_loss, evaluate
from diffopt.meta.maml import support_and_query
from diffopt.meta.task_batch import check_pair, count_tasks, task_batch, task_mean
from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.solvers import minimize
from diffopt.solvers.verb import check_solver
from diffopt.transforms.leaves import flatten_floating
from diffopt.typing import Numeric, Tree

__all__ = ["adapt_proximal", "imaml"]


def adapt_proximal(
    loss: Callable[..., Tensor],
    params: Tree,
    data: Tree,
    strength: Numeric,
    *,
    solver: Any = None,
    adjoint: Adjoint | None = None,
    **options: Any,
) -> Tree:
    r"""Minimize the loss of one task in the neighbourhood of the parameters: the inner problem of `imaml`.

    .. math:: \phi^\star(\theta) = \arg\min_\phi\; L(\phi, D) + \frac\lambda2 |\phi - \theta|^2, \qquad
              \partial_\theta \phi^\star = \Big(I + \tfrac1\lambda \nabla^2 L(\phi^\star)\Big)^{-1}

    Args:
        loss: `loss(params, data)`, a scalar.
        params: The start and centre :math:`\theta`, a tree of floating-point tensors of one dtype.
        data: The task, a tree.
        strength: The strength :math:`\lambda`, a number above 0 or a 0-d tensor, which may carry gradient. It must
            exceed the most negative curvature of the loss.
        solver: A solver of `minimize`, by default `LBFGS()`.
        adjoint: How the minimizer is differentiated, by default `Implicit()`; `Implicit(CG(max_steps=5))` as in the
            paper.
        **options: Further ones of `minimize`: `rtol`, `atol`, `norm`, `max_steps`, `throw`.

    Returns:
        The minimizer, a tree like the parameters.

    Raises:
        SolverError: If the solver did not converge, and `throw` is not False.
        TypeError: If a parameter is no floating-point tensor, or `loss` returns no scalar.
        ValueError: If the strength is not above 0.

    Example:
        >>> loss = lambda w, target: ((w - target) ** 2).sum()
        >>> adapt_proximal(loss, torch.zeros(1), torch.tensor([2.0]), 2.0)
        tensor([1.])

    References:
        Rajeswaran, Finn, Kakade and Levine (2019), Meta-learning with implicit gradients, eqs. 3 and 6.
    """
    check_hyperparameter("strength", strength, above=0.0)
    check_loss(loss)
    leaves, _ = flatten_floating(params, "params")

    def proximal(phi: Tree, theta: Tree, data: Tree, strength: Numeric) -> Tensor:
        value, _ = evaluate(loss, phi, None, data, None, stateful=False)
        squares = [((p - t) ** 2).sum() for p, t in zip(tree.leaves(phi), tree.leaves(theta), strict=True)]
        return value + 0.5 * strength * torch.stack(squares).sum()

    strength = strength.to(leaves[0].dtype) if isinstance(strength, Tensor) and leaves else strength
    return minimize(proximal, params, (params, data, strength), solver=solver, adjoint=adjoint, **options).value


def imaml(
    loss: Callable[..., Tensor],
    strength: Numeric,
    *,
    solver: Any = None,
    adjoint: Adjoint | None = None,
    query_loss: Callable[..., Tensor] | None = None,
    in_dims: tuple[int | None, int] = (None, 0),
    chunk_size: int | None = None,
    reduce: Callable[[Tree], Tree] = task_mean,
    **options: Any,
) -> Callable[[Tree, Any], Any]:
    r"""Make the loss on new data after a minimization on old, near where it starts, over a batch of tasks.

    .. math:: \frac1T \sum_{i=1}^T L(\phi^\star_i, D_i^{\text{query}}), \qquad
              \phi^\star_i = \arg\min_\phi\; L(\phi, D_i^{\text{support}}) + \frac\lambda2 |\phi - \theta|^2

    Memory does not grow with the inner steps, and the gradient does not depend on how the minimum was found. Dropout
    and running statistics have no place in a minimization: give a `loss` that is deterministic.

    Args:
        loss: `loss(params, data)`, a scalar.
        strength: The strength :math:`\lambda`, as in `adapt_proximal`.
        solver: As in `adapt_proximal`.
        adjoint: As in `adapt_proximal`.
        query_loss: The loss after adaptation; by default `loss`.
        in_dims: The dimension of `(params, tasks)` over which tasks run.
        chunk_size: The most tasks at a time, as in `task_batch`.
        reduce: From the losses of all tasks to the result, as in `task_batch`.
        **options: Further ones of `minimize`, as in `adapt_proximal`.

    Returns:
        `meta_loss(params, tasks)`, where `tasks` is a pair `(support, query)` of trees over tasks.

    Raises:
        SolverError: If the solver did not converge for every task, and `throw` is not False.
        TypeError: As in `adapt_proximal`.
        ValueError: As in `adapt_proximal`; if `in_dims` or the tasks are no pair, there are none, or leaves differ in
            their number.

    Example:
        >>> loss = lambda w, target: ((w - target) ** 2).sum()
        >>> tasks = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]])
        >>> torch.func.grad(imaml(loss, 2.0))(torch.zeros(1), tasks)
        tensor([-1.])

    References:
        Rajeswaran, Finn, Kakade and Levine (2019), Meta-learning with implicit gradients, algorithms 1 and 2.
    """
    check_hyperparameter("strength", strength, above=0.0)
    if solver is not None:
        check_solver(solver, "imaml")
    check_pair(in_dims)
    final = loss if query_loss is None else query_loss
    check_loss(loss)
    check_loss(final, "query_loss")

    def of_task(params: Tree, tasks: Any) -> Tensor:
        support, query = tasks
        phi = adapt_proximal(loss, params, support, strength, solver=solver, adjoint=adjoint, **options)
        return evaluate(final, phi, None, query, None, stateful=False)[0]

    def meta_loss(params: Tree, tasks: Any) -> Any:
        count_tasks(support_and_query(tasks), "tasks", in_dims[1:] * 2)
        return task_batch(of_task, in_dims=in_dims, chunk_size=chunk_size, reduce=reduce)(params, tasks)

    return meta_loss
