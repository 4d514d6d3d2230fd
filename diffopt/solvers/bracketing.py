r"""Methods that keep a root of one equation between two points: `Bisection` and `Brent`.

.. math:: f(a)\,f(b) \le 0

The residual is a bound of the error, :math:`|x - x^\star| \le r`, so the tolerances speak of `x`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.linalg.stopping import nonzero
from diffopt.solvers.solution import CONVERGED, REFUSED, STALLED

__all__ = ["Bisection", "BisectionState", "Brent", "BrentState", "ScalarEquation"]

_GROWTH = 1.6
_MOST_EXPANSIONS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class ScalarEquation:
    """What `root_scalar` solves: an equation of a vector of one element, and where its root is sought.

    Args:
        fn: The function, of vectors of one element.
        lower: The lower end, shape `(1,)`, or None.
        upper: The upper end, shape `(1,)`, or None.
        expand: Whether the bracket may grow until it holds a change of sign.

    Example:
        >>> equation = ScalarEquation(lambda x: x**2 - 2, torch.zeros(1), torch.full((1,), 2.0))
        >>> equation(torch.ones(1))
        tensor([-1.])
    """

    fn: Callable[[Tensor], Tensor]
    lower: Tensor | None = None
    upper: Tensor | None = None
    expand: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The value of the equation."""
        return self.fn(x)

    def bracket(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The ends in order, grown where that is wanted, and the values there."""
        if self.lower is None or self.upper is None:
            raise ValueError("a bracketing solver needs both ends of a bracket: call root_scalar with bracket=")
        a, b = torch.minimum(self.lower, self.upper), torch.maximum(self.lower, self.upper)
        ends = a, b, self.fn(a), self.fn(b)
        if not self.expand:
            return ends

        def grown(ends):
            a, b, fa, fb = ends
            down = fa.abs() < fb.abs()
            reach = _GROWTH * torch.where(b > a, b - a, torch.ones_like(a))
            x = torch.where(down, a - reach, b + reach)
            value = self.fn(x)
            return (torch.where(down, x, a), torch.where(down, b, x),
                    torch.where(down, value, fa), torch.where(down, fb, value))  # fmt: skip

        def same(ends):
            return (ends[2] * ends[3].sign() > 0).all() & ends[2].isfinite().all() & ends[3].isfinite().all()

        return while_loop(same, grown, ends, max_steps=_MOST_EXPANSIONS)


class BisectionState(NamedTuple):
    """The middle, its distance to the ends, whether it must end, the ends, the values there, and the sizes at first.

    `scale` is the larger of the first two values; `refused` tells that they had the same sign.
    """

    x: Tensor
    residual: Tensor
    failed: Tensor
    lower: Tensor
    upper: Tensor
    lower_value: Tensor
    upper_value: Tensor
    scale: Tensor
    refused: Tensor


@dataclasses.dataclass(frozen=True)
class Bisection:
    r"""Bisection: the error is halved by every step, whatever the function.

    .. math:: x_k = \frac{a_k + b_k}{2}, \qquad |x_k - x^\star| \le 2^{-k-1} (b_0 - a_0)

    Finds a change of sign, which of a function that jumps need not be a root.

    Raises:
        ValueError: When run, if there is no bracket.

    Example:
        >>> from diffopt.solvers import root_scalar
        >>> root_scalar(lambda x: x**2 - 2, bracket=(0.0, 2.0), solver=Bisection(), atol=1e-6).value
        tensor(1.4142)

    References:
        Burden and Faires (2011), Numerical analysis, algorithm 2.1.
    """

    bracketing: ClassVar[bool] = True

    def init(self, fn: Any, x: Tensor) -> BisectionState:
        """The state at the start."""
        a, b, fa, fb = fn.bracket()
        a, b = torch.where((fb == 0) & (fa != 0), b, a), torch.where(fa == 0, a, b)
        refused = (fa * fb.sign() > 0).all()
        middle, residual = _halved(a, b, fa, fb)
        return BisectionState(middle, residual, refused, a, b, fa, fb, torch.maximum(fa.abs(), fb.abs()), refused)

    def step(self, fn: Any, state: BisectionState) -> BisectionState:
        """The state after one step."""
        x, value = state.x, fn(state.x)
        low = value * state.lower_value.sign() > 0
        exact = value == 0
        a, b = torch.where(low | exact, x, state.lower), torch.where(~low | exact, x, state.upper)
        fa = torch.where(low | exact, value, state.lower_value)
        fb = torch.where(~low | exact, value, state.upper_value)
        middle, residual = _halved(a, b, fa, fb)
        stuck = ((middle == a) | (middle == b)).all() & ~exact.all()
        return BisectionState(middle, residual, stuck, a, b, fa, fb, state.scale, state.refused)

    def result(self, state: BisectionState, code: Tensor) -> Tensor:
        """How a run ended."""
        nearest = torch.minimum(state.lower_value.abs(), state.upper_value.abs())
        return _judged(code, state, nearest)


class BrentState(NamedTuple):
    """The best point, how far its other end is, whether it must end, and what the next interpolation needs.

    Attributes:
        x: The best point.
        residual: The distance to the other end.
        failed: Whether no further step can be made.
        value: The size of the function at the best point.
        points: The point before, the best and the other end.
        values: The values there.
        moves: The last step, and the one before.
        resolution: The least step.
        scale: The larger of the first two values.
        refused: Whether they had the same sign.
    """

    x: Tensor
    residual: Tensor
    failed: Tensor
    value: Tensor
    points: Tensor
    values: Tensor
    moves: Tensor
    resolution: Tensor
    scale: Tensor
    refused: Tensor


@dataclasses.dataclass(frozen=True)
class Brent:
    r"""The method of Dekker and Brent: inverse quadratic interpolation, or the secant, or bisection where they fail.

    .. math:: x_{k+1} = x_k + \frac{p}{q}, \qquad \text{or} \quad \frac{a_k + b_k}{2}

    Superlinear for smooth functions, and never worse than bisection by more than a factor. Finds a change of sign,
    which of a function that jumps need not be a root.

    Args:
        resolution: The least step; None is :math:`\varepsilon^{3/4}` times the bracket, or that itself if the bracket
            is wider than 1.

    Raises:
        ValueError: When run, if there is no bracket.

    Example:
        >>> from diffopt.solvers import root_scalar
        >>> root_scalar(lambda x, a: x**2 - a, args=(torch.tensor(2.0),), bracket=(0.0, 2.0), solver=Brent()).value
        tensor(1.4142)

    References:
        Brent (1973), Algorithms for minimization without derivatives, section 4.2.
    """

    resolution: float | None = None

    bracketing: ClassVar[bool] = True

    def init(self, fn: Any, x: Tensor) -> BrentState:
        """The state at the start."""
        a, b, fa, fb = fn.bracket()
        refused = (fa * fb.sign() > 0).all()
        least = torch.finfo(a.dtype).eps ** 0.75 if self.resolution is None else self.resolution
        resolution = least * ((b - a).clamp(max=1.0) if self.resolution is None else torch.ones_like(a))
        width = b - a
        points, values, moves = _ordered(a, b, a, fa, fb, fa, width, width)
        return BrentState(
            points[1], _distance(points, values), refused, values[1].abs().squeeze(0), points, values, moves,
            resolution, torch.maximum(fa.abs(), fb.abs()), refused,
        )  # fmt: skip

    def step(self, fn: Any, state: BrentState) -> BrentState:
        """The state after one step."""
        (_, b, c), (_, fb, fc), (d, _) = state.points, state.values, state.moves
        least = 2 * torch.finfo(b.dtype).eps * b.abs() + state.resolution
        half = (c - b) / 2
        move, trusted = _interpolated(state, half, least)
        d, e = torch.where(trusted, move, half), torch.where(trusted, d, half)
        step = torch.where(d.abs() > least, d, half.sign() * torch.minimum(least, half.abs()))
        x = b + step
        value = fn(x)
        stuck = ((x == b) | (x == c)).all() & (value != 0).all()
        points, values, moves = _ordered(b, x, c, fb, value, fc, d, e)
        residual, best = _distance(points, values), values[1].abs().squeeze(0)
        return state._replace(
            x=points[1], residual=residual, failed=stuck, value=best, points=points, values=values, moves=moves
        )

    def result(self, state: BrentState, code: Tensor) -> Tensor:
        """How a run ended."""
        return _judged(code, state, state.values[1].abs())


def _halved(a: Tensor, b: Tensor, fa: Tensor, fb: Tensor) -> tuple[Tensor, Tensor]:
    """The middle, and its distance to the ends; NaN where a value is, which ends the run."""
    half = (b - a) / 2
    return a + half, torch.where((fa + fb).isnan(), torch.nan, half)


def _distance(points: Tensor, values: Tensor) -> Tensor:
    """How far the best point may be from the root; NaN where the value is."""
    distance = torch.where(values[1] == 0, torch.zeros_like(points[1]), (points[2] - points[1]).abs())
    return torch.where((values[1] + values[2]).isnan(), torch.nan, distance)


def _judged(code: Tensor, state: Any, nearest: Tensor) -> Tensor:
    """A bad bracket was refused; a change of sign where the function is larger than it was at the ends is a pole."""
    pole = (nearest > state.scale).all() & (code == CONVERGED)
    return torch.where(state.refused, REFUSED, torch.where(pole, STALLED, code))


def _interpolated(state: BrentState, half: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The step to where the secant, or the inverse parabola, vanishes, and whether to trust it."""
    (a, b, c), (fa, fb, fc), (_, e) = state.points, state.values, state.moves
    s, t, r = fb / nonzero(fa), fa / nonzero(fc), fb / nonzero(fc)
    secant = a == c
    p = torch.where(secant, 2 * half * s, s * (2 * half * t * (t - r) - (b - a) * (r - 1)))
    q = torch.where(secant, 1 - s, (t - 1) * (r - 1) * (s - 1))
    q = torch.where(p > 0, -q, q)
    p = p.abs()
    useful = (e.abs() >= least) & (fa.abs() > fb.abs())
    inside = (2 * p < 3 * half * q - (least * q).abs()) & (p < (e * q).abs() / 2)
    return p / nonzero(q), useful & inside & (q != 0)


def _ordered(
    a: Tensor, b: Tensor, c: Tensor, fa: Tensor, fb: Tensor, fc: Tensor, d: Tensor, e: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Points, values and moves, such that the root is between the second and the third, and the second is the best."""
    stale = fb * fc.sign() > 0
    c, fc = torch.where(stale, a, c), torch.where(stale, fa, fc)
    d, e = torch.where(stale, b - a, d), torch.where(stale, b - a, e)
    swap = fc.abs() < fb.abs()
    a, fa = torch.where(swap, b, a), torch.where(swap, fb, fa)
    b, c = torch.where(swap, c, b), torch.where(swap, b, c)
    fb, fc = torch.where(swap, fc, fb), torch.where(swap, fb, fc)
    a, fa = torch.where(swap, c, a), torch.where(swap, fc, fa)
    return torch.stack([a, b, c]), torch.stack([fa, fb, fc]), torch.stack([d, e])
