r"""What single-loop methods have in common: pure steps of a state, on batches given as indices.

.. math:: s_{t+1} = \text{step}(s_t, I_t, J_t), \qquad I_t \in \{0, \dots, n-1\}^b, \quad J_t \in \{0, \dots, m-1\}^b
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffopt.autodiff import any_lane
from diffopt.multilevel.single_loop.problem import BilevelProblem
from diffopt.schedules.hyperparameters import check_hyperparameter
from diffopt.transforms.leaves import as_dtype, flatten_floating, zero_count
from diffopt.typing import Numeric, Schedule, Tree

__all__ = [
    "Draws",
    "SingleLoop",
    "check_state",
    "check_step_sizes",
    "check_weight",
    "current",
    "open_batches",
    "start",
]


class Draws(NamedTuple):
    """How many batches a method takes in one step.

    Attributes:
        inner: Batches of the inner problem.
        outer: Batches of the outer problem.
    """

    inner: int
    outer: int


class SingleLoop(Protocol):
    """A stochastic bilevel method: a frozen value of step sizes, with a pure state.

    States are named tuples of tensors with the fields `z`, the inner variable, `x`, the outer one, and `count`, the
    steps taken, and others of their own.
    """

    @property
    def draws(self) -> Draws:
        """How many batches a step takes."""
        ...

    def init(self, problem: BilevelProblem, z: Tree, x: Tree) -> Any:
        """The state at the start."""
        ...

    def step(self, problem: BilevelProblem, state: Any, inner_batch: Tensor, outer_batch: Tensor) -> Any:
        """The state after one step on batches of indices."""
        ...


def start(problem: BilevelProblem, z: Tree, x: Tree) -> Tensor:
    """Check a problem and the variables at the start, and give the step count of zero.

    Args:
        problem: The problem.
        z: The inner variable.
        x: The outer variable.

    Returns:
        The count, an int64 0-d tensor.

    Raises:
        TypeError: If the problem is none, or a variable is not a tree of floating-point tensors.
        ValueError: If a variable has no elements.

    Example:
        >>> loss = lambda z, x, batch: ((z - x - batch) ** 2).mean()
        >>> start(BilevelProblem(loss, loss, torch.ones(3), torch.ones(2)), torch.tensor(1), torch.tensor(1.0))
        Traceback (most recent call last):
        ...
        TypeError: `z` must be a floating-point tensor; got torch.int64. Convert it with .to(torch.float32).
    """
    if not isinstance(problem, BilevelProblem):
        raise TypeError(f"`problem` must be a BilevelProblem; got {type(problem).__name__}.")
    leaves = flatten_floating(z, "z")[0]
    for name, found in (("z", leaves), ("x", flatten_floating(x, "x")[0])):
        if not sum(leaf.numel() for leaf in found):
            raise ValueError(f"`{name}` must have at least one element; it has none.")
    return zero_count(leaves)


def check_state(state: Any, kind: type) -> None:
    """Check that a state is of the kind that a method makes.

    Args:
        state: The state.
        kind: The class of the method's states.

    Raises:
        TypeError: If it is another.

    Example:
        >>> check_state((), Draws)
        Traceback (most recent call last):
        ...
        TypeError: `state` must be a Draws, as `init` and `step` return; got tuple.
    """
    if not isinstance(state, kind):
        raise TypeError(f"`state` must be a {kind.__name__}, as `init` and `step` return; got {type(state).__name__}.")


def open_batches(
    problem: BilevelProblem, draws: Draws, inner_batch: Tensor, outer_batch: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Check the indices of a step, and list its batches.

    Args:
        problem: The problem.
        draws: How many batches the method takes.
        inner_batch: Indices of inner samples, int64: shape `(k, b)` for k batches, or `(b,)` for one that serves in
            place of all.
        outer_batch: Indices of outer samples, likewise.

    Returns:
        As many tensors of indices as there are draws, for the inner and the outer problem.

    Raises:
        TypeError: If indices are not int64 tensors.
        ValueError: If their shape is another, there are none, or one is out of range.

    Example:
        >>> loss = lambda z, x, batch: ((z - x - batch) ** 2).mean()
        >>> problem = BilevelProblem(loss, loss, torch.ones(3), torch.ones(2))
        >>> open_batches(problem, Draws(2, 1), torch.tensor([0, 2]), torch.tensor([[1]]))
        ([tensor([0, 2]), tensor([0, 2])], [tensor([1])])
    """
    inner = _listed(inner_batch, draws.inner, problem.inner_size, "inner_batch")
    return inner, _listed(outer_batch, draws.outer, problem.outer_size, "outer_batch")


def current(value: Numeric | Schedule, count: Tensor, like: Tensor, name: str) -> Numeric:
    """Give a hyperparameter at a step count, in the dtype of a vector.

    Args:
        value: A number, a 0-d tensor, or a schedule.
        count: The step count.
        like: The vector.
        name: What error messages call it.

    Returns:
        A number, or a 0-d tensor of the vector's dtype.

    Raises:
        TypeError: If a schedule gives neither a number nor a floating-point tensor.
        ValueError: If a schedule gives a tensor with dimensions.

    Example:
        >>> current(lambda count: 1.0 / (1.0 + count), torch.tensor(3), torch.ones(2), "step_size")
        tensor(0.2500)
    """
    if isinstance(value, Callable):
        value = value(count)
        check_hyperparameter(name, value)
    return as_dtype(value, like.dtype)


def check_step_sizes(**sizes: Numeric | Schedule | None) -> None:
    """Check step sizes: numbers above 0, 0-d tensors, schedules, or None.

    Args:
        **sizes: The step sizes, by name.

    Raises:
        TypeError: If one is none of these.
        ValueError: If a number is not above 0, or a tensor has dimensions.

    Example:
        >>> check_step_sizes(outer_step_size=-1.0)
        Traceback (most recent call last):
        ...
        ValueError: `outer_step_size` must be above 0.0; got -1.0.
    """
    for name, size in sizes.items():
        if size is not None and not callable(size):
            check_hyperparameter(name, size, above=0.0)


def check_weight(name: str, weight: Numeric | Schedule) -> None:
    """Check the weight of a running mean: a number in (0, 1], a 0-d tensor, or a schedule.

    Args:
        name: What error messages call it.
        weight: The weight.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a number is out of range, or a tensor has dimensions.

    Example:
        >>> check_weight("inner_weight", 1.0)
    """
    if callable(weight):
        return
    check_hyperparameter(name, weight, above=0.0, at_most=1.0)


def _listed(indices: Tensor, count: int, size: int, name: str) -> list[Tensor]:
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"`{name}` must be an int64 tensor of indices of samples; got {got}. For all, torch.arange(n).")
    if indices.numel() == 0 or indices.ndim not in (1, 2) or (indices.ndim == 2 and indices.shape[0] != count):
        raise ValueError(
            f"`{name}` must have shape ({count}, b), a row of indices for each batch of the step, or (b,), one "
            f"batch for all; got {tuple(indices.shape)}."
        )
    if not torch.compiler.is_compiling() and any_lane((indices < 0) | (indices >= size)):
        raise ValueError(f"`{name}` must hold indices from 0 to {size - 1}, for there are {size} samples; one is not.")
    return [indices] * count if indices.ndim == 1 else list(indices.unbind())
