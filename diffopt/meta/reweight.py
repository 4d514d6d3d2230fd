r"""Learning to reweight: weights of training examples by what a step on each would do to a clean meta set.

.. math:: u_i = -\frac{\partial}{\partial \epsilon_i} L_\text{meta}\bigl(\theta'(\epsilon)\bigr)\Big|_{\epsilon = 0},
          \qquad w_i = \frac{\max(u_i, 0)}{\sum_j \max(u_j, 0)}
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import grad, jvp
from diffopt.transforms import GradientTransformation, step
from diffopt.transforms.base import check_optimizer
from diffopt.transforms.leaves import flatten_floating
from diffopt.typing import Tree

__all__ = ["reweight"]


def reweight(
    losses: Callable[[Tree, Any], Tensor],
    meta_loss: Callable[[Tree, Any], Tensor],
    optimizer: GradientTransformation | None = None,
) -> Callable[..., Tensor]:
    r"""Make a function that weighs the examples of a batch by how much a step on each helps on a clean meta set.

    .. math:: u_i = -\frac{\partial}{\partial \epsilon_i} L_\text{meta}\bigl(\theta'(\epsilon)\bigr)\Big|_{\epsilon=0},
              \quad \theta'(\epsilon) = \text{step}\Bigl(\sum_i \epsilon_i \nabla \ell_i(\theta)\Bigr), \qquad
              w_i = \frac{\max(u_i, 0)}{\sum_j \max(u_j, 0)}

    Of plain gradient descent :math:`u_i = \alpha\, \nabla L_\text{meta}(\theta)^\top \nabla \ell_i(\theta)`: an example
    counts as far as its gradient agrees with that of the meta set, and the rate :math:`\alpha` drops out of the
    weights. This takes one gradient of the meta loss and one Jacobian-vector product of the losses.

    The weights are constants to the gradient that the training step then takes, `grad` of
    `(weights * losses(params, batch)).sum()`, as long as they are computed outside of it.

    Args:
        losses: `losses(params, batch)`, the loss of each example, shape (n,).
        meta_loss: `meta_loss(params, meta_batch)`, a scalar, on data that are clean, or balanced as the test data are.
        optimizer: What takes the foreseen step; by default plain gradient descent. Others, such as momentum, need their
            state, and differentiate through their step. Adam's is not differentiable at the first one, where its
            moments are 0 (without `eps_root`, weights are NaN): give the state of some steps on.

    Returns:
        `weights(params, batch, meta_batch, state=None)`, shape (n,), which sum to 1; all are 0 where no example helps,
        and NaN where the gradient of an example is.

    Raises:
        TypeError: If arguments are not functions, the optimizer is no transformation, parameters are not floating-point
            tensors, or the meta loss is not a scalar.
        ValueError: If losses are not of shape (n,) with n of at least 1, or a state is missing, of no use or of another
            optimizer.

    Example:
        >>> losses = lambda w, batch: (batch[0] * w - batch[1]) ** 2
        >>> batch = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, -2.0])  # the last label is flipped
        >>> weights = reweight(losses, lambda w, meta: ((meta[0] * w - meta[1]) ** 2).mean())
        >>> weights(torch.tensor(0.5), batch, (torch.tensor([2.0]), torch.tensor([4.0])))
        tensor([0.5000, 0.5000, 0.0000])

    References:
        Ren et al. (2018), Learning to reweight examples for robust deep learning, eq. 7 to 9 and 12.
    """
    _check_options(losses, meta_loss, optimizer)

    def weights(params: Tree, batch: Any, meta_batch: Any, state: Any = None) -> Tensor:
        leaves, treespec = flatten_floating(params, "params")
        _check_state(optimizer, state, params)

        def each(*leaves: Tensor) -> Tensor:
            return _one_dimensional(losses(tree.unflatten(treespec, leaves), batch))

        if optimizer is None:
            direction = tree.leaves(grad(meta_loss)(params, meta_batch))
            helpful = jvp(each, leaves, direction)[1]
        else:
            helpful = -_through_step(each, leaves, treespec, lambda p: meta_loss(p, meta_batch), optimizer, state)
        return _normalized(helpful.clamp(min=0))

    return weights


def _through_step(each: Callable, leaves: list[Tensor], treespec: Any, meta_loss: Callable, optimizer: Any, state: Any):
    """The derivative of the meta loss after a step, in the weights of the examples, at weights of 0."""
    params = tree.unflatten(treespec, leaves)

    def after(epsilon: Tensor) -> Tensor:
        slopes = grad(lambda p: epsilon @ each(*tree.leaves(p)))(params)
        return meta_loss(step(optimizer, slopes, state, params)[0])

    return grad(after)(torch.zeros_like(each(*leaves)))


def _normalized(weights: Tensor) -> Tensor:
    largest = weights.amax()
    weights = weights / torch.where(largest == 0, 1.0, largest)  # so that the sum does not overflow
    total = weights.sum()
    return weights / torch.where(total == 0, 1.0, total)


def _one_dimensional(values: Any) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim != 1 or len(values) == 0:
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f'`losses` must return the loss of each example, shape (n,); got {found}. Use reduction="none".'
        )
    if not values.is_floating_point():
        raise TypeError(f"`losses` must return floating-point numbers; got {values.dtype}.")
    return values


def _check_state(optimizer: Any, state: Any, params: Tree) -> None:
    if optimizer is None and state is not None:
        raise ValueError("`state` is that of an `optimizer`, and none was given to `reweight`.")
    if optimizer is not None and state is None:
        raise ValueError("weights by an optimizer's step need its state: `weights(params, batch, meta_batch, state)`.")
    if optimizer is not None:
        tree.check_like(state, optimizer.init(params), name="state", reference_name="optimizer.init(params)")


def _check_options(losses: Any, meta_loss: Any, optimizer: Any) -> None:
    for name, loss in (("losses", losses), ("meta_loss", meta_loss)):
        if not callable(loss):
            raise TypeError(f"`{name}` must be a function; got {type(loss).__name__}.")
    if optimizer is not None:
        check_optimizer(optimizer)
