"""What a linear solver is: a value whose methods act on flat vectors, under any `vmap`, each lane stopping on its own.

Besides the two methods of `LinearSolver`, a solver may have

- `prepare(operator) -> (operator, solver)`: called once, at the door. Refuses an operator that lacks a tag, and moves
  what carries gradient (a damping) into the operator;
- `factorize(bound, like, tags) -> (b -> (x, status))`: a direct solver's work that does not depend on the right side;
- `traceable(bound, b, tags) -> x`: the solution in operations that torch differentiates rightly to any order, for
  `torch.compile`;
- `least_squares(bound, b, x, tags) -> (x, status)`: the minimum-norm least-squares solution, for `lstsq`, with
  `traceable_least_squares` and `full_rank`, whether it is one only for operators of full rank;
- `truncated = True`: the result is a finite sum by definition, to be differentiated as it is;
- `causes`: the likely causes of a failure, for its message.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from diffopt.linalg.operators import Bound, LinearOperator, Tag

__all__ = ["LinearSolver", "Status", "check_precision", "nothing_to_solve", "prepared", "solved_directly"]


class Status(NamedTuple):
    """How a solve ended: whether it converged (bool), and after how many steps (int; 0 for a direct solver)."""

    converged: Tensor
    steps: Tensor


class LinearSolver(Protocol):
    """What a linear solver is: a value with these two methods, on flat vectors."""

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status | Tensor]:
        """The solution of `bound x = b` from the initial guess `x`, and how the solve ended, or only whether it did."""
        ...

    def transposed(self) -> "LinearSolver":
        """The solver for the transposed system."""
        ...


def prepared(solver: LinearSolver, operator: LinearOperator) -> tuple[LinearOperator, LinearSolver]:
    """The operator and the solver as they go to work, once the solver has accepted the operator."""
    prepare = getattr(solver, "prepare", None)
    return (operator, solver) if prepare is None else prepare(operator)


def solved_directly(solution: Tensor, regular: Tensor) -> tuple[Tensor, Status]:
    """A direct solver's result: NaN where the matrix was not regular, so that it is never taken for a solution."""
    solution = torch.where(regular, solution, torch.nan)
    return solution, Status(solution.isfinite().all(), torch.zeros((), dtype=torch.int64, device=solution.device))


def nothing_to_solve(like: Tensor) -> Status:
    """The status of a system without unknowns or equations."""
    return Status(
        torch.ones((), dtype=torch.bool, device=like.device), torch.zeros((), dtype=torch.int64, device=like.device)
    )


def check_precision(dtype: torch.dtype, name: str) -> None:
    """Raise for a dtype that torch cannot factorize a matrix in."""
    if dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"{name} needs float32 or float64, as torch factorizes no matrix in {dtype}; convert to float32"
        )
