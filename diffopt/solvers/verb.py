"""What all verbs do: check the arguments, run a solver under an adjoint, and report."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.implicit.protocol import Adjoint, Batching, Equation
from diffopt.linalg.operators import Space
from diffopt.solvers.iterate import Iteration
from diffopt.solvers.solution import REFUSED, Solution, check_result
from diffopt.transforms.base import GradientTransformation
from diffopt.typing import Tree

__all__ = ["check_solver", "solve"]


def solve(
    name: str,
    solver: Any,
    problem: Callable[..., Any],
    equation: Equation,
    init: Tree,
    args: tuple,
    *,
    adjoint: Adjoint,
    settings: dict[str, Any],
    throw: bool | None,
    refused: Tensor | None = None,
) -> Solution:
    """Run a solver on a problem, and give the solution the derivative of an adjoint.

    Args:
        name: The verb's name, for messages.
        solver: The solver.
        problem: `(unravel, args) -> fn`, the problem on flat vectors.
        equation: What the solution satisfies.
        init: Where to start.
        args: The arguments of the problem.
        adjoint: The adjoint.
        settings: As `options` returns them.
        throw: Whether to raise where a lane fails.
        refused: Where the problem itself makes no sense, whatever the solver finds; a bool tensor, or None.

    Returns:
        The solution.
    """
    if not isinstance(args, tuple):
        raise TypeError(f"{name} takes args as a tuple; got {type(args).__name__}. Write args=(value,)")
    check_solver(solver, name)
    if not callable(getattr(adjoint, "solve", None)) or isinstance(adjoint, type):
        raise TypeError(f"{name} needs an adjoint, such as Implicit(); got {adjoint!r}")
    tree.check_tensors(init, name="init")
    Space.like(init)
    run = Iteration(solver, problem, settings)
    batching: Batching = getattr(solver, "batching", "vmap")
    try:
        value, (result, stats, state) = adjoint.solve(run, equation, init, args, batching=batching)
    except (NotImplementedError, RuntimeError) as error:
        if "not implemented for" in str(error) or "recision dtypes" in str(error):  # of torch, in half precision
            dtype = tree.leaves(init)[0].dtype
            raise TypeError(
                f"{name} with {type(solver).__name__} needs what torch does not have in {dtype}: start from float32"
            ) from error
        raise
    if refused is not None:
        result = torch.where(refused, REFUSED, result)
    check_result(result, name, throw)
    return Solution(value, result, stats, state)


def check_solver(solver: Any, name: str) -> None:
    """Raise unless a value is a solver.

    Args:
        solver: The value.
        name: The verb's name, for messages.

    Raises:
        TypeError: If it has no `init` and `step`, or is an optimizer, which has both and means something else.

    Example:
        >>> from diffopt.optimizers import sgd
        >>> check_solver(sgd(0.1), "minimize")
        Traceback (most recent call last):
        ...
        TypeError: minimize needs a solver; got an optimizer. Wrap it: FromOptimizer(optimizer).
    """
    if isinstance(solver, GradientTransformation):
        raise TypeError(f"{name} needs a solver; got an optimizer. Wrap it: FromOptimizer(optimizer).")
    if isinstance(solver, type) or not all(callable(getattr(solver, method, None)) for method in ("init", "step")):
        raise TypeError(f"{name} needs a solver with init and step, such as Newton(); got {solver!r}")
