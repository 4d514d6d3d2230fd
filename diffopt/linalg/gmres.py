r"""Generalized minimal residuals for :math:`A x = b`, known by products alone: `GMRES`."""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from diffopt.autodiff import any_lane, while_loop
from diffopt.linalg.operators import Bound, LinearOperator, Product, Tag
from diffopt.linalg.preconditioners import Preconditioner, flattened, product_of, transposed_of
from diffopt.linalg.protocol import Status, check_precision
from diffopt.linalg.stopping import CAUSES, check_options, counter, nonzero, norm, residual_of, scaled

__all__ = ["GMRES"]


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

    Raises:
        ValueError: if a tolerance is negative, or `restart` or `max_restarts` is not a positive int.

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
    preconditioner: Preconditioner | None = None

    causes: ClassVar[str] = CAUSES

    def __post_init__(self):
        check_options(self)

    def prepare(self, operator: LinearOperator) -> tuple[LinearOperator, "GMRES"]:
        """Take the preconditioner as a function of flat vectors."""
        return operator, flattened(self, operator)

    def solve(self, bound: Bound, b: Tensor, x: Tensor | None, tags: frozenset[Tag]) -> tuple[Tensor, Status]:
        """The solution of `bound x = b` from the initial guess `x`, and how the solve ended."""
        check_precision(b.dtype, "GMRES")
        b, x, limit, scale = scaled(self, b, x)
        size = min(self.restart, b.numel())
        restarts = max(10, 10 * b.numel() // self.restart) if self.max_restarts is None else self.max_restarts
        precondition = product_of(self)

        def live(carry):
            return norm(carry[1]) > limit

        def cycle(carry):
            x, r, steps = carry
            step, taken = _arnoldi_step(lambda v: bound.matvec(precondition(v)), r, size, limit)
            x = x + precondition(step)
            return x, b - bound.matvec(x), steps + taken

        r = residual_of(bound, b, x)
        start = (torch.zeros_like(b) if x is None else x, r, counter(b))
        solution, r, steps = while_loop(live, cycle, start, max_steps=restarts)
        return scale * solution, Status(norm(r) <= limit, steps)

    def transposed(self) -> "GMRES":
        """The solver for the transposed system, with the preconditioner transposed where it can be."""
        return transposed_of(self)


def _arnoldi_step(product: Product, r: Tensor, size: int, limit: Tensor) -> tuple[Tensor, Tensor]:
    """The minimizer of the residual over one Krylov basis of at most `size` vectors, and how many it needed."""
    beta = norm(r)
    basis = [r / nonzero(beta)]
    columns = []
    # q spans the left null space of the Hessenberg matrix: the residual is beta |q_0| / |q|
    q = [torch.ones_like(beta)]
    tiny = torch.finfo(r.dtype).eps
    taken, going = counter(r), torch.ones_like(beta, dtype=torch.bool)
    for k in range(size):
        taken = taken + going
        w = product(basis[k])
        scale = norm(w)
        V = torch.stack(basis)
        h = V @ w
        w = w - h @ V
        again = V @ w  # a second pass keeps the basis orthogonal to working precision
        w, h = w - again @ V, h + again
        height = norm(w)
        height = torch.where(height > tiny * scale, height, torch.zeros_like(height))
        columns.append(torch.cat([h, height[None]]))
        basis.append(torch.where(height > 0, w / nonzero(height), torch.zeros_like(w)))
        q.append(-(torch.stack(q) * h).sum() / nonzero(height))
        residual = beta / norm(torch.stack(q))
        going = going & (residual > limit) & (height > 0)
        if not any_lane(going):
            break
    rows = len(columns) + 1
    H = torch.stack([torch.cat([c, c.new_zeros(rows - c.numel())]) for c in columns], dim=1)
    y = torch.linalg.pinv(H.nan_to_num())[:, 0] * beta  # a lane of NaN must not stop the others
    return y @ torch.stack(basis[: len(columns)]), taken
