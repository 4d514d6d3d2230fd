r"""SciPy's solvers of least squares, their solutions differentiable.

.. math:: \min_{l \le x \le u} \tfrac12 \|r(x)\|^2
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from diffopt.solvers.residuals import Residuals

__all__ = ["SciPyLeastSquares", "SciPyLeastSquaresState"]


class SciPyLeastSquaresState(NamedTuple):
    """The iterate, what vanishes at a solution, whether SciPy gave up, and the value."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor


@dataclasses.dataclass(frozen=True)
class SciPyLeastSquares:
    r"""`scipy.optimize.least_squares`, on the CPU: one step runs it to its end.

    .. math:: \min_{l \le x \le u} \tfrac12 \|r(x)\|^2

    Under `vmap` it is called once for each lane. Its steps cannot be unrolled.

    Args:
        method: "trf", "dogbox", or "lm", which takes no bounds.
        options: Further arguments of SciPy's function, such as `x_scale`; its tolerances are tight by default, and
            those of `least_squares` are checked afterwards.

    Example:
        >>> from diffopt.solvers import least_squares
        >>> rosenbrock = lambda x: torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
        >>> least_squares(rosenbrock, torch.tensor([-1.2, 1.0]), solver=SciPyLeastSquares()).value
        tensor([1., 1.])

    References:
        Branch, Coleman and Li (1999), A subspace, interior, and conjugate gradient method for large-scale
        bound-constrained minimization problems, for "trf".
    """

    method: Literal["trf", "dogbox", "lm"] = "trf"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    handles: ClassVar[tuple[str, ...]] = ("bounds",)
    batching: ClassVar[Literal["sequential"]] = "sequential"

    def init(self, fn: Any, x: Tensor) -> SciPyLeastSquaresState:
        """The state at the start."""
        problem = Residuals.of(fn)
        return _state(problem, problem.clip(x), torch.zeros((), dtype=torch.bool, device=x.device))

    def step(self, fn: Any, state: SciPyLeastSquaresState) -> SciPyLeastSquaresState:
        """The state after SciPy has run to its end."""
        import scipy.optimize

        problem = Residuals.of(fn)

        def tensor(x):
            return torch.as_tensor(x, dtype=state.x.dtype, device=state.x.device)

        def array(t):
            return t.detach().cpu().double().numpy()

        bounds = (
            -math.inf if problem.lower is None else array(problem.lower),
            math.inf if problem.upper is None else array(problem.upper),
        )
        tight = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-14)
        jacobian: Any = lambda x: array(problem.linearized(tensor(x), True).jacobian)  # noqa: E731
        given: dict[str, Any] = tight | dict(self.options)
        found = scipy.optimize.least_squares(
            lambda x: array(problem.fn(tensor(x))), array(state.x), jac=jacobian, method=self.method, bounds=bounds,
            **given,
        )  # fmt: skip
        x = problem.clip(tensor(found.x))
        return _state(problem, x, torch.as_tensor(not found.success, device=x.device) | (x == state.x).all())


def _state(problem: Residuals, x: Tensor, failed: Tensor) -> SciPyLeastSquaresState:
    at = problem.linearized(x, False)
    return SciPyLeastSquaresState(x, problem.optimality(x, at.slope), failed, at.value)
