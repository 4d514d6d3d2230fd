"""The steps of an inner loop, in place on tensors that the loop alone holds: what they are is checked once.

`step(..., donate=True)` takes any tensors, and looks at them anew each time; `value_and_grad` takes any function and
makes new leaves each time. For a few small leaves both take longer than the step.
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
    """Parameters and an optimizer's state that steps down a function write over; made by `inner_loop`.

    Attributes:
        params: The parameters.
        state: The optimizer's state.
    """

    def __init__(self, fn: Callable[..., Tensor], rule: StepRule, scalars: Mapping[str, float], params: Tree, state):
        self.params, self.state = params, state
        self._fn, self._rule, self._scalars = fn, rule, scalars
        self._columns, treespec = _columns(params, state)
        self._count = state[0].count if "count" in state[0]._fields else None
        self._ranges = [(x.data_ptr(), x.data_ptr() + x.nbytes) for column in self._columns for x in column]
        self._inputs = tuple(x.detach().requires_grad_() for x in self._columns[0])  # the same memory: they move along
        self._point = tree.unflatten(treespec, self._inputs)

    def step(self, *rest: Any) -> bool:
        """Take a step down `fn(params, *rest)`; or none, and say so, if a derivative rides on its gradient."""
        with torch.enable_grad():
            value = self._fn(self._point, *rest)
        grads = leaf_gradient(value, self._inputs)
        if grads is None:
            return False
        if self._count is not None:
            self._count = self._count + 1
            self.state = (self.state[0]._replace(count=self._count), *self.state[1:])
        params, *moments = self._columns
        columns = [params, [self._apart(g) for g in grads], *moments]
        torch_fused.step_in_place(self._rule, columns, self._scalars, self._count)
        return True

    def _apart(self, gradient: Tensor) -> Tensor:
        """The gradient, contiguous, and in memory that the step does not write."""
        gradient = gradient.contiguous()
        start, end = gradient.data_ptr(), gradient.data_ptr() + gradient.nbytes
        return gradient.clone() if any(start < last and first < end for first, last in self._ranges) else gradient


def inner_loop(
    fn: Callable[..., Tensor], optimizer: GradientTransformation, params: Tree, state: Any
) -> InnerLoop | None:
    """Make steps in place of an optimizer down a function, where that is right and quicker.

    Args:
        fn: Takes the parameters and more, and returns a floating-point scalar.
        optimizer: The optimizer.
        params: The parameters, of which nobody else holds the memory, as those that `step` has returned.
        state: The optimizer's state, likewise.

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
