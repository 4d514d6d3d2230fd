"""Steps whose length follows from the parameters or from the value of the loss."""

from typing import Any

import torch

from diffopt import tree
from diffopt.transforms.base import EmptyState, GradientTransformation
from diffopt.transforms.leafwise import leafwise
from diffopt.transforms.leaves import as_dtype, check_hyperparameter, flatten_floating, precise_dtype
from diffopt.typing import Numeric, Tree

__all__ = ["scale_by_polyak", "scale_by_trust_ratio"]


def scale_by_trust_ratio(
    min_norm: Numeric = 0.0, trust_coefficient: Numeric = 1.0, eps: Numeric = 0.0
) -> GradientTransformation:
    r"""Scale each leaf's update to the size of its parameters.

    .. math::
        u = \frac{c\, \max(\lVert \theta \rVert, m)}{\max(\lVert g \rVert, m) + \epsilon}\, g, \qquad
        u = g \ \text{ if } \lVert \theta \rVert \text{ or } \lVert g \rVert \text{ (or m in its place) is } 0

    Args:
        min_norm: The least norm m, at least 0, a number or a 0-d tensor like all three.
        trust_coefficient: The factor c.
        eps: Added to the norm of the update, at least 0.

    Returns:
        A stateless transformation, whose update needs ``params`` and keeps dtypes.

    Raises:
        TypeError: If a hyperparameter is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, a tensor has dimensions, or update gets no params.

    Example:
        >>> scale_by_trust_ratio().update(torch.tensor([3.0, 4.0]), EmptyState(), torch.tensor([0.0, 10.0]))[0]
        tensor([6., 8.])

    References:
        You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017, section 4.
    """
    check_hyperparameter("min_norm", min_norm, at_least=0.0)
    check_hyperparameter("trust_coefficient", trust_coefficient)
    check_hyperparameter("eps", eps, at_least=0.0)

    def rule(g, p, least, coefficient, eps):
        param_norm, norm = (torch.where(n > least, n, least) for n in (tree.norm(p), tree.norm(g)))
        usable = (param_norm > 0) & (norm > 0)
        ratio = coefficient * param_norm / torch.where(usable, norm + eps, 1.0)
        return (g * torch.where(usable, ratio, 1.0),)

    return leafwise(
        EmptyState, rule, lambda count: (min_norm, trust_coefficient, eps), takes_params="scale_by_trust_ratio"
    )


def scale_by_polyak(
    f_min: Numeric = 0.0, max_learning_rate: Numeric = 1.0, eps: Numeric = 0.0
) -> GradientTransformation:
    r"""Scale the updates by Polyak's step size, which needs the value of the loss.

    .. math:: u_t = g_t \min\left(\frac{f(\theta_t) - f_\text{min}}{\lVert g_t \rVert^2 + \epsilon}, a\right)

    At a zero gradient the update is 0. Call ``update(grads, state, params, value=loss)``.

    Args:
        f_min: A lower bound of the loss, a number or a 0-d tensor like all three.
        max_learning_rate: The largest step size a, above 0.
        eps: Added to the squared norm, at least 0.

    Returns:
        A stateless transformation, whose update needs ``value`` and keeps dtypes.

    Raises:
        TypeError: If a hyperparameter or the value is neither a number nor a floating-point tensor.
        ValueError: If a number is out of range, a tensor has dimensions, or update gets no value.

    Example:
        >>> scale_by_polyak().update(torch.tensor([2.0]), EmptyState(), value=torch.tensor(1.0))[0]
        tensor([0.5000])

    References:
        Loizou et al., "Stochastic Polyak Step-size for SGD: An Adaptive Learning Rate for Fast Convergence",
        AISTATS 2021: SPS_max with c = 1.
    """
    check_hyperparameter("f_min", f_min)
    check_hyperparameter("max_learning_rate", max_learning_rate, above=0.0)
    check_hyperparameter("eps", eps, at_least=0.0)

    def init(params: Tree) -> EmptyState:
        flatten_floating(params, "params")
        return EmptyState()

    def update(
        updates: Tree, state: EmptyState, params: Tree | None = None, *, value: Numeric | None = None, **extra: Any
    ) -> tuple[Tree, EmptyState]:
        if value is None:
            raise ValueError("`scale_by_polyak` needs the loss: call update(grads, state, params, value=loss).")
        check_hyperparameter("value", value)
        leaves, treespec = flatten_floating(updates, "updates")
        precise = [leaf.to(precise_dtype(leaf.dtype)) for leaf in leaves]
        square = tree.vdot(precise, precise)
        gap, least, bound = (as_dtype(x, square.dtype) for x in (value, f_min, max_learning_rate))
        moves = square > 0
        size = (gap - least) / (torch.where(moves, square, 1.0) + as_dtype(eps, square.dtype))
        size = torch.where(moves, torch.where(size < bound, size, bound), 0.0)
        out = [(x * size.to(x.dtype)).to(leaf.dtype) for x, leaf in zip(precise, leaves, strict=True)]
        return tree.unflatten(treespec, out), state

    return GradientTransformation(init, update)
