r"""Iterative refinement of another solver's solution: `IterativeRefinement`."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.linalg.operators import Bound, LinearOperator, Tag
from diffopt.linalg.protocol import LinearSolver, Status, prepared
from diffopt.linalg.stopping import CAUSES, check_options, counter, norm, residual_of, scaled

__all__ = ["IterativeRefinement"]


@dataclasses.dataclass(frozen=True)
class IterativeRefinement:
    r"""Solve for the residual and add the correction, while that halves the residual.

    .. math:: A\, d_k = b - A x_k, \qquad x_{k+1} = x_k + d_k

    A direct solver factorizes once. An iterative one may stop early, at a loose tolerance of its own.

    Args:
        solver: any other linear solver.
        max_steps: the most corrections, the first solution among them.
        rtol: stop at :math:`\|r\| \le \text{rtol}\,\|b\|`, and fail above it. None refines to
            :math:`10 \varepsilon`, and fails above :math:`\varepsilon^{2/3}`.

    Raises:
        ValueError: if `rtol` is negative, or `max_steps` is not a positive int.
        TypeError: if `solver` is not a linear solver, or a truncated series.

    Example:
        >>> from diffopt.linalg import LU, linear_solve
        >>> linear_solve(torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([3.0, 4.0]), IterativeRefinement(LU()))
        tensor([1., 1.])

    References:
        Golub and Van Loan (2013), Matrix computations, section 3.5.3.
    """

    solver: LinearSolver
    max_steps: int = 10
    rtol: float | None = None

    causes: ClassVar[str] = f"the refined solver fails on this operator; {CAUSES}"
    atol: ClassVar[float] = 0.0

    def __post_init__(self):
        if not hasattr(self.solver, "transposed") or isinstance(self.solver, type):
            raise TypeError(f"IterativeRefinement takes a linear solver such as LU(); got {self.solver!r}")
        if getattr(self.solver, "truncated", False):
            raise TypeError("a truncated series has no exact solution to refine; use Neumann with a larger n")
        check_options(self)

    def prepare(self, operator: LinearOperator) -> tuple[LinearOperator, "IterativeRefinement"]:
        """Prepare the refined solver."""
        operator, solver = prepared(self.solver, operator)
        return operator, dataclasses.replace(self, solver=solver)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b` from the initial guess `x`, and how the solve ended."""
        b, x, enough, scale = scaled(self, b, x)
        target = enough if self.rtol is not None else 10 * torch.finfo(b.dtype).eps * norm(b)
        correction = self._correction(bound, b, tags)
        r = residual_of(bound, b, x)
        state = _State(torch.zeros_like(b) if x is None else x, r, torch.ones_like(enough) > 0, counter(b))

        def live(state):
            return (norm(state.r) > target) & state.falling

        def body(state):
            x = state.x + correction(state.r)
            r = b - bound.matvec(x)
            falling = norm(r) <= norm(state.r) / 2
            taken = (norm(r) < norm(state.r)) | (state.steps == 0)
            return _State(torch.where(taken, x, state.x), torch.where(taken, r, state.r), falling, state.steps + 1)

        state = while_loop(live, body, state, max_steps=self.max_steps)
        return scale * state.x, Status(norm(state.r) <= torch.maximum(enough, target), state.steps)

    def transposed(self) -> "IterativeRefinement":
        """The solver for the transposed system: the refined one transposed."""
        return dataclasses.replace(self, solver=self.solver.transposed())

    @property
    def traceable(self) -> Callable[..., Tensor] | None:
        """That of the refined solver, if it has one."""
        return getattr(self.solver, "traceable", None)

    def _correction(self, bound: Bound, like: Tensor, tags: frozenset[Tag]) -> Callable[[Tensor], Tensor]:
        factorize = getattr(self.solver, "factorize", None)
        if factorize is None:
            return lambda r: self.solver.solve(bound, r, None, tags)[0]
        factorized = factorize(bound, like, tags)
        return lambda r: factorized(r)[0]


class _State(NamedTuple):
    x: Tensor
    r: Tensor
    falling: Tensor
    steps: Tensor
