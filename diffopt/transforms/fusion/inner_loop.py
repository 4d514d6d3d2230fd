"""The steps of an inner loop, in place on tensors that the loop alone holds: what they are is checked once.

`step(..., donate=True)` takes any tensors, and looks at them anew each time, which for a few small leaves takes longer
than the step.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffopt import tree
from diffopt.autodiff.levels import derivative_possible, plain_autograd
from diffopt.transforms.base import GradientTransformation
from diffopt.transforms.fusion import launch, torch_fused
from diffopt.typing import Numeric, Tree
from diffopt_kernels.steps import StepRule

__all__ = ["InnerLoop", "inner_loop"]

MOST_LEAVES = 16
"""With more, the checks are a small part of a step."""


class InnerLoop:
    """Parameters and an optimizer's state that steps write over.

    Args:
        rule: The step, one that torch has a fused function for.
        scalars: Its scalars by name, plain numbers.
        params: The parameters, of which nobody else holds the memory.
        state: The optimizer's state, likewise: the moments of its first member are written.
    """

    def __init__(self, rule: StepRule, scalars: Mapping[str, Numeric], params: Tree, state: tuple):
        self.params, self.state = params, state
        self._rule, self._scalars = rule, scalars
        first = state[0]
        self._count = first.count if "count" in first._fields else None
        moments = (getattr(first, name) for name in first._fields if name != "count")
        self._columns = [tree.leaves(params), *map(tree.leaves, moments)]
        self._written = [x for column in self._columns for x in column]
        self._ranges = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in self._written]

    def serves(self) -> bool:
        """Tell whether steps may be in place: few plain leaves of one kind, which no derivative rides on."""
        written = self._written
        if not 0 < len(self._columns[0]) <= MOST_LEAVES or any(type(x) is not Tensor for x in written):
            return False
        if any(not x.is_contiguous() or not x.is_cpu or x.dtype != written[0].dtype for x in written):
            return False
        if derivative_possible(written):
            return False
        params, *moments = self._columns
        return launch.by_torch(self._rule, [params, params, *moments], self._scalars)

    def step(self, grads: Tree) -> None:
        """Take a step along gradients like the parameters, which no derivative rides on."""
        params, *moments = self._columns
        if self._count is not None:
            self._count = self._count + 1
            self.state = (self.state[0]._replace(count=self._count), *self.state[1:])
        ready = [self._apart(g) for g in tree.leaves(grads)]
        torch_fused.step_in_place(self._rule, [params, ready, *moments], self._scalars, self._count)

    def _apart(self, gradient: Tensor) -> Tensor:
        """The gradient, contiguous, and in memory that the step does not write."""
        gradient = gradient.contiguous()
        start, end = gradient.data_ptr(), gradient.data_ptr() + gradient.nbytes
        return gradient.clone() if any(start < last and first < end for first, last in self._ranges) else gradient


def inner_loop(optimizer: GradientTransformation, params: Tree, state: Any) -> InnerLoop | None:
    """Make steps in place of an optimizer, where that is right and quicker.

    Args:
        optimizer: The optimizer.
        params: The parameters, of which nobody else holds the memory, as those that `step` has returned.
        state: The optimizer's state, likewise.

    Returns:
        The loop; None where the optimizer has no such steps, or the tensors do not suit.

    Example:
        >>> import torch
        >>> from diffopt.optimizers import sgd
        >>> optimizer, params = sgd(0.5), torch.ones(2)
        >>> loop = inner_loop(optimizer, params, optimizer.init(params))
        >>> loop.step(torch.ones(2))
        >>> loop.params
        tensor([0.5000, 0.5000])
    """
    recipe = getattr(optimizer.step, "recipe", None)
    if recipe is None or not plain_autograd():
        return None
    rule, scalars = recipe
    if any(isinstance(value, Tensor) or callable(value) for value in scalars.values()):
        return None
    loop = InnerLoop(rule, scalars, params, state)
    return loop if loop.serves() else None
