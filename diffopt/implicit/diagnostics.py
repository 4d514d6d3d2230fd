r"""How far an implicit gradient can be trusted: what the errors of the solution and of the adjoint solve do to it.

.. math:: g(x) = -\,\partial_\theta F(x, \theta)^\top u, \qquad \partial_x F(x, \theta)^\top u = \bar x
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import transforms_active
from diffopt.implicit.protocol import Equation
from diffopt.implicit.root import check_equation, root_vjp
from diffopt.linalg import CG, GMRES, ConvergenceWarning, Dense, LinearSolver, jacobian_operator
from diffopt.linalg.operators import LinearOperator
from diffopt.linalg.protocol import check_precision
from diffopt.linalg.solve import check_solver, solve_flat
from diffopt.typing import Tree

__all__ = ["Diagnosis", "diagnose"]

_MOST_EXACT = 1024
_POWER_STEPS = 20


class Diagnosis(NamedTuple):
    """What `diagnose` found, tensors; `str` says it in words.

    Attributes:
        residual: The norm of the equation's value at the solution.
        distance: The norm of the Newton step from there, to first order the distance to the true solution.
        condition: The condition number of the Jacobian; beyond 1024 unknowns estimated from below.
        inverse_norm: The norm of the Jacobian's inverse: by how much a residual is magnified in the solution.
        adjoint_residual: The residual of the adjoint solve, relative to the cotangent.
        gradient_norm: The norm of the hypergradient.
        solution_error: The estimated error of the hypergradient because the solution is inexact.
        adjoint_error: The estimated error of the hypergradient because the adjoint solve is inexact.
    """

    residual: Tensor
    distance: Tensor
    condition: Tensor
    inverse_norm: Tensor
    adjoint_residual: Tensor
    gradient_norm: Tensor
    solution_error: Tensor
    adjoint_error: Tensor

    @property
    def gradient_error(self) -> Tensor:
        """The estimated error of the hypergradient, of both causes."""
        return self.solution_error + self.adjoint_error

    @property
    def relative_error(self) -> Tensor:
        """The estimated error relative to the hypergradient."""
        return self.gradient_error / self.gradient_norm

    @property
    def singular(self) -> Tensor:
        """Whether the Jacobian is singular to working precision, so that there is no implicit gradient."""
        limit = 0.01 / torch.finfo(self.condition.dtype).eps
        return ~(self.condition < limit)

    @property
    def trustworthy(self) -> Tensor:
        """Whether the Jacobian is regular, and the estimated error under a hundredth of the hypergradient."""
        return ~self.singular & (self.gradient_error <= 0.01 * self.gradient_norm)

    def __str__(self) -> str:
        lines = [
            f"solution:  |F| = {self.residual:.1e}, about {self.distance:.1e} from the true one",
            f"Jacobian:  condition {self.condition:.1e}, |inverse| = {self.inverse_norm:.1e}",
            f"adjoint:   relative residual {self.adjoint_residual:.1e}",
            f"gradient:  norm {self.gradient_norm:.1e}, error about {self.gradient_error:.1e} "
            f"({self.solution_error:.1e} of the solution, {self.adjoint_error:.1e} of the adjoint)",
            f"verdict:   {self._verdict()}",
        ]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.singular:
            return "the Jacobian is singular: the solution is not a function of the arguments. Regularize the problem"
        if self.trustworthy:
            return "the gradient can be trusted"
        if not self.solution_error < self.adjoint_error:  # NaN, too
            return (
                "the solution is too inexact: lower its tolerances, or raise max_steps. If it did converge, this is "
                "not its equation"
            )
        if self.adjoint_residual <= 1e3 * torch.finfo(self.adjoint_residual.dtype).eps:
            return (
                "only rounding is left of the errors, but the gradient is no larger: it is zero, or the Jacobian too "
                "ill-conditioned for the dtype"
            )
        return "the adjoint solve is too inexact: lower its tolerance, or precondition it"


def diagnose(
    equation: Equation | Callable[..., Tree],
    x: Tree,
    args: tuple[Tree, ...],
    cotangent: Tree | Callable[[Tree], Tree],
    linear_solver: LinearSolver | None = None,
) -> Diagnosis:
    r"""Estimate the error of an implicit gradient, on demand; it costs several solves.

    .. math:: |g(x) - g(x^\star)| \approx |g(x) - g(x - \partial_x F^{-1} F)|, \qquad
              |g - \tilde g| = |\partial_\theta F^\top \partial_x F^{-\top} r|

    Here :math:`r` is the residual of the adjoint solve, which is solved again more exactly. The estimate is of first
    order: far from the solution it is only a sign that something is wrong.

    Args:
        equation: What the solution satisfies, an `Equation` or its function `F(x, *args)`. Of `root` that is its own
            function, of `fixed_point` `fixed_point_map(fn)`; of `minimize` it is `stationarity_map(fn)`, with `prox`
            `proximal_map(fn, prox)`, with `projection` `projected_map(fn, projection)`, with `bounds` the same of
            `lambda x: projection_box(x, lower, upper)`, and with constraints `kkt_map(fn, equality, inequality)` of
            the point `KKT(solution.value, *solution.dual)`; of `least_squares` it is that of `minimize` for half the
            sum of squares.
        x: The solution, as found: `solution.value`.
        args: The arguments of the equation, in which the gradient is taken.
        cotangent: The gradient of the outer loss in the solution, a tree like `x`, or the function of `x` that it is:
            then its change with `x` is part of the error.
        linear_solver: That of the adjoint, as in `Implicit`.

    Returns:
        The diagnosis.

    Raises:
        ValueError: If the equation's value or the cotangent is not shaped like `x`, or `x` or that value not finite.
        TypeError: If `args` is no tuple, or `x` of half precision.
        RuntimeError: Under a transform: it is for eager code, at one point.

    Example:
        >>> from diffopt.implicit import stationarity_map
        >>> loss = lambda x, a: (x**4 / 4 - a * x).sum()
        >>> a, x = torch.tensor([8.0], dtype=torch.float64), torch.tensor([2.001], dtype=torch.float64)
        >>> found = diagnose(Equation(stationarity_map(loss), symmetric=True), x, (a,), torch.ones_like(x))
        >>> found.gradient_error, 1 / 12 - 1 / (3 * 2.001**2)
        (tensor(8.3...e-05, dtype=torch.float64), 8.32...e-05)
        >>> bool(found.trustworthy)
        True

    References:
        Blondel et al. (2022), Efficient and modular implicit differentiation, theorem 1. Pedregosa (2016),
        Hyperparameter optimization with approximate gradient, theorem 1.
    """
    if transforms_active():
        raise RuntimeError("diagnose is for eager code, at one point: call it outside of torch.func transforms")
    equation = equation if isinstance(equation, Equation) else Equation(equation)
    check_solver(linear_solver, "linear_solver")
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"diagnose takes args as a tuple; got {type(args).__name__}. Write (value,)")
    if hasattr(x, "value") and hasattr(x, "stats"):
        raise TypeError("diagnose takes the solution's value; got a Solution. Write solution.value")
    tensors, merge = tree.partition((x, args))
    x, args = merge([t.detach() for t in tensors])
    with torch.enable_grad():
        value = equation.residual(x, *args)
        check_equation(value, x)
        _check_finite(x, value)
        found = _diagnose(equation, x, args, cotangent, linear_solver)
    return Diagnosis(*(value.detach() for value in found))


def _check_finite(x: Tree, value: Tree) -> None:
    vector = tree.ravel(x)[0]
    check_precision(vector.dtype, "diagnose")
    if not (vector.isfinite().all() and tree.ravel(value)[0].isfinite().all()):
        raise ValueError(
            "diagnose needs a solution that is finite, and at which the equation is; got NaN or inf. The solve failed: "
            "its `message` says why"
        )


def _diagnose(equation: Equation, x: Tree, args: tuple, cotangent: Any, linear_solver: LinearSolver | None):
    vector, unravel = tree.ravel(x)
    reference = _reference(vector, equation.symmetric)

    def residual(vector: Tensor) -> Tensor:
        return tree.ravel(equation.residual(unravel(vector), *args))[0]

    def weight(vector: Tensor) -> Tensor:
        given = cotangent(unravel(vector)) if callable(cotangent) else cotangent
        tree.check_like(given, x, name="cotangent", reference_name="x")
        return tree.ravel(given)[0].detach()

    def pulled(vector: Tensor, weight: Tensor) -> Tensor:
        """The hypergradient of a cotangent, as one vector."""
        point, w = unravel(vector), unravel(weight)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the diagnosis says so itself
            found = root_vjp(equation.residual, point, args, w, solve=reference, symmetric=equation.symmetric)
        parts = [part.reshape(-1).to(vector.dtype) for part in tree.leaves(found)]
        return torch.cat(parts) if parts else vector[:0]

    norm = torch.linalg.vector_norm
    J = jacobian_operator(residual, vector, tags=("positive_definite",) if equation.symmetric else ())
    largest, inverse = _norms(J, reference)
    here = residual(vector)
    step = solve_flat(J, here, reference, failure="ignore")
    w = weight(vector)
    u = solve_flat(J.transpose(), w, linear_solver and linear_solver.transposed(), failure="ignore")
    left = w - J.rmatvec(u)
    found = pulled(vector, w)
    moved = found - pulled(vector - step, weight(vector - step))
    missing = pulled(vector, left)
    relative = norm(left) / torch.where(norm(w) > 0, norm(w), 1.0)
    return norm(here), norm(step), largest * inverse, inverse, relative, norm(found), norm(moved), norm(missing)


def _reference(x: Tensor, symmetric: bool) -> LinearSolver:
    """The solver that stands for an exact one."""
    if x.numel() <= _MOST_EXACT:
        return Dense()
    rtol = 1e4 * torch.finfo(x.dtype).eps
    return CG(rtol=rtol) if symmetric else GMRES(rtol=rtol)


def _norms(J: LinearOperator, reference: LinearSolver) -> tuple[Tensor, Tensor]:
    """The norms of an operator and of its inverse: exact for few unknowns, else by power iterations."""
    if J.shape[0] <= _MOST_EXACT:
        matrix = J.materialize()
        if not matrix.isfinite().all():
            return torch.full_like(matrix[0, 0], torch.inf), torch.full_like(matrix[0, 0], torch.inf)
        values = torch.linalg.svdvals(matrix)
        return values[0], 1 / values[-1]
    transposed = J.transpose()

    def inverse(v: Tensor) -> Tensor:
        v = solve_flat(transposed, v, reference.transposed(), failure="ignore")
        return solve_flat(J, v, reference, failure="ignore")

    start = torch.arange(1, J.shape[0] + 1, dtype=J.domain.dtype, device=J.domain.device).cos()
    return _power(lambda v: J.rmatvec(J.matvec(v)), start), _power(inverse, start)


def _power(square: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """The root of the largest eigenvalue, by power iterations."""
    for _ in range(_POWER_STEPS):
        v = square(v / torch.linalg.vector_norm(v))
    return torch.linalg.vector_norm(v).sqrt()
