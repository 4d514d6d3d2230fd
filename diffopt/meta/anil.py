r"""ANIL: almost no inner loop, only the head adapts.

.. math:: \phi_i = (\theta_{\text{body}},\ \text{adapt}(L, \theta_{\text{head}}, D_i^{\text{support}}))
"""

from collections.abc import Callable
from typing import Any

from diffopt.meta.adapt import Checkpoint
from diffopt.meta.maml import meta_loss_of
from diffopt.meta.task_batch import task_mean
from diffopt.transforms import GradientTransformation
from diffopt.typing import Tree

__all__ = ["anil"]


def anil(
    loss: Callable[..., Any],
    optimizer: GradientTransformation,
    steps: int,
    mask: Tree | Callable[[Tree], Tree],
    *,
    query_loss: Callable[..., Any] | None = None,
    in_dims: tuple[int | None, int] = (None, 0),
    chunk_size: int | None = None,
    reduce: Callable[[Tree], Tree] = task_mean,
    checkpoint: Checkpoint = None,
) -> Callable[..., Any]:
    r"""Make the meta-loss of `maml` where only some of the parameters adapt to a task.

    .. math:: \phi_i = (\theta_{\text{body}},\ \text{adapt}(L, \theta_{\text{head}}, D_i^{\text{support}}))

    The others are learned by the outer loop alone; the inner steps do not differentiate them, and the optimizer holds
    no state for them.

    Args:
        loss: As in `maml`.
        optimizer: As in `maml`.
        steps: As in `maml`.
        mask: Which leaves adapt: a tree of bools like the parameters, a prefix of one, such as
            `{"body": False, "head": True}`, or a function of the parameters to either.
        query_loss: As in `maml`.
        in_dims: As in `maml`.
        chunk_size: As in `maml`.
        reduce: As in `maml`.
        checkpoint: As in `maml`.

    Returns:
        `meta_loss`, as in `maml`.

    Raises:
        TypeError: As in `maml`, or if an entry of the mask is not a bool, or there is no mask.
        ValueError: As in `maml`, or if the mask is no prefix of the parameters, or holds nowhere.

    Example:
        >>> import torch
        >>> from diffopt import sgd
        >>> loss = lambda p, target: ((p["head"] * p["body"] - target) ** 2).sum()
        >>> tasks = torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]])
        >>> params = {"body": torch.ones(1), "head": torch.zeros(1)}
        >>> torch.func.grad(anil(loss, sgd(0.25), 1, {"body": False, "head": True}))(params, tasks)
        {'body': tensor([-5.]), 'head': tensor([-1.])}

    References:
        Raghu, Raghu, Bengio and Vinyals (2020), Rapid learning or feature reuse?, eq. 4.
    """
    if mask is None:
        raise TypeError("`mask` must say which leaves adapt; for all of them use `maml`.")
    return meta_loss_of(
        loss, optimizer, steps, mask=mask, query_loss=query_loss, in_dims=in_dims,
        chunk_size=chunk_size, reduce=reduce, checkpoint=checkpoint,
    )  # fmt: skip
