r"""Krylov methods for :math:`A x = b`, known by products alone: `CG`, `NormalCG` and `GMRES`.

A linear solver is a value: a frozen dataclass whose `solve(bound, b, x, tags)` returns the solution and whether it
converged, on flat vectors, under any `vmap`, each lane stopping on its own.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import any_lane, while_loop
from diffopt.linalg.operators import Bound, LinearOperator, Tag

__all__ = ["CG", "GMRES", "NormalCG"]


class _State(NamedTuple):
    x: Tensor
    r: Tensor
    p: Tensor
    rz: Tensor
    sound: Tensor


@dataclasses.dataclass(frozen=True)
class CG:
    r"""Conjugate gradients, for symmetric positive definite operators.

    .. math:: \alpha_k = \frac{r_k^\top z_k}{p_k^\top A p_k}, \quad x_{k+1} = x_k + \alpha_k p_k, \quad z = M r

    Args:
        rtol: stop at :math:`\|r\| \le \text{rtol}\,\|b\|`; None is :math:`\varepsilon^{2/3}` of the dtype (2.4e-5 in
            float32, 3.7e-11 in float64).
        atol: stop at :math:`\|r\| \le \text{atol}`, too.
        max_steps: the most products; None is `max(50, 10 n)`.
        damping: solve :math:`(A + \lambda I) x = b` instead; a tensor carries gradient.
        preconditioner: an approximation of :math:`A^{-1}`, symmetric positive definite, as an operator or a function
            of the vector (a tree like `b`). It carries no gradient: the solution does not depend on it.

    Example:
        >>> from diffopt.linalg import linear_solve, matrix_operator
        >>> A = matrix_operator(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), tags=["positive_definite"])
        >>> linear_solve(A, torch.tensor([1.0, 2.0]), CG())
        tensor([0.0909, 0.6364])

    References:
        Hestenes and Stiefel (1952), Methods of conjugate gradients, eq. 3:1.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None
    damping: float | Tensor = 0.0
    preconditioner: LinearOperator | Callable | None = None

    def __post_init__(self):
        _check_options(self)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Tensor]:
        """The solution of `bound x = b` from the initial guess `x`, and whether it converged."""
        b, x, limit, scale = _scaled(self, b, x)
        precondition = _precondition(self)
        r = b if x is None else b - bound.matvec(x)
        z = precondition(r)
        state = _State(
            torch.zeros_like(b) if x is None else x, r, z, _dot(r, z), torch.ones_like(limit, dtype=torch.bool)
        )

        def live(state):
            return (_norm(state.r) > limit) & state.sound

        def body(state):
            Ap = bound.matvec(state.p)
            curvature = _dot(state.p, Ap)
            sound = curvature > 0
            alpha = state.rz / torch.where(sound, curvature, 1.0)
            x = torch.where(sound, state.x + alpha * state.p, state.x)
            r = torch.where(sound, state.r - alpha * Ap, state.r)
            z = precondition(r)
            rz = _dot(r, z)
            p = z + rz / torch.where(state.rz > 0, state.rz, 1.0) * state.p
            return _State(x, r, p, rz, sound)

        state = while_loop(live, body, state, max_steps=_max_steps(self, b))
        return scale * state.x, _solved(bound, b, state.x, limit)

    def transposed(self) -> "CG":
        """The solver for the transposed system: itself."""
        return self


@dataclasses.dataclass(frozen=True)
class NormalCG:
    r"""Conjugate gradients on the normal equations, for operators without structure.

    .. math:: A^\top A x = A^\top b

    The condition number is squared and each step takes two products: `GMRES` is better where memory for its basis is,
    and `CG` wherever the operator is symmetric positive definite.

    Args:
        rtol: stop at :math:`\|r\| \le \text{rtol}\,\|b\|`; None is :math:`\varepsilon^{2/3}` of the dtype.
        atol: stop at :math:`\|r\| \le \text{atol}`, too.
        max_steps: the most steps; None is `max(50, 10 n)`.

    Example:
        >>> from diffopt.linalg import linear_solve, matrix_operator
        >>> linear_solve(matrix_operator(torch.tensor([[0.0, 2.0], [-1.0, 0.0]])), torch.ones(2), NormalCG())
        tensor([-1.0000,  0.5000])

    References:
        Hestenes and Stiefel (1952), section 10 (CGNR).
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None

    def __post_init__(self):
        _check_options(self)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Tensor]:
        """The solution of `bound x = b` from the initial guess `x`, and whether it converged."""
        b, x, limit, scale = _scaled(self, b, x)
        r = b if x is None else b - bound.matvec(x)
        s = bound.rmatvec(r)
        state = _State(
            torch.zeros_like(s) if x is None else x, r, s, _dot(s, s), torch.ones_like(limit, dtype=torch.bool)
        )

        def live(state):
            return (_norm(state.r) > limit) & state.sound

        def body(state):
            q = bound.matvec(state.p)
            qq = _dot(q, q)
            sound = qq > 0
            alpha = state.rz / torch.where(sound, qq, 1.0)
            r = state.r - alpha * q
            s = bound.rmatvec(r)
            ss = _dot(s, s)
            p = s + ss / torch.where(state.rz > 0, state.rz, 1.0) * state.p
            return _State(state.x + alpha * state.p, r, p, ss, sound)

        state = while_loop(live, body, state, max_steps=_max_steps(self, b))
        return scale * state.x, _solved(bound, b, state.x, limit)

    def transposed(self) -> "NormalCG":
        """The solver for the transposed system: itself."""
        return self


@dataclasses.dataclass(frozen=True)
class GMRES:
    r"""Generalized minimal residuals, restarted, for operators without structure.

    .. math:: x_k = x_0 + \arg\min_{v \in K_k(A, r_0)} \|r_0 - A v\|

    Args:
        rtol: stop at :math:`\|r\| \le \text{rtol}\,\|b\|`; None is :math:`\varepsilon^{2/3}` of the dtype.
        atol: stop at :math:`\|r\| \le \text{atol}`, too.
        restart: the size of the basis, which is also its memory in vectors.
        max_restarts: the most times the basis is built; None is `max(10, 10 n / restart)`.
        preconditioner: an approximation of :math:`A^{-1}` applied from the right, as an operator or a function of the
            vector (a tree like `b`). It carries no gradient.

    Example:
        >>> from diffopt.linalg import linear_solve, matrix_operator
        >>> linear_solve(matrix_operator(torch.tensor([[0.0, 2.0], [-1.0, 0.0]])), torch.ones(2), GMRES())
        tensor([-1.0000,  0.5000])

    References:
        Saad and Schultz (1986), GMRES, algorithm 4.
    """

    rtol: float | None = None
    atol: float = 0.0
    restart: int = 32
    max_restarts: int | None = None
    preconditioner: LinearOperator | Callable | None = None

    def __post_init__(self):
        _check_options(self)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Tensor]:
        """The solution of `bound x = b` from the initial guess `x`, and whether it converged."""
        b, x, limit, scale = _scaled(self, b, x)
        size = min(self.restart, b.numel())
        restarts = max(10, 10 * b.numel() // self.restart) if self.max_restarts is None else self.max_restarts
        precondition = _precondition(self)

        def live(carry):
            return _norm(carry[1]) > limit

        def cycle(carry):
            x, r = carry
            step = precondition(_arnoldi_step(lambda v: bound.matvec(precondition(v)), r, size, limit))
            x = x + step
            return x, b - bound.matvec(x)

        start = (torch.zeros_like(b), b) if x is None else (x, b - bound.matvec(x))
        solution, r = while_loop(live, cycle, start, max_steps=restarts)
        return scale * solution, _norm(r) <= limit

    def transposed(self) -> "GMRES":
        """The solver for the transposed system, with the preconditioner transposed where it can be."""
        transpose = getattr(self.preconditioner, "transpose", lambda: None)
        return dataclasses.replace(self, preconditioner=transpose())


def _precondition(solver) -> Callable[[Tensor], Tensor]:
    return (lambda r: r) if solver.preconditioner is None else solver.preconditioner


def _arnoldi_step(product, r: Tensor, size: int, limit: Tensor) -> Tensor:
    """The minimizer of the residual over one Krylov basis of at most `size` vectors."""
    beta = _norm(r)
    basis = [r / _nonzero(beta)]
    columns = []
    # q spans the left null space of the Hessenberg matrix: the residual is beta |q_0| / |q|
    q = [torch.ones_like(beta)]
    tiny = torch.finfo(r.dtype).eps
    for k in range(size):
        w = product(basis[k])
        scale = _norm(w)
        V = torch.stack(basis)
        h = V @ w
        w = w - h @ V
        again = V @ w  # a second pass keeps the basis orthogonal to working precision
        w, h = w - again @ V, h + again
        height = _norm(w)
        height = torch.where(height > tiny * scale, height, torch.zeros_like(height))
        columns.append(torch.cat([h, height[None]]))
        basis.append(torch.where(height > 0, w / _nonzero(height), torch.zeros_like(w)))
        q.append(-(torch.stack(q) * h).sum() / _nonzero(height))
        residual = beta / _norm(torch.stack(q))
        if not any_lane((residual > limit) & (height > 0)):
            break
    rows = len(columns) + 1
    H = torch.stack([torch.cat([c, c.new_zeros(rows - c.numel())]) for c in columns], dim=1)
    y = torch.linalg.pinv(H.nan_to_num())[:, 0] * beta  # a lane of NaN must not stop the others
    return y @ torch.stack(basis[: len(columns)])


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)


def _solved(bound: Bound, b: Tensor, x: Tensor, limit: Tensor) -> Tensor:
    """Whether the true residual is small; the recursive one may have drifted below it, by rounding a little."""
    return _norm(b - bound.matvec(x)) <= 10 * limit


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def _norm(a: Tensor) -> Tensor:
    return (a * a).sum().sqrt()


def _scaled(solver, b: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The system with a right side of magnitude 1, so that no square over- or underflows: `(b, x, limit, scale)`."""
    scale = b.abs().amax()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    b = b / scale
    rtol = torch.finfo(b.dtype).eps ** (2 / 3) if solver.rtol is None else solver.rtol
    limit = torch.maximum(rtol * _norm(b), solver.atol / scale).clamp(min=torch.finfo(b.dtype).tiny)
    return b, None if x is None else x / scale, limit, scale


def _max_steps(solver, b: Tensor) -> int:
    return max(50, 10 * b.numel()) if solver.max_steps is None else solver.max_steps


def _check_options(solver) -> None:
    for name in ("rtol", "atol"):
        value = getattr(solver, name)
        if value is not None and not (isinstance(value, (int, float)) and value >= 0):
            raise ValueError(f"{name} must be a non-negative number; got {value!r}")
    damping = getattr(solver, "damping", 0.0)
    if not isinstance(damping, (int, float, Tensor)):
        raise TypeError(f"damping must be a number or a 0-d tensor; got {type(damping).__name__}")
    for name in ("max_steps", "restart", "max_restarts"):
        value = getattr(solver, name, None)
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name} must be a positive int; got {value!r}")
