r"""Proximal gradient descent, accelerated: for a smooth function plus one whose proximal operator is known.

.. math:: x_{k+1} = \operatorname{prox}_{\eta g}(y_k - \eta \nabla f(y_k)), \qquad
          y_{k+1} = x_{k+1} + \frac{t_k - 1}{t_{k+1}} (x_{k+1} - x_k)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.solvers.objective import Objective

__all__ = ["ProximalGradient", "ProximalGradientState"]


class ProximalGradientState(NamedTuple):
    """The iterate, its residual, whether no step size served, the extrapolated point, `t`, and the step size."""

    x: Tensor
    residual: Tensor
    failed: Tensor
    y: Tensor
    t: Tensor
    step_size: Tensor


@dataclasses.dataclass(frozen=True)
class ProximalGradient:
    r"""Proximal gradient descent: FISTA, with restarts; of a projection, projected gradient descent.

    .. math:: x_{k+1} = \operatorname{prox}_{\eta g}(y_k - \eta \nabla f(y_k))

    Without `step_size`, each step begins with one and a half times the step size before, and halves it until the
    quadratic model lies above the function.

    Args:
        step_size: :math:`\eta`, at most :math:`1 / L`; None searches for it by backtracking.
        accelerate: Whether to extrapolate; if not, that is ISTA.
        max_backtracks: The most halvings of the step size in a step.

    Raises:
        ValueError: If `step_size` is not positive, or `max_backtracks` not a positive int.

    Example:
        >>> from diffopt.solvers import minimize
        >>> soft = lambda x, s: x.sign() * (x.abs() - s).clamp(min=0)
        >>> solver = ProximalGradient()
        >>> loss = lambda x: ((x - 3) ** 2).sum()
        >>> minimize(loss, torch.zeros(2), prox=soft, solver=solver, rtol=0.0, atol=1e-6).value
        tensor([2.5000, 2.5000])

    References:
        Beck and Teboulle (2009), A fast iterative shrinkage-thresholding algorithm, eqs. 4.1 to 4.3. O'Donoghue and
        Candes (2015), Adaptive restart for accelerated gradient schemes, eq. 13.
    """

    step_size: float | Tensor | None = None
    accelerate: bool = True
    max_backtracks: int = 60

    handles = ("prox", "bounds")

    def __post_init__(self):
        check_step_size(self.step_size, self.max_backtracks)

    def init(self, fn: Any, x: Tensor) -> ProximalGradientState:
        """The state at the start."""
        objective = Objective.of(fn)
        one = x.new_ones(())
        size = one if self.step_size is None else torch.as_tensor(self.step_size, dtype=x.dtype, device=x.device)
        x = objective.clip(x)
        no = torch.zeros_like(one, dtype=torch.bool)
        return ProximalGradientState(x, objective.optimality(x), no, x, one, size)

    def step(self, fn: Any, state: ProximalGradientState) -> ProximalGradientState:
        """The state after one step."""
        objective = Objective.of(fn)
        value, slope = objective.value_and_grad(state.y)

        def move(size):
            return proximal_step(objective, state.y, slope, size)

        if self.step_size is None:
            tried = search_step_size(
                objective.value_and_grad, move, state.y, value, slope, 1.5 * state.step_size, self.max_backtracks
            )
        else:
            x = move(state.step_size)
            tried = Tried(state.step_size, ~state.step_size.isfinite(), x, _slope(*objective.value_and_grad(x)))
        x = tried.x
        t = (1 + (1 + 4 * state.t**2).sqrt()) / 2 if self.accelerate else state.t
        y = x + (state.t - 1) / t * (x - state.x)
        restart = ((state.y - x) * (x - state.x)).sum() > 0
        y, t = torch.where(restart, x, y), torch.where(restart, torch.ones_like(t), t)
        return ProximalGradientState(x, objective.residual(x, tried.slope), tried.failed, y, t, tried.step_size)


class Tried(NamedTuple):
    """A step size, whether it is too large, where it leads, and the gradient there."""

    step_size: Tensor
    failed: Tensor
    x: Tensor
    slope: Tensor


def search_step_size(
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]],
    move: Callable[[Tensor], Tensor],
    x: Tensor,
    value: Tensor,
    slope: Tensor,
    first: Tensor,
    max_backtracks: int,
) -> Tried:
    r"""The first of a step size, its half, and so on, at which the quadratic model lies above the function.

    .. math:: f(x + d) - f(x) - \nabla f(x)^\top d \le \frac{|d|^2}{2 \eta}

    Where rounding hides the left side, half of :math:`(\nabla f(x + d) - \nabla f(x))^\top d` stands for it.

    Args:
        value_and_grad: Of the smooth function.
        move: Of a step size, where it leads from `x`.
        x: Where it starts.
        value: The value there.
        slope: The gradient there.
        first: The first step size.
        max_backtracks: The most halvings.

    Returns:
        What was tried last; `failed` if it is too large still.

    References:
        Becker, Candes and Grant (2011), Templates for convex cone problems, section 5.3.
    """
    eps = torch.finfo(value.dtype).eps

    def tried(size):
        new = move(size)
        d = new - x
        f, g = value_and_grad(new)
        bound = (d @ d) / (2 * size)
        visible = bound > 1e3 * eps * value.abs()
        left = torch.where(visible, f - value - slope @ d, (g - slope) @ d / 2)
        rounding = 10 * eps * torch.linalg.vector_norm(slope.detach()) * d.detach().abs().amax()
        return Tried(size, ~(left <= bound + rounding), new, _slope(f, g))

    return while_loop(
        lambda last: last.failed, lambda last: tried(last.step_size / 2), tried(first), max_steps=max_backtracks
    )


def _slope(value: Tensor, slope: Tensor) -> Tensor:
    """The gradient, NaN where the value is not finite: outside of its domain a function may look flat."""
    return torch.where(value.abs() < torch.inf, slope, torch.nan)


def proximal_step(objective: Objective, x: Tensor, slope: Tensor, size: Tensor) -> Tensor:
    """A gradient step, and the proximal operator or the bounds after it."""
    moved = x - size * slope
    return objective.clip(moved) if objective.prox is None else objective.prox(moved, size)


def check_step_size(step_size: Any, max_backtracks: int) -> None:
    """Raise unless a step size is positive, a tensor or None, and the number of backtracks an int."""
    if step_size is not None and not isinstance(step_size, Tensor) and not step_size > 0:
        raise ValueError(f"step_size must be positive, or None to search for it; got {step_size!r}")
    if not isinstance(max_backtracks, int) or max_backtracks < 1:
        raise ValueError(f"max_backtracks must be a positive int; got {max_backtracks!r}")
