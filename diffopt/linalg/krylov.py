r"""Krylov methods of short recurrences for :math:`A x = b`, known by products alone: `CG`, `NormalCG`, `BiCGStab`.

Each keeps a few vectors, whatever the number of steps.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.linalg.operators import Bound, LinearOperator, Tag
from diffopt.linalg.preconditioners import Preconditioner, flattened, product_of, transposed_of
from diffopt.linalg.protocol import Status
from diffopt.linalg.stopping import (
    CAUSES,
    check_options,
    counter,
    dot,
    most_steps,
    nonzero,
    norm,
    residual_of,
    scaled,
    solved,
)

__all__ = ["CG", "BiCGStab", "NormalCG"]


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

    Raises:
        ValueError: if a tolerance is negative, or a number of steps is not a positive int; when used, if the
            operator is not tagged symmetric.
        TypeError: if `damping` is not a number or a 0-d tensor.

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
    preconditioner: Preconditioner | None = None

    causes: ClassVar[str] = CAUSES

    def __post_init__(self):
        check_options(self)

    def prepare(self, operator: LinearOperator) -> tuple[LinearOperator, "CG"]:
        """Refuse an operator that is not tagged symmetric, and add the damping to it."""
        if not operator.symmetric:
            raise ValueError(
                "CG needs a symmetric positive definite operator: tag it, as in matrix_operator(A, "
                'tags=["positive_definite"]), or use GMRES or NormalCG'
            )
        solver = flattened(self, operator)
        if not isinstance(self.damping, Tensor) and self.damping == 0:
            return operator, solver
        return operator.shifted(self.damping), dataclasses.replace(solver, damping=0.0)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b` from the initial guess `x`, and how the solve ended."""
        precondition = product_of(self)

        def lift(r):
            z = precondition(r)
            return z, dot(r, z)

        return _conjugate_gradients(self, bound, b, x, lift, dot)

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

    Raises:
        ValueError: if a tolerance is negative, or a number of steps is not a positive int.

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

    causes: ClassVar[str] = CAUSES

    def __post_init__(self):
        check_options(self)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b` from the initial guess `x`, and how the solve ended."""

        def lift(r):
            s = bound.rmatvec(r)
            return s, dot(s, s)

        return _conjugate_gradients(self, bound, b, x, lift, lambda p, q: dot(q, q))

    def transposed(self) -> "NormalCG":
        """The solver for the transposed system: itself."""
        return self


class _State(NamedTuple):
    x: Tensor
    r: Tensor
    p: Tensor
    rz: Tensor
    sound: Tensor
    steps: Tensor


def _conjugate_gradients(
    solver: CG | NormalCG,
    bound: Bound,
    b: Tensor,
    x: Tensor | None,
    lift: Callable[[Tensor], tuple[Tensor, Tensor]],
    curvature: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Status]:
    """The common loop; `lift` takes a residual to its direction and squared length, `curvature` is that of a step."""
    b, x, limit, scale = scaled(solver, b, x)
    r = residual_of(bound, b, x)
    z, rz = lift(r)
    x = torch.zeros_like(z) if x is None else x
    state = _State(x, r, z, rz, torch.ones_like(limit, dtype=torch.bool), counter(b))

    def live(state):
        return (norm(state.r) > limit) & state.sound

    def body(state):
        q = bound.matvec(state.p)
        bend = curvature(state.p, q)
        sound = bend > 0
        alpha = state.rz / torch.where(sound, bend, 1.0)
        x = torch.where(sound, state.x + alpha * state.p, state.x)
        r = torch.where(sound, state.r - alpha * q, state.r)
        z, rz = lift(r)
        p = z + rz / torch.where(state.rz > 0, state.rz, 1.0) * state.p
        return _State(x, r, p, rz, sound, state.steps + 1)

    state = while_loop(live, body, state, max_steps=most_steps(solver, b.numel()))
    return scale * state.x, Status(solved(bound, b, state.x, limit), state.steps)


@dataclasses.dataclass(frozen=True)
class BiCGStab:
    r"""Stabilized biconjugate gradients, for operators without structure, in the memory of eight vectors.

    .. math:: s = r - \alpha A M p, \quad \omega = \frac{t^\top s}{t^\top t}, \quad t = A M s, \quad
              x \leftarrow x + \alpha M p + \omega M s

    Two products a step, none transposed. Where it breaks down, it starts over with another shadow residual; where that
    breaks down, too, it fails. `GMRES` does neither.

    Args:
        rtol: stop at :math:`\|r\| \le \text{rtol}\,\|b\|`; None is :math:`\varepsilon^{2/3}` of the dtype.
        atol: stop at :math:`\|r\| \le \text{atol}`, too.
        max_steps: the most steps; None is `max(50, 10 n)`.
        preconditioner: an approximation of :math:`A^{-1}` applied from the right, as an operator or a function of the
            vector (a tree like `b`). It carries no gradient.

    Raises:
        ValueError: if a tolerance is negative, or a number of steps is not a positive int.

    Example:
        >>> from diffopt.linalg import linear_solve
        >>> linear_solve(torch.tensor([[2.0, 1.0], [-1.0, 2.0]]), torch.tensor([3.0, 1.0]), BiCGStab())
        tensor([1.0000, 1.0000])

    References:
        van der Vorst (1992), Bi-CGSTAB, section 3.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None
    preconditioner: Preconditioner | None = None

    causes: ClassVar[str] = f"the method broke down (GMRES does not); {CAUSES}"

    def __post_init__(self):
        check_options(self)

    def prepare(self, operator: LinearOperator) -> tuple[LinearOperator, "BiCGStab"]:
        """Take the preconditioner as a function of flat vectors."""
        return operator, flattened(self, operator)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b` from the initial guess `x`, and how the solve ended."""
        b, x, limit, scale = scaled(self, b, x)
        precondition = product_of(self)
        r = residual_of(bound, b, x)
        x = torch.zeros_like(b) if x is None else x
        sound = torch.ones_like(limit, dtype=torch.bool)
        state = _BiState(x, r, r, r, dot(r, r), ~sound, sound, counter(b))

        def live(state):
            return (norm(state.r) > limit) & state.sound

        def body(state):
            return _bicgstab_step(lambda v: bound.matvec(precondition(v)), precondition, state, limit)

        state = while_loop(live, body, state, max_steps=most_steps(self, b.numel()))
        return scale * state.x, Status(solved(bound, b, state.x, limit), state.steps)

    def transposed(self) -> "BiCGStab":
        """The solver for the transposed system, with the preconditioner transposed where it can be."""
        return transposed_of(self)


class _BiState(NamedTuple):
    x: Tensor
    r: Tensor
    shadow: Tensor
    p: Tensor
    rho: Tensor
    broken: Tensor
    sound: Tensor
    steps: Tensor


def _bicgstab_step(product, precondition, old: _BiState, limit: Tensor) -> _BiState:
    """One step; where it breaks down it turns the shadow residual instead, and is not sound twice in a row."""
    tiny = torch.finfo(limit.dtype).eps
    v = product(old.p)
    slope = dot(old.shadow, v)
    broken = slope.abs() <= tiny * norm(old.shadow) * norm(v)
    alpha = old.rho / torch.where(broken, 1.0, slope)
    s = old.r - alpha * v
    t = product(s)
    omega = torch.where(norm(s) > limit, dot(t, s) / nonzero(dot(t, t)), torch.zeros_like(alpha))
    x = old.x + precondition(alpha * old.p + omega * s)
    r = s - omega * t
    rho = dot(old.shadow, r)
    beta = rho / nonzero(old.rho) * alpha / nonzero(omega)
    lost = (rho.abs() <= tiny * norm(old.shadow) * norm(r)) | (omega == 0)  # then start over from this residual
    shadow = torch.where(lost, r, old.shadow)
    p = torch.where(lost, r, r + beta * (old.p - omega * v))
    rho = torch.where(lost, dot(r, r), rho)

    turned = old.r / nonzero(norm(old.r)) + v / nonzero(norm(v))
    kept = (old.x, old.r, turned, old.r, dot(turned, old.r))
    sound = ~(broken & old.broken) & (broken | norm(r).isfinite())
    x, r, shadow, p, rho = (torch.where(broken, k, n) for k, n in zip(kept, (x, r, shadow, p, rho), strict=True))
    return _BiState(x, r, shadow, p, rho, broken, sound, old.steps + 1)
