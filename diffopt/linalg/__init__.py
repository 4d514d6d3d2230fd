"""Linear operators and linear solves."""

from diffopt.linalg.dense import Dense
from diffopt.linalg.derivatives import gauss_newton_operator, hessian_operator, jacobian_operator
from diffopt.linalg.krylov import CG, GMRES, NormalCG
from diffopt.linalg.operators import LinearOperator, Tag, function_operator, matrix_operator
from diffopt.linalg.solve import ConvergenceWarning, LinearSolveError, LinearSolver, linear_solve

__all__ = [
    "CG",
    "GMRES",
    "ConvergenceWarning",
    "Dense",
    "LinearOperator",
    "LinearSolveError",
    "LinearSolver",
    "NormalCG",
    "Tag",
    "function_operator",
    "gauss_newton_operator",
    "hessian_operator",
    "jacobian_operator",
    "linear_solve",
    "matrix_operator",
]
