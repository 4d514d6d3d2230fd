"""What a solver returns: the solution, whether it is one, and what it cost."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import any_lane
from diffopt.typing import Tree

__all__ = ["RESULTS", "Solution", "SolverError", "Stats", "check_result"]

CONVERGED, MAX_STEPS, NONFINITE, STALLED, REFUSED = range(5)

RESULTS = {
    CONVERGED: "converged",
    MAX_STEPS: "the most steps were taken before the tolerance was met. Likely causes: max_steps is too small; rtol "
    "and atol are too tight for the dtype; the problem is ill-conditioned, or has no solution",
    NONFINITE: "a value or a derivative became NaN or infinite. Likely causes: the start is outside of the domain of "
    "fn; a step left it; fn is not differentiable there, or unbounded below",
    STALLED: "no step makes progress. Likely causes: fn is not smooth, or its derivative is wrong; rtol and atol are "
    "too tight for the dtype; the Jacobian is singular; fn is unbounded below",
    REFUSED: "the problem is not what the method is for. Likely causes: a lower bound lies above its upper "
    "bound; the ends of the bracket have values of the same sign; the constraints cannot be met together, or fn is "
    "unbounded below within them",
}


class SolverError(RuntimeError):
    """A solver did not find a solution."""


class Stats(NamedTuple):
    """What a solve cost, and how it ended.

    Attributes:
        steps: The steps taken, an int tensor.
        error: The norm of the residual, of which the tolerances speak, at the last iterate; where the solve did not
            converge, the value may be an earlier one.
        history: The norm at the start and after each step, shape `(max_steps + 1,)`, NaN after the last; empty unless
            asked for.
    """

    steps: Tensor
    error: Tensor
    history: Tensor


class Solution(NamedTuple):
    """The result of a solver.

    Attributes:
        value: The solution, a tree like `init`; it carries the gradient.
        result: An int tensor, 0 where the solve converged; `message` says what the others mean.
        stats: What it cost.
        state: The last state of the solver.
        dual: The multipliers of constraints, where there are any.

    Example:
        >>> import torch
        >>> solution = Solution(torch.ones(2), torch.tensor(0), Stats(*torch.zeros(3)), ())
        >>> bool(solution.converged), solution.message
        (True, 'converged')
    """

    value: Tree
    result: Tensor
    stats: Stats
    state: Any
    dual: Tree = ()

    @property
    def converged(self) -> Tensor:
        """Whether the tolerance was met, a bool tensor."""
        return self.result == CONVERGED

    @property
    def message(self) -> str:
        """What `result` means; of a batch, what the worst lane's means."""
        return RESULTS[int(self.result.max())] if self.result.numel() else RESULTS[CONVERGED]


def check_result(result: Tensor, name: str, throw: bool | None) -> None:
    """Raise where a solve failed in any lane, unless `throw` is False; compiled code cannot, and does not."""
    if throw is False or torch.compiler.is_compiling() or not any_lane(result != CONVERGED):
        return
    causes = "; or ".join(text for code, text in RESULTS.items() if code and any_lane(result == code))
    raise SolverError(f"{name} did not converge in every lane: {causes}. Pass throw=False to take the best it found")
