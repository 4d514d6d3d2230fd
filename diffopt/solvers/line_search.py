r"""Line searches: how far to go along a direction of descent.

.. math:: \phi(\alpha) = f(x + \alpha p), \qquad \phi'(0) < 0

A search is a value with one method, `search(objective, x, value, slope, p, start)`. What it accepts:

- Armijo: :math:`\phi(\alpha) \le \phi(0) + c_1 \alpha \phi'(0)`;
- Goldstein: and :math:`\phi(\alpha) \ge \phi(0) + (1 - c_1) \alpha \phi'(0)`;
- Wolfe: and :math:`\phi'(\alpha) \ge c_2 \phi'(0)`; strong: :math:`|\phi'(\alpha)| \le -c_2 \phi'(0)`;
- approximately, where rounding hides the decrease: :math:`\phi(\alpha) \le \phi(0) + \epsilon |\phi(0)|` and
  :math:`\phi'(\alpha) \le (2 c_1 - 1) \phi'(0)`.

Where `max_steps` evaluations find no such point, the best one that decreases the function is taken. Where there is
none, or the function still falls at the longest step, the search has failed.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from diffopt.autodiff import any_lane, while_loop

__all__ = ["Backtracking", "HagerZhang", "LineSearch", "Point", "Zoom"]


class Point(NamedTuple):
    """A point on the line: the iterate, the value and gradient there, the step, and whether it is acceptable."""

    x: Tensor
    value: Tensor
    slope: Tensor
    step: Tensor
    accepted: Tensor


class LineSearch(Protocol):
    """What a line search is: a value with this method."""

    def search(self, objective: Any, x: Tensor, value: Tensor, slope: Tensor, p: Tensor, start: Tensor) -> Point:
        """The point to go to from `x`, along `p`, trying the step `start` first."""
        ...


class _Line(NamedTuple):
    """The function along a direction; `d0` is its derivative at the start."""

    objective: Any
    x: Tensor
    value: Tensor
    slope: Tensor
    p: Tensor
    d0: Tensor

    def at(self, step: Tensor) -> tuple[Point, Tensor]:
        """The point of a step, not yet accepted, and the derivative there."""
        x = torch.addcmul(self.x, step, self.p)
        f, g = self.objective.value_and_grad(x)
        return Point(x, f, g, step, torch.zeros_like(f, dtype=torch.bool)), g @ self.p

    def lower(self, point: Point, d: Tensor, c1: Any) -> Tensor:
        """Whether the function decreased sufficiently, or would have but for rounding."""
        exact = point.value <= self.value + c1 * point.step * self.d0
        if not torch.compiler.is_compiling() and not any_lane(~exact):
            return exact
        bound = self.value + 10 * torch.finfo(d.dtype).eps * self.value.abs()
        return exact | ((point.value <= bound) & (d <= (2 * c1 - 1) * self.d0))

    def grows(self, point: Point, d: Tensor) -> Tensor:
        """Whether, where rounding hides all change of the value, the derivative became larger."""
        hidden = -point.step * self.d0 <= torch.finfo(d.dtype).eps * self.value.abs()
        return hidden & (d > -self.d0)

    def end(self, point: Point, step: Tensor, d: Tensor) -> Tensor:
        """`(alpha, phi, phi')` of a point, an end of an interval."""
        return torch.stack([step, point.value, d])

    def origin(self) -> tuple[Point, Tensor]:
        """The start, as a point and as an end."""
        zero = torch.zeros_like(self.value)
        return Point(self.x, self.value, self.slope, zero, zero != 0), torch.stack([zero, self.value, self.d0])

    def ended(self, z: Any) -> Point:
        """The best point, accepted where it is an improvement, unless the function falls without end."""
        return z.best._replace(accepted=z.best.accepted | ((z.best.value < self.value) & z.bracketed))


class _Interval(NamedTuple):
    best: Point
    lo: Tensor  # (alpha, phi, phi') at the end with the lower value
    hi: Tensor
    bracketed: Tensor
    trial: Tensor


@dataclasses.dataclass(frozen=True)
class Zoom:
    r"""Bracket, then interpolate by cubics, until the strong Wolfe conditions hold.

    .. math:: \phi(\alpha) \le \phi(0) + c_1 \alpha \phi'(0), \qquad |\phi'(\alpha)| \le -c_2 \phi'(0)

    Args:
        c1: Sufficient decrease.
        c2: Curvature; 0.9 for quasi-Newton directions, 0.1 for nonlinear conjugate gradients.
        max_steps: The most evaluations.

    Example:
        >>> from diffopt.solvers import Objective
        >>> x, one = torch.tensor([3.0]), torch.tensor(1.0)
        >>> Zoom(c2=0.1).search(Objective(lambda x: (x**2).sum()), x, x @ x, 2 * x, -2 * x, one).x
        tensor([0.])

    References:
        Nocedal and Wright (2006), Numerical Optimization, algorithms 3.5 and 3.6. Hager and Zhang (2005), eq. 4.1, for
        the approximate condition.
    """

    c1: float | Tensor = 1e-4
    c2: float | Tensor = 0.9
    max_steps: int = 30

    def search(self, objective, x: Tensor, value: Tensor, slope: Tensor, p: Tensor, start: Tensor) -> Point:
        """The point to go to from `x`, along `p`, trying the step `start` first."""
        line = _Line(objective, x, value, slope, p, slope @ p)

        def tried(step):
            point, d = line.at(step)
            flat = d.abs() <= -self.c2 * line.d0
            return point._replace(accepted=flat & line.lower(point, d, self.c1)), d

        def narrowed(z: _Interval, point: Point, d: Tensor) -> _Interval:
            here = line.end(point, point.step, d)
            # NaN is high; what rounding hides is left to the derivative
            slack = 10 * torch.finfo(d.dtype).eps * value.abs()
            high = ~(point.value <= value + self.c1 * point.step * line.d0 + slack)
            high = high | ((point.value > z.lo[1] + slack) & (z.lo[0] > 0))
            # beyond the minimum, or rising towards the other end: the interval turns round
            turned = ~high & torch.where(z.bracketed, d * (z.hi[0] - z.lo[0]) >= 0, d >= 0)
            hi = torch.where(high, here, torch.where(turned, z.lo, z.hi))
            lo = torch.where(high, z.lo, here)
            bracketed = z.bracketed | high | turned
            best = _better(point, z.best, ~high)
            trial = torch.where(bracketed, _interpolated(lo, hi), 2.5 * point.step)
            return _Interval(best, lo, hi, bracketed, trial)

        first, d = tried(start)
        if not torch.compiler.is_compiling() and not any_lane(~first.accepted):
            return first
        stay, origin = line.origin()
        begin = narrowed(_Interval(stay, origin, origin, stay.accepted, start), first, d)
        body = lambda z: narrowed(z, *tried(z.trial))  # noqa: E731
        return line.ended(_repeated(body, begin, self.max_steps - 1))


@dataclasses.dataclass(frozen=True)
class Backtracking:
    r"""Shorten the step by a factor until a condition holds; where it asks for longer ones, too, bisect.

    .. math:: \alpha \leftarrow \rho\,\alpha \quad\text{until}\quad
              \phi(\alpha) \le \phi(0) + c_1 \alpha \phi'(0)

    With "armijo" no step is longer than the first.

    Args:
        condition: "armijo", "goldstein", "wolfe" or "strong_wolfe".
        c1: Sufficient decrease, below 1/2.
        c2: Curvature, between `c1` and 1.
        decrease: :math:`\rho`, where in the interval the next trial lies.
        increase: The factor of a step that is too short, until one is too long.
        max_steps: The most evaluations.

    Raises:
        ValueError: If `condition` is not one of these.

    Example:
        >>> from diffopt.solvers import Objective
        >>> x, one = torch.tensor([3.0]), torch.tensor(1.0)
        >>> Backtracking().search(Objective(lambda x: (x**2).sum()), x, x @ x, 2 * x, -2 * x, one).step
        tensor(0.5000)

    References:
        Nocedal and Wright (2006), Numerical Optimization, algorithm 3.1 and eqs. 3.6, 3.7 and 3.11. Burke, Lewis and
        Overton (2005), for the bisection.
    """

    condition: Literal["armijo", "goldstein", "wolfe", "strong_wolfe"] = "armijo"
    c1: float | Tensor = 1e-4
    c2: float | Tensor = 0.9
    decrease: float | Tensor = 0.5
    increase: float | Tensor = 2.0
    max_steps: int = 40

    def __post_init__(self):
        if self.condition not in ("armijo", "goldstein", "wolfe", "strong_wolfe"):
            raise ValueError(f'condition must be armijo, goldstein, wolfe or strong_wolfe; got "{self.condition}"')

    def search(self, objective, x: Tensor, value: Tensor, slope: Tensor, p: Tensor, start: Tensor) -> Point:
        """The point to go to from `x`, along `p`, trying the step `start` first."""
        line = _Line(objective, x, value, slope, p, slope @ p)

        def narrowed(z: _Interval, point: Point, d: Tensor) -> _Interval:
            lower = line.lower(point, d, self.c1) & ~line.grows(point, d)
            long, short = ~lower, torch.zeros_like(lower)
            if self.condition == "goldstein":
                short = point.value < value + (1 - self.c1) * point.step * line.d0
            elif self.condition != "armijo":
                short = d < self.c2 * line.d0
            if self.condition == "strong_wolfe":
                long = long | (d > -self.c2 * line.d0)
            hi = torch.where(long, point.step, z.hi)
            lo = torch.where(short & ~long, point.step, z.lo)
            bracketed = z.bracketed | long
            best = _better(point._replace(accepted=~(long | short)), z.best, lower)
            trial = torch.where(bracketed, lo + self.decrease * (hi - lo), self.increase * point.step)
            return _Interval(best, lo, hi, bracketed, trial)

        stay, _ = line.origin()
        begin = _Interval(stay, stay.step, start, stay.accepted, start)
        body = lambda z: narrowed(z, *line.at(z.trial))  # noqa: E731
        return line.ended(_repeated(body, begin, self.max_steps))


class _Secants(NamedTuple):
    best: Point
    a: Tensor  # (alpha, phi, phi') at the end where the function still falls
    b: Tensor
    bracketed: Tensor
    trial: Tensor
    left: Tensor  # the secant steps that are left before the width is checked
    width: Tensor


@dataclasses.dataclass(frozen=True)
class HagerZhang:
    r"""Bracket, then take double secant steps, until the Wolfe conditions hold, exactly or approximately.

    .. math:: c = \frac{a\,\phi'(b) - b\,\phi'(a)}{\phi'(b) - \phi'(a)}, \qquad
              (2 c_1 - 1)\,\phi'(0) \ge \phi'(\alpha) \ge c_2\,\phi'(0), \quad
              \phi(\alpha) \le \phi(0) + \epsilon\,|\phi(0)|

    The approximate condition lets the function increase by rounding, so that minimizers are found to the full accuracy
    of the gradient.

    Args:
        c1: Sufficient decrease, below 1/2.
        c2: Curvature, between `c1` and 1.
        epsilon: The relative increase of the value that is allowed; None is :math:`10\,\varepsilon` of the dtype.
        shrink: The interval is bisected where two secant steps do not shorten it by this factor.
        increase: The factor of a step that is too short.
        max_steps: The most evaluations.

    Example:
        >>> from diffopt.solvers import Objective
        >>> x, one = torch.tensor([3.0]), torch.tensor(1.0)
        >>> HagerZhang(c2=0.1).search(Objective(lambda x: (x**2).sum()), x, x @ x, 2 * x, -2 * x, one).step
        tensor(0.5000)

    References:
        Hager and Zhang (2005), A new conjugate gradient method with guaranteed descent and an efficient line search,
        section 4.
    """

    c1: float | Tensor = 0.1
    c2: float | Tensor = 0.9
    epsilon: float | None = None
    shrink: float = 0.66
    increase: float = 5.0
    max_steps: int = 40

    def search(self, objective, x: Tensor, value: Tensor, slope: Tensor, p: Tensor, start: Tensor) -> Point:
        """The point to go to from `x`, along `p`, trying the step `start` first."""
        line = _Line(objective, x, value, slope, p, slope @ p)
        epsilon = 10 * torch.finfo(x.dtype).eps if self.epsilon is None else self.epsilon
        ceiling = value + epsilon * value.abs()

        def tried(step):
            point, d = line.at(step)
            exact = point.value <= value + self.c1 * step * line.d0
            close = (point.value <= ceiling) & (d <= (2 * self.c1 - 1) * line.d0)
            accepted = (exact | close) & (d >= self.c2 * line.d0) & ~line.grows(point, d)
            return point._replace(accepted=accepted), d

        def narrowed(z: _Secants, point: Point, d: Tensor) -> _Secants:
            here, low = line.end(point, point.step, d), point.value <= ceiling
            falls = low & (d < 0)
            a, b = torch.where(falls, here, z.a), torch.where(falls, z.b, here)
            bracketed = z.bracketed | ~falls
            trial, left, width = self._next(z, a, b, here, torch.where(falls, z.a, z.b))
            trial = torch.where(bracketed, trial, self.increase * point.step)
            left, width = torch.where(bracketed, left, 0), torch.where(bracketed, width, math.inf)
            return _Secants(_better(point, z.best, low), a, b, bracketed, trial, left, width)

        first, d = tried(start)
        if not torch.compiler.is_compiling() and not any_lane(~first.accepted):
            return first
        stay, origin = line.origin()
        none = torch.zeros_like(start)
        begin = _Secants(stay, origin, origin, stay.accepted, start, none, none + math.inf)
        begin = narrowed(begin, first, d)
        body = lambda z: narrowed(z, *tried(z.trial))  # noqa: E731
        return line.ended(_repeated(body, begin, self.max_steps - 1))

    def _next(self, z: _Secants, a: Tensor, b: Tensor, here: Tensor, replaced: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next trial within the interval, the secant steps then left, and the width to be shortened."""
        width, middle = b[0] - a[0], (a[0] + b[0]) / 2
        again = _secant(replaced, here)  # the second of two, on the side that moved
        second = (z.left == 1) & (again > a[0]) & (again < b[0])
        first = _secant(a, b)
        sound = (first > a[0]) & (first < b[0])
        halve = ~(b[2] >= 0) | (~second & ((width > self.shrink * z.width) | ~sound))
        trial = torch.where(halve, middle, torch.where(second, again, first))
        begun = ~halve & ~second
        zero = torch.zeros_like(z.left)
        return (
            trial,
            torch.where(begun, zero + 1, zero),
            torch.where(begun, width, torch.where(halve, math.inf, z.width)),
        )


def _repeated(body: Any, begin: Any, max_steps: int) -> Any:
    """Narrow an interval until its best point is accepted."""
    return while_loop(lambda z: ~z.best.accepted, body, begin, max_steps=max(max_steps, 0))


def _better(point: Point, best: Point, allowed: Tensor) -> Point:
    """The point where it is accepted, or allowed and lower than the best; else the best."""
    better = point.accepted | (allowed & (point.value < best.value))
    return Point(*(torch.where(better, a, b) for a, b in zip(point, best, strict=True)))


def _secant(a: Tensor, b: Tensor) -> Tensor:
    """Where the derivative vanishes, if it is linear; NaN where it is constant."""
    rise = b[2] - a[2]
    level = rise == 0
    step = (a[0] * b[2] - b[0] * a[2]) / torch.where(level, torch.ones_like(rise), rise)
    return torch.where(level, math.nan, step)


def _interpolated(lo: Tensor, hi: Tensor) -> Tensor:
    """The minimum of the cubic through both ends, kept away from them; the middle where there is none."""
    a, fa, da = lo.unbind()
    b, fb, db = hi.unbind()
    width = b - a
    safe = torch.where(width == 0, torch.ones_like(width), width)
    d1 = da + db - 3 * (fb - fa) / safe
    square = d1 * d1 - da * db
    root = torch.where(square > 0, square, torch.ones_like(square)).sqrt() * width.sign()
    bottom = db - da + 2 * root
    cubic = b - width * (db + root - d1) / torch.where(bottom == 0, torch.ones_like(bottom), bottom)
    fraction = (cubic - a) / safe
    sound = (square > 0) & (bottom != 0) & fraction.isfinite()
    return a + width * torch.where(sound, fraction, torch.full_like(fraction, 0.5)).clamp(0.1, 0.9)
