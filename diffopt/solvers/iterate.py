r"""The one loop of all solvers: step until the residual is small, at most `max_steps` times, each lane on its own.

.. math:: \|r_k\| \le \text{atol} + \text{rtol}\,\|r_0\|
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import while_loop
from diffopt.solvers.solution import CONVERGED, MAX_STEPS, NONFINITE, STALLED, Stats
from diffopt.typing import Tree

__all__ = ["Iteration", "Solver", "Stepped", "options"]

Norm: TypeAlias = Literal["max", "rms", "l2"] | Callable[[Tensor], Tensor]

_NORMS = {
    "max": lambda r: r.abs().amax(),
    "rms": lambda r: (r * r).mean().sqrt(),
    "l2": torch.linalg.vector_norm,
}


class Stepped(Protocol):
    """What every state of a solver has; it is a NamedTuple of tensors.

    Attributes:
        x: The iterate, a vector.
        residual: What is to vanish, a tensor: the gradient, the equation's value, the width of the bracket.
        failed: A bool tensor, whether no further step can be made.
    """

    @property
    def x(self) -> Tensor: ...
    @property
    def residual(self) -> Tensor: ...
    @property
    def failed(self) -> Tensor: ...


class Solver(Protocol):
    """What a solver is: a value with these two pure methods, on flat vectors.

    A class may say more: `handles`, the structures of `minimize` that it takes; `batching = "sequential"`, if its steps
    are not torch operations; `truncatable = False`, if a step at a solution has no meaningful derivative; `unrollable =
    False`, if no step has one; `bracketing = True`, if it needs a `ScalarEquation` with both ends; `interval`, its own
    bounds, or `hides_set = True`, if it has a set that `minimize` cannot see; and a method `result(state, code)`, which
    refines how a run ended.
    """

    def init(self, fn: Callable[..., Any], x: Tensor) -> Any:
        """The state at the start; `fn` is the problem, a function of the vector."""
        ...

    def step(self, fn: Callable[..., Any], state: Any) -> Any:
        """The state after one step."""
        ...


def options(
    rtol: float | None, atol: float | None, norm: Norm, max_steps: int, callback=None, history: bool = False
) -> dict[str, Any]:
    """The options of a verb, checked; tolerances of None are left to the dtype."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf and value is not True):
            raise ValueError(f"{name} must be a non-negative number; got {value!r}")
    if not isinstance(max_steps, int) or isinstance(max_steps, bool) or max_steps < 0:
        raise ValueError(f"max_steps must be a non-negative int; got {max_steps!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of the solver's state, or None; got {callback!r}")
    if not callable(norm) and norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(map(repr, _NORMS))} or a function of a tensor; got {norm!r}")
    return {
        "rtol": rtol, "atol": atol, "norm": norm, "max_steps": max_steps, "callback": callback, "history": history
    }  # fmt: skip


class Carry(NamedTuple):
    """The loop's own state around the solver's."""

    state: Any
    limit: Tensor
    steps: Tensor
    error: Tensor
    best: Tensor
    best_score: Tensor
    history: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Iteration:
    """A solver at work on a problem, as functions of `init` and the arguments: what an adjoint runs or unrolls.

    Args:
        solver: The solver.
        problem: `(unravel, args) -> fn`, the problem on flat vectors.
        settings: As `options` returns them.
    """

    solver: Any
    problem: Callable[[Callable[[Tensor], Tree], tuple], Callable[..., Any]]
    settings: dict[str, Any]

    @property
    def unrollable(self) -> bool:
        """Whether the steps have a derivative at all."""
        return getattr(self.solver, "unrollable", True)

    @property
    def truncatable(self) -> bool:
        """Whether the steps at a solution have a derivative that means something."""
        return getattr(self.solver, "truncatable", True)

    def __call__(self, init: Tree, *args: Tree) -> tuple[Tree, tuple[Tensor, Stats, Any]]:
        """Run to the end: `(solution, (result, stats, state))`."""
        return self.finish(self.run(self.start(init, *args), init, *args), init)

    def start(self, init: Tree, *args: Tree) -> Carry:
        """The loop's state at the start."""
        x, fn = self._on_vectors(init, args)
        state = self.solver.init(fn, x)
        error = self._error(state)
        rtol, atol = self._tolerances(x.dtype)
        history = error.new_full((self.settings["max_steps"] + 1,) if self.settings["history"] else (0,), math.nan)
        carry = Carry(
            state=state,
            limit=atol + rtol * error.detach(),
            steps=error.new_zeros((), dtype=torch.int64),
            error=error,
            best=state.x,
            best_score=_score(state, error),
            history=history,
        )
        return self._recorded(carry)

    def live(self, carry: Carry) -> Tensor:
        """Whether a lane goes on."""
        return (carry.error > carry.limit) & (carry.error < math.inf) & ~carry.state.failed

    def step(self, carry: Carry, init: Tree, *args: Tree) -> Carry:
        """One step of the loop."""
        return self._stepped(carry, self._on_vectors(init, args)[1])

    def run(self, carry: Carry, init: Tree, *args: Tree, max_steps: int | None = None) -> Carry:
        """Step while live."""
        most = self.settings["max_steps"] if max_steps is None else max_steps
        _, fn = self._on_vectors(init, args)
        return while_loop(self.live, lambda carry: self._stepped(carry, fn), carry, max_steps=most)

    def finish(self, carry: Carry, init: Tree) -> tuple[Tree, tuple[Tensor, Stats, Any]]:
        """The solution, where there is none the best iterate, and how the loop ended."""
        met = (carry.error <= carry.limit) & (carry.error < math.inf)
        code = torch.where(carry.state.failed, STALLED, MAX_STEPS)
        code = torch.where(carry.error.isfinite(), code, NONFINITE)
        result = torch.where(met, CONVERGED, code)
        if hasattr(self.solver, "result"):
            result = self.solver.result(carry.state, result)
        _, unravel = tree.ravel(init)
        x = torch.where(met | ~carry.best_score.isfinite(), carry.state.x, carry.best)
        return unravel(x), (result, Stats(carry.steps, carry.error, carry.history), carry.state)

    def _stepped(self, carry: Carry, fn: Callable[..., Any]) -> Carry:
        state = self.solver.step(fn, carry.state)
        if self.settings["callback"] is not None:
            self.settings["callback"](state)
        error = self._error(state)
        score = _score(state, error)
        better = (score < carry.best_score) & (error < math.inf)
        return self._recorded(
            Carry(
                state,
                carry.limit,
                carry.steps + 1,
                error,
                torch.where(better, state.x, carry.best),
                torch.where(better, score, carry.best_score),
                carry.history,
            )
        )

    def _on_vectors(self, init, args):
        x, unravel = tree.ravel(init)
        return x, self.problem(unravel, args)

    def _error(self, state: Stepped) -> Tensor:
        """The norm of the residual; NaN where the value is infinite, as of a function without a minimum."""
        error = self._norm(state.residual)
        value = getattr(state, "value", None)
        return error if value is None else torch.where(value.abs() < math.inf, error, math.nan)

    def _norm(self, residual: Tensor) -> Tensor:
        norm = self.settings["norm"]
        if residual.numel() == 0:
            return residual.new_zeros(())
        return (_NORMS[norm] if isinstance(norm, str) else norm)(residual)

    def _tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        eps = torch.finfo(dtype).eps
        rtol, atol = self.settings["rtol"], self.settings["atol"]
        return eps ** (2 / 3) if rtol is None else rtol, eps ** (1 / 2) if atol is None else atol

    def _recorded(self, carry: Carry) -> Carry:
        if not self.settings["history"]:
            return carry
        now = torch.arange(carry.history.shape[0], device=carry.history.device) == carry.steps
        return carry._replace(history=torch.where(now, carry.error, carry.history))


def _score(state: Any, error: Tensor) -> Tensor:
    """What makes one iterate better than another: the value where there is one, else the residual."""
    return getattr(state, "value", error)
