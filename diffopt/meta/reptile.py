r"""Reptile: move the start towards where the tasks' steps end.

.. math:: g = \theta - \frac1T \sum_{i=1}^T \text{adapt}(L, \theta, D_i)
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffopt import random, tree
from diffopt.meta.adapt import adapt, check_inner
from diffopt.meta.task_batch import check_pair, count_tasks, task_batch, task_mean
from diffopt.transforms import GradientTransformation
from diffopt.typing import Tree

__all__ = ["reptile"]


def reptile(
    loss: Callable[..., Any],
    optimizer: GradientTransformation,
    steps: int,
    *,
    in_dims: tuple[int | None, int] = (None, 0),
    chunk_size: int | None = None,
    reduce: Callable[[Tree], Tree] = task_mean,
) -> Callable[..., Any]:
    r"""Make the meta-gradient of Reptile: the start minus the mean of the adapted parameters.

    .. math:: g(\theta) = \theta - \frac1T \sum_{i=1}^T \text{adapt}(L, \theta, D_i)

    It is no gradient of a loss; give it to an outer optimizer in the place of one: `sgd(0.1)` moves a tenth of the way.

    Args:
        loss: `loss(params, data)`, a scalar; or with buffers or a key, as in `adapt`.
        optimizer: The inner optimizer.
        steps: How many inner steps, at least 0; of 1, the mean gradient is that of plain training.
        in_dims: The dimension of `(params, tasks)` over which tasks run.
        chunk_size: The most tasks at a time, as in `task_batch`.
        reduce: From the moves of all tasks, trees like the parameters with the tasks in front, to one, as in
            `task_batch`.

    Returns:
        `meta_grad(params, tasks, *, buffers=None, key=None)`, a tree like the parameters, where `tasks` is a tree over
        tasks, the data of the steps. With buffers, which all tasks share at the start, it returns
        `(meta_grad, new_buffers)`.

    Raises:
        TypeError: If a parameter is no floating-point tensor, or `loss` returns no scalar.
        ValueError: If `steps` is negative, `in_dims` is no pair, there are no tasks, or leaves differ in their number.

    Example:
        >>> import torch
        >>> from diffopt import sgd
        >>> loss = lambda w, target: ((w - target) ** 2).sum()
        >>> reptile(loss, sgd(0.25), 2)(torch.zeros(1), torch.tensor([[1.0], [3.0]]))
        tensor([-1.5000])

    References:
        Nichol, Achiam and Schulman (2018), On first-order meta-learning algorithms, algorithm 1.
    """
    check_inner(loss, optimizer, steps)
    check_pair(in_dims)

    def of_task(params: Tree, data: Tree, buffers: Tree, key: Tensor | None) -> Any:
        adapted = adapt(loss, params, data, optimizer, steps, buffers=buffers, key=key)
        move = tree.sub(params, adapted.params)
        return move if buffers is None else (move, adapted.buffers)

    def meta_grad(params: Tree, tasks: Tree, *, buffers: Tree = None, key: Tensor | None = None) -> Any:
        tree.check_tensors(tasks, name="tasks")
        count = count_tasks((tasks,), "tasks", in_dims[1:])
        keys = None if key is None else random.split(key, count)
        dims = (*in_dims, None, None if keys is None else 0)
        return task_batch(of_task, in_dims=dims, chunk_size=chunk_size, reduce=reduce)(params, tasks, buffers, keys)

    return meta_grad
