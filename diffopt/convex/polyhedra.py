r"""Projection onto a polyhedron, by a dual active-set method and the closed form on the set that it finds.

.. math:: \min_y \tfrac12 \|y - x\|^2 \quad\text{s.t.}\quad A y = b, \quad G y \le h
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.convex.affine import project_active_rows
from diffopt.convex.arguments import check_matrix, check_vector, flatten_vector, report
from diffopt.typing import Tree

__all__ = ["projection_polyhedron"]

_CAUSES = (
    "projection_polyhedron found no point. Likely causes: the constraints contradict each other; an argument holds NaN "
    "or inf; the rows are so nearly dependent that max_steps was reached."
)


class _State(NamedTuple):
    """The active rows, the row being added and its multiplier, and how the search stands."""

    active: Tensor
    row: Tensor
    multiplier: Tensor
    adding: Tensor
    solved: Tensor
    failed: Tensor


class _Rows(NamedTuple):
    """The constraints in units of length: the Gram matrix, the violations of x, and which rows are equations."""

    gram: Tensor
    excess: Tensor
    equation: Tensor
    tolerance: Tensor


def projection_polyhedron(
    x: Tree,
    A: Tensor | None,
    b: Tensor | None,
    G: Tensor | None,
    h: Tensor | None,
    *,
    max_steps: int | None = None,
    throw: bool = True,
) -> Tree:
    r"""Project onto a polyhedron.

    .. math:: \arg\min_{A y = b,\ G y \le h} \tfrac12 \|y - x\|^2 = x - C_S^\top (C_S C_S^\top)^{-1} (C_S x - d_S),
              \qquad C = \binom{A}{G}, \quad d = \binom{b}{h}

    The active rows S are found by a dual active-set method in float64, which is finite and exact; the derivatives are
    those of the closed form on them. The rows in S are linearly independent: at a vertex with more rows than that, one
    choice among them is made.

    Args:
        x: A tree of floating-point tensors of one dtype, taken as one vector of n entries.
        A: The matrix of the equations, shape (p, n), or None for no equations. Rows may be redundant.
        b: Their right side, shape (p,), or None.
        G: The matrix of the inequalities, shape (m, n), or None for none.
        h: Their right side, shape (m,), or None.
        max_steps: The most rows added and dropped; None is `max(32, 4 (p + m))`. Compiled, all of them are taken, and
            at most 64 are allowed.
        throw: Whether to raise where no point was found. Compiled calls cannot raise: they return NaN there.

    Returns:
        A tree like x.

    Raises:
        TypeError: If an argument is not floating-point, or dtypes are mixed.
        ValueError: If shapes disagree, or a matrix comes without its right side.
        ProjectionError: If no point was found: the polyhedron is empty, or max_steps was reached.

    Example:
        >>> A, b = torch.tensor([[1.0, 1.0]]), torch.tensor([1.0])
        >>> projection_polyhedron(torch.tensor([2.0, 0.5]), A, b, -torch.eye(2), torch.zeros(2))
        tensor([1., 0.])

    References:
        Goldfarb and Idnani, "A numerically stable dual method for solving strictly convex quadratic programs",
        Mathematical Programming 1983, algorithm 1.
    """
    vector, unravel = flatten_vector(x, "x")
    parts = [_pair(A, b, ("A", "b"), vector), _pair(G, h, ("G", "h"), vector)]
    C, d = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if not C.shape[0]:
        return unravel(vector)
    most = max(32, 4 * C.shape[0]) if max_steps is None else max_steps
    active, solved = _active_rows(vector.detach(), C.detach(), d.detach(), parts[0][0].shape[0], most)
    return unravel(report(solved, project_active_rows(vector, C, d, active), throw, _CAUSES))


def _pair(matrix, side, names, vector):
    if (matrix is None) != (side is None):
        raise ValueError(f"`{names[0]}` and `{names[1]}` must come together, or both be None.")
    if matrix is None:
        return vector.new_zeros(0, vector.numel()), vector.new_zeros(0)
    check_matrix(matrix, names[0], vector.numel())
    check_vector(side, names[1], matrix.shape[0])
    return matrix.to(vector.dtype), side.to(vector.dtype)


def _active_rows(x: Tensor, C: Tensor, d: Tensor, equations: int, max_steps: int) -> tuple[Tensor, Tensor]:
    """The rows that hold with equality and push at the projection, linearly independent; and whether it exists."""
    precision = torch.finfo(x.dtype).eps
    x, C, d = x.double(), C.double(), d.double()
    lengths = C.norm(dim=1)
    lengths = torch.where(lengths > 0, lengths, 1.0)
    C, d = C / lengths[:, None], d / lengths
    is_equation = torch.arange(d.numel(), device=x.device) < equations
    slack = ~is_equation & (d == torch.inf)  # such a row never holds
    finite = x.isfinite().all() & C.isfinite().all() & (d.isfinite() | slack).all()
    d = torch.where(slack, 0.0, d)
    tolerance = 64 * precision * (x.norm() + d.abs().amax())
    excess = torch.where(slack, -torch.inf, C @ x - d)
    rows = _Rows(C @ C.mT, excess, is_equation, tolerance)
    no = torch.zeros((), dtype=torch.bool, device=x.device)
    start = _State(
        torch.zeros_like(d, dtype=torch.bool), torch.zeros_like(no, dtype=torch.int64), no.double(), no, no, ~finite
    )
    state = while_loop(lambda s: ~(s.solved | s.failed), lambda s: _step(rows, s), start, max_steps=max_steps)
    return state.active, state.solved


def _step(rows: _Rows, state: _State) -> _State:
    """Choose a violated row, if none is being added, and move its multiplier until it holds or another row lets go."""
    both = state.active[:, None] & state.active
    system = torch.where(both, rows.gram, 0.0) + torch.diag(torch.where(state.active, 0.0, 1.0).double())
    factor = torch.linalg.cholesky_ex(system)[0]

    def solve(side):
        return torch.cholesky_solve(torch.where(state.active, side, 0.0)[:, None], factor)[:, 0]

    held = torch.where(state.active, rows.excess, 0.0)
    row, found = _violated(rows, state, rows.excess - rows.gram @ solve(held))
    row = torch.where(state.adding, state.row, row)
    found = state.adding | found
    multiplier = torch.where(state.adding, state.multiplier, 0.0)

    column = rows.gram.index_select(1, row.reshape(1)).squeeze(1)
    multipliers = solve(held - multiplier * column)
    excess = _at(rows.excess - rows.gram @ multipliers, row) - multiplier * _at(column, row)
    sign = torch.where(excess < 0, -1.0, 1.0)  # of an equation; an inequality that is chosen is above its bound
    direction = sign * solve(column)
    left = _at(column, row) - sign * (column * direction).sum()  # squared distance from the span of the active rows
    independent = left > 1e-12
    full = torch.where(independent, excess.abs() / torch.where(independent, left, 1.0), torch.inf)
    falling = state.active & ~rows.equation & (direction > 1e-12)
    ratios = torch.where(falling, multipliers.clamp(min=0) / torch.where(falling, direction, 1.0), torch.inf)
    partial, blocking = ratios.amin(), ratios.argmin()
    impossible = torch.isinf(full) & torch.isinf(partial)
    complete = full <= partial
    places = torch.arange(ratios.numel(), device=ratios.device)
    changed = torch.where(complete, state.active | (places == row), state.active & (places != blocking))
    going = found & ~impossible
    step = torch.where(going & ~complete, sign * partial, 0.0)
    return _State(
        torch.where(going, changed, state.active),
        row,
        multiplier + step,
        going & ~complete,
        ~found,
        found & impossible,
    )


def _violated(rows: _Rows, state: _State, excess: Tensor) -> tuple[Tensor, Tensor]:
    """The most violated row, equations first, and whether there is one."""
    amount = torch.where(rows.equation, excess.abs(), excess)
    open_rows = (amount > rows.tolerance) & ~state.active
    first = torch.where((open_rows & rows.equation).any(), rows.equation, True)
    return torch.where(open_rows & first, amount, -torch.inf).argmax(), open_rows.any()


def _at(vector: Tensor, place: Tensor) -> Tensor:
    return vector.gather(0, place.reshape(1)).squeeze(0)
