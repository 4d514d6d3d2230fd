r"""MAML: a start from which few steps on a task suffice; `fomaml`, where the inner gradients are constants.

.. math:: \min_\theta \frac1T \sum_{i=1}^T L(\phi_i(\theta), D_i^{\text{query}}), \qquad
          \phi_i(\theta) = \text{adapt}(L, \theta, D_i^{\text{support}})
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffopt import random, tree
from diffopt.meta.adapt import Checkpoint, Mask, adapt, check_inner, check_loss, evaluate
from diffopt.meta.task_batch import check_pair, count_tasks, task_batch, task_mean
from diffopt.transforms import GradientTransformation
from diffopt.typing import Tree

__all__ = ["fomaml", "maml", "meta_loss_of", "support_and_query"]


def maml(
    loss: Callable[..., Any],
    optimizer: GradientTransformation,
    steps: int,
    *,
    query_loss: Callable[..., Any] | None = None,
    in_dims: tuple[int | None, int] = (None, 0),
    chunk_size: int | None = None,
    reduce: Callable[[Tree], Tree] = task_mean,
    checkpoint: Checkpoint = None,
) -> Callable[..., Any]:
    r"""Make the loss on new data after some steps on old, over a batch of tasks, as a function of where steps start.

    .. math:: \frac1T \sum_{i=1}^T L(\phi_i, D_i^{\text{query}}), \qquad
              \phi_i = \text{adapt}(L, \theta, D_i^{\text{support}})

    Differentiate it in the parameters, and in whatever tensors the optimizer holds: make it where those are given, as
    in `lambda meta, tasks: maml(loss, meta_sgd(meta["rates"]), 5)(meta["params"], tasks)`.

    Args:
        loss: `loss(params, data)`, a scalar; or with buffers or a key, as in `adapt`.
        optimizer: The inner optimizer, any of `diffopt.optimizers`, `meta_sgd`, or one with learned hyperparameters.
        steps: How many inner steps, at least 0.
        query_loss: The loss after them, of the same form; by default `loss`.
        in_dims: The dimension of `(params, tasks)` over which tasks run; `(0, 0)` for parameters of each task.
        chunk_size: The most tasks at a time, as in `task_batch`.
        reduce: From the losses of all tasks, shape `(tasks,)`, to the result, as in `task_batch`.
        checkpoint: As in `unroll`, for many inner steps.

    Returns:
        `meta_loss(params, tasks, *, buffers=None, key=None)`, where `tasks` is a pair `(support, query)` of trees over
        tasks. With buffers, which all tasks share at the start, it returns `(loss, new_buffers)`, their mean after the
        query. A key is split over tasks and steps.

    Raises:
        TypeError: If a parameter is no floating-point tensor, a loss is no function, or one returns no scalar.
        ValueError: If `steps` is negative, `in_dims` or the tasks are no pair, there are none, or leaves differ in
            their number.

    Example:
        >>> import torch
        >>> from diffopt import sgd
        >>> loss = lambda w, target: ((w - target) ** 2).sum()
        >>> tasks = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]])
        >>> torch.func.grad(maml(loss, sgd(0.25), 1))(torch.zeros(1), tasks)
        tensor([-1.])

    References:
        Finn, Abbeel and Levine (2017), Model-agnostic meta-learning, algorithm 1.
    """
    return meta_loss_of(
        loss, optimizer, steps, query_loss=query_loss, in_dims=in_dims,
        chunk_size=chunk_size, reduce=reduce, checkpoint=checkpoint,
    )  # fmt: skip


def fomaml(
    loss: Callable[..., Any],
    optimizer: GradientTransformation,
    steps: int,
    *,
    query_loss: Callable[..., Any] | None = None,
    in_dims: tuple[int | None, int] = (None, 0),
    chunk_size: int | None = None,
    reduce: Callable[[Tree], Tree] = task_mean,
) -> Callable[..., Any]:
    r"""Make the meta-loss of `maml`, differentiated as if the gradients of the inner steps were constants.

    .. math:: \phi_i = \theta - \textstyle\sum_t \alpha\, \text{stop}\big(\nabla L(\phi_{i,t})\big), \qquad
              \partial_\theta L(\phi_i, D_i^{\text{query}}) = \nabla L(\phi_i, D_i^{\text{query}})

    The value is that of `maml`, the derivative takes no second derivatives, and no memory for the steps unless
    hyperparameters carry gradient. What the optimizer itself does with the parameters (weight decay) and with
    hyperparameters stays differentiable.

    Args:
        loss: As in `maml`.
        optimizer: As in `maml`.
        steps: As in `maml`.
        query_loss: As in `maml`.
        in_dims: As in `maml`.
        chunk_size: As in `maml`.
        reduce: As in `maml`.

    Returns:
        `meta_loss`, as in `maml`.

    Raises:
        TypeError: As in `maml`.
        ValueError: As in `maml`.

    Example:
        >>> import torch
        >>> from diffopt import sgd
        >>> loss = lambda w, target: ((w - target) ** 2).sum()
        >>> tasks = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]])
        >>> torch.func.grad(fomaml(loss, sgd(0.25), 1))(torch.zeros(1), tasks)
        tensor([-2.])

    References:
        Finn, Abbeel and Levine (2017), Model-agnostic meta-learning, section 5.2.
    """
    return meta_loss_of(
        loss, optimizer, steps, query_loss=query_loss, in_dims=in_dims,
        chunk_size=chunk_size, reduce=reduce, first_order=True,
    )  # fmt: skip


def meta_loss_of(
    loss: Callable[..., Any],
    optimizer: GradientTransformation,
    steps: int,
    *,
    query_loss: Callable[..., Any] | None,
    in_dims: tuple[int | None, int],
    chunk_size: int | None,
    reduce: Callable[[Tree], Tree],
    checkpoint: Checkpoint = None,
    first_order: bool = False,
    mask: Mask = None,
) -> Callable[..., Any]:
    """The meta-loss of the whole family."""
    check_inner(loss, optimizer, steps)
    check_pair(in_dims)
    final = loss if query_loss is None else query_loss
    check_loss(final, "query_loss")

    def of_task(params: Tree, tasks: Any, buffers: Tree, key: Tensor | None) -> Any:
        support, query = tasks
        keys = (None, None) if key is None else random.split(key).unbind()
        stateful = buffers is not None
        adapted = adapt(
            loss, params, support, optimizer, steps, mask=mask, buffers=buffers, key=keys[0],
            first_order=first_order, checkpoint=checkpoint,
        )  # fmt: skip
        value, buffers = evaluate(final, adapted.params, adapted.buffers, query, keys[1], stateful=stateful)
        return (value, buffers) if stateful else value

    def meta_loss(params: Tree, tasks: Any, *, buffers: Tree = None, key: Tensor | None = None) -> Any:
        count = count_tasks(support_and_query(tasks), "tasks", in_dims[1:] * 2)
        keys = None if key is None else random.split(key, count)
        dims = (*in_dims, None, None if keys is None else 0)
        return task_batch(of_task, in_dims=dims, chunk_size=chunk_size, reduce=reduce)(params, tasks, buffers, keys)

    return meta_loss


def support_and_query(tasks: Any) -> tuple[Tree, Tree]:
    """Check that tasks are a pair."""
    if not isinstance(tasks, (tuple, list)) or len(tasks) != 2:
        found = f"{type(tasks).__name__} of {len(tasks)}" if isinstance(tasks, (tuple, list)) else type(tasks).__name__
        raise ValueError(f"`tasks` must be a pair (support, query) of trees; got {found}.")
    tree.check_tensors(tuple(tasks), name="tasks")
    return tuple(tasks)
