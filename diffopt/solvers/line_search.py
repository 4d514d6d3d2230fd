r"""Line searches: how far to go along a direction of descent.

.. math:: \phi(\alpha) = f(x + \alpha p), \qquad \phi'(0) < 0

A search is a value with one method, `search(objective, here, p, start)`. What it accepts:

- Armijo: :math:`\phi(\alpha) \le \phi(0) + c_1 \alpha \phi'(0)`;
- Wolfe: and :math:`\phi'(\alpha) \ge c_2 \phi'(0)`; strong: :math:`|\phi'(\alpha)| \le -c_2 \phi'(0)`;
- Goldstein: and :math:`\phi(\alpha) \ge \phi(0) + (1 - c_1) \alpha \phi'(0)`;
- approximately, where rounding hides the decrease: :math:`\phi(\alpha) \le \phi(0) + \epsilon |\phi(0)|` and
  :math:`\phi'(\alpha) \le (2 c_1 - 1) \phi'(0)`.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from diffopt.autodiff import any_lane, while_loop

__all__ = ["LineSearch", "Point", "Zoom"]


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


class _Zoom(NamedTuple):
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

    References:
        Nocedal and Wright (2006), Numerical Optimization, algorithms 3.5 and 3.6. Hager and Zhang (2005), eq. 4.1, for
        the approximate condition.
    """

    c1: float = 1e-4
    c2: float = 0.9
    max_steps: int = 30

    def search(self, objective, x: Tensor, value: Tensor, slope: Tensor, p: Tensor, start: Tensor) -> Point:
        """The point to go to from `x`, along `p`, trying the step `start` first."""
        d0 = slope @ p

        def at(step):
            new = x + step * p
            f, g = objective.value_and_grad(new)
            return new, f, g, g @ p

        def accepted(step, f, d):
            exact = f <= value + self.c1 * step * d0
            rounding = 10 * torch.finfo(f.dtype).eps * value.abs()
            close = (f <= value + rounding) & (d <= (2 * self.c1 - 1) * d0)
            return (exact | close) & (d.abs() <= -self.c2 * d0)

        new, f, g, d = at(start)
        first = Point(new, f, g, start, accepted(start, f, d))
        if not torch.compiler.is_compiling() and not any_lane(~first.accepted):
            return first
        origin = torch.stack([torch.zeros_like(start), value, d0])
        begin = _Zoom(Point(x, value, slope, torch.zeros_like(start), torch.zeros_like(first.accepted)),
                      origin, origin, torch.zeros_like(first.accepted), start)  # fmt: skip

        def body(z):
            new, f, g, d = at(z.trial)
            here = torch.stack([z.trial, f, d])
            done = accepted(z.trial, f, d)
            high = ~(f <= value + self.c1 * z.trial * d0) | ((f >= z.lo[1]) & (z.lo[0] > 0))  # NaN is high
            # beyond the minimum, or rising towards the other end: the interval turns round
            turned = ~high & torch.where(z.bracketed, d * (z.hi[0] - z.lo[0]) >= 0, d >= 0)
            hi = torch.where(high, here, torch.where(turned, z.lo, z.hi))
            lo = torch.where(high, z.lo, here)
            bracketed = z.bracketed | high | turned
            better = done | (~high & (f < z.best.value))
            best = Point(*(torch.where(better, a, b) for a, b in zip((new, f, g, z.trial, done), z.best, strict=True)))
            trial = torch.where(bracketed, _interpolated(lo, hi), 2.5 * z.trial)
            return _Zoom(best, lo, hi, bracketed, trial)

        end = while_loop(lambda z: ~z.best.accepted, body, begin, max_steps=self.max_steps).best
        return end._replace(accepted=end.accepted | (end.value < value))


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
