"""The steps of an inner loop, on tensors that the loop alone holds: what they are is checked once.

`value_and_grad` and `step` take any function and any tensors, and look at them anew each time, which for a few small
leaves takes longer than the step.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from optree import PyTreeSpec
from torch import Tensor

from diffopt import tree
from diffopt.autodiff.gradients import leaf_gradient
from diffopt.autodiff.levels import derivative_possible, plain_autograd
from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.fusion import launch, torch_fused
from diffopt.transforms.fusion.steps import FusedStep
from diffopt.typing import Tree
from diffopt_kernels.steps import StepRule

__all__ = ["InnerLoop", "inner_loop"]

MOST_LEAVES = 16
"""With more, the checks are a small part of a step."""


class InnerLoop:
    """Parameters and an optimizer's state, as they step down a function; made by `inner_loop`.

    Each step makes new parameters, since the function has seen the old ones, and writes over the moments.

    Attributes:
        state: The optimizer's state.
    """

    def __init__(self, fn: Callable[..., Tensor], rule: StepRule, scalars: Mapping[str, float], params: Tree, state):
        self.state = state
        self._fn, self._write = fn, torch_fused.writer(rule, scalars)
        (self._leaves, *self._moments), self._treespec = _columns(params, state)
        self._bare = self._treespec.is_leaf()
        self._count = state[0].count if "count" in state[0]._fields else None

    @property
    def params(self) -> Tree:
        """The parameters."""
        return tree.unflatten(self._treespec, self._leaves)

    def step(self, *rest: Any) -> bool:
        """Take a step down `fn(params, *rest)`; or none, and say so, if a derivative rides on its gradient."""
        inputs = tuple([x.detach().requires_grad_() for x in self._leaves])
        point = inputs[0] if self._bare else self._treespec.unflatten(inputs)
        with torch.enable_grad():
            value = self._fn(point, *rest)
        grads = leaf_gradient(value, inputs)
        if grads is None:
            return False
        if self._count is not None:
            self._count = self._count + 1
            self.state = (self.state[0]._replace(count=self._count), *self.state[1:])
        self._leaves = [x.clone() for x in self._leaves]
        self._write((self._leaves, [g.resolve_neg().contiguous() for g in grads], *self._moments), self._count)
        return True


def inner_loop(
    fn: Callable[..., Tensor], optimizer: GradientTransformation, params: Tree, state: Any
) -> InnerLoop | None:
    """Make steps of an optimizer down a function quicker, where that is right.

    Args:
        fn: Takes the parameters and more, and returns a floating-point scalar.
        optimizer: The optimizer.
        params: The parameters.
        state: The optimizer's state, of which nobody else holds the memory, as one that `step` has returned: its
            moments are written over.

    Returns:
        The loop; None where the optimizer has no such steps, or the tensors do not suit: few plain leaves of one kind
        do, which no derivative rides on.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> optimizer, params = sgd(0.5), torch.ones(2)
        >>> loop = inner_loop(lambda x, a: a * x.sum(), optimizer, params, optimizer.init(params))
        >>> loop.step(3.0), loop.params
        (True, tensor([-0.5000, -0.5000]))
    """
    step = optimizer.step
    if not isinstance(step, FusedStep) or step.mask is not None or not plain_autograd():
        return None
    numbers = {name: value for name, value in step.scalars.items() if isinstance(value, (int, float))}
    if len(numbers) < len(step.scalars) or not _serves(step.rule, numbers, _columns(params, state)[0]):
        return None
    return InnerLoop(fn, step.rule, numbers, params, state)


def _columns(params: Tree, state: Any) -> tuple[list[list[Tensor]], PyTreeSpec]:
    """The leaves of the parameters and of each moment."""
    leaves, treespec = tree.flatten(params)
    moments = (getattr(state[0], name) for name in state[0]._fields if name != "count")
    return [leaves, *map(tree.leaves, moments)], treespec


def _serves(rule: StepRule, scalars: Mapping[str, float], columns: list[list[Tensor]]) -> bool:
    written = [x for column in columns for x in column]
    if not 0 < len(columns[0]) <= MOST_LEAVES or any(type(x) is not Tensor for x in written):
        return False
    if any(not x.is_contiguous() or not x.is_cpu or x.dtype != written[0].dtype for x in written):
        return False
    params, *moments = columns
    return not derivative_possible(written) and launch.by_torch(rule, [params, params, *moments], scalars)
