r"""Least squares by Golub-Kahan bidiagonalization, known by products alone: `LSMR`."""

import dataclasses
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.linalg.operators import Bound, Tag
from diffopt.linalg.protocol import Status
from diffopt.linalg.stopping import CAUSES, check_options, counter, most_steps, nonzero, norm, residual_of, scaled

__all__ = ["LSMR"]


@dataclasses.dataclass(frozen=True)
class LSMR:
    r"""The least-squares solution of least norm, of square or rectangular systems of any rank, in a few vectors.

    .. math:: x_k = \arg\min_{x \in K_k(A^\top A, A^\top b)} \|A^\top (b - A x)\|

    Each step takes one product with :math:`A` and one with :math:`A^\top`. Equivalent to `NormalCG` in exact
    arithmetic but for what it minimizes, and steadier where :math:`A` is ill-conditioned.

    Args:
        rtol: stop at :math:`\|r\| \le \text{rtol}\,\|b\|`, or (in `lstsq`) where
            :math:`\|A^\top r\| \le \text{rtol}\,\|A\|_F \|r\|`; None is :math:`\varepsilon^{2/3}` of the dtype.
        atol: stop at :math:`\|r\| \le \text{atol}`, too.
        max_steps: the most steps; None is `max(50, 10 max(m, n))`.

    Raises:
        ValueError: if a tolerance is negative, or `max_steps` is not a positive int.

    Example:
        >>> from diffopt.linalg import lstsq
        >>> lstsq(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 3.0, 5.0]), LSMR())
        tensor([1.0000, 2.0000])

    References:
        Fong and Saunders (2011), LSMR: an iterative algorithm for sparse least-squares problems, section 2.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None

    causes: ClassVar[str] = CAUSES
    full_rank: ClassVar[bool] = False

    def __post_init__(self):
        check_options(self)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b` from the initial guess `x`, and how the solve ended."""
        found, steps, r, limit, _ = self._iterated(bound, b, x)
        return found, Status(norm(r) <= 10 * limit, steps)

    def least_squares(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The least-squares solution (of least norm if there is no initial guess), and how the solve ended."""
        found, steps, r, limit, normal_limit = self._iterated(bound, b, x)
        normal = bound.rmatvec(r)
        small = (norm(normal) <= normal_limit) & ((norm(normal) > 0) | (normal == 0).all())  # no underflow
        return found, Status((norm(r) <= 10 * limit) | small, steps)

    def transposed(self) -> "LSMR":
        """The solver for the transposed system: itself."""
        return self

    def _iterated(self, bound: Bound, b: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`(solution, steps, residual, its limit, the limit of its product)`, the last three of the scaled system."""
        b, x, limit, scale = scaled(self, b, x)
        rtol = torch.finfo(b.dtype).eps ** (2 / 3) if self.rtol is None else self.rtol
        start = _start(bound, residual_of(bound, b, x), x)

        def live(state):
            return (norm(state.r) > limit) & (state.normal.abs() > rtol * state.size.sqrt() * norm(state.r))

        size = max(b.numel(), start.x.numel())
        state = while_loop(live, lambda s: _step(bound, s), start, max_steps=most_steps(self, size))
        r = b - bound.matvec(state.x)
        # rounding leaves this much in the normal residual, however many steps are taken
        whole, eps = state.size.sqrt(), torch.finfo(b.dtype).eps
        floor = eps * whole * (whole * norm(state.x) + norm(b))
        return scale * state.x, state.steps, r, limit, 10 * (rtol * whole * norm(r) + floor)


class _State(NamedTuple):
    """The paper's quantities; `h` and `h_bar` with their products, `normal` is the (signed) size of `A^T r`."""

    x: Tensor
    r: Tensor
    u: Tensor
    v: Tensor
    h: Tensor
    h_bar: Tensor
    Ah: Tensor
    Ah_bar: Tensor
    alpha: Tensor
    alpha_bar: Tensor
    normal: Tensor
    ratio: Tensor  # theta_k / rho_{k-1}
    lengths: Tensor  # rho_{k-1} rho_bar_{k-1}
    c_bar: Tensor
    s_bar: Tensor
    size: Tensor  # the squared Frobenius norm of the bidiagonal matrix so far
    steps: Tensor


def _start(bound: Bound, r: Tensor, x: Tensor | None) -> _State:
    beta = norm(r)
    u = r / nonzero(beta)
    v = bound.rmatvec(u)
    alpha = norm(v)
    v = v / nonzero(alpha)
    x = torch.zeros_like(v) if x is None else x
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    still, flat = torch.zeros_like(v), torch.zeros_like(r)
    return _State(
        x, r, u, v, still, still, flat, flat, alpha, alpha, alpha * beta, zero, one, one, zero, alpha**2, counter(r)
    )


def _step(bound: Bound, s: _State) -> _State:
    """One step of the bidiagonalization, and of both rotations of its triangular factors."""
    Av = bound.matvec(s.v)
    h, Ah = s.v - s.ratio * s.h, Av - s.ratio * s.Ah
    u = Av - s.alpha * s.u
    beta = norm(u)
    u = u / nonzero(beta)
    v = bound.rmatvec(u) - beta * s.v
    alpha = norm(v)
    v = v / nonzero(alpha)

    rho = (s.alpha_bar**2 + beta**2).sqrt()
    theta, alpha_bar = beta / nonzero(rho) * alpha, s.alpha_bar / nonzero(rho) * alpha
    theta_bar, turned = s.s_bar * rho, s.c_bar * rho
    rho_bar = (turned**2 + theta**2).sqrt()
    c_bar, s_bar = turned / nonzero(rho_bar), theta / nonzero(rho_bar)
    zeta, lengths = c_bar * s.normal, nonzero(rho * rho_bar)

    back = theta_bar * rho / s.lengths
    h_bar, Ah_bar = h - back * s.h_bar, Ah - back * s.Ah_bar
    step = zeta / lengths
    size = s.size + alpha**2 + beta**2
    return _State(
        s.x + step * h_bar, s.r - step * Ah_bar, u, v, h, h_bar, Ah, Ah_bar, alpha, alpha_bar, -s_bar * s.normal,
        theta / nonzero(rho), lengths, c_bar, s_bar, size, s.steps + 1,
    )  # fmt: skip
