"""Linear operators, linear solves, least squares and preconditioners."""

from diffopt.linalg.dense import Dense
from diffopt.linalg.derivatives import gauss_newton_operator, hessian_operator, jacobian_operator
from diffopt.linalg.factorizations import LU, QR, SVD, Cholesky
from diffopt.linalg.gmres import GMRES
from diffopt.linalg.krylov import CG, BiCGStab, NormalCG
from diffopt.linalg.least_squares import lstsq
from diffopt.linalg.lsmr import LSMR
from diffopt.linalg.neumann import Neumann
from diffopt.linalg.operators import LinearOperator, Tag, function_operator, matrix_operator
from diffopt.linalg.preconditioners import block_jacobi, jacobi
from diffopt.linalg.protocol import LinearSolver, Status
from diffopt.linalg.refinement import IterativeRefinement
from diffopt.linalg.solve import ConvergenceWarning, LinearSolveError, LinearStats, linear_solve
from diffopt.linalg.structured import Diagonal, Triangular, Tridiagonal

__all__ = [
    "CG",
    "GMRES",
    "LSMR",
    "LU",
    "QR",
    "SVD",
    "BiCGStab",
    "Cholesky",
    "ConvergenceWarning",
    "Dense",
    "Diagonal",
    "IterativeRefinement",
    "LinearOperator",
    "LinearSolveError",
    "LinearSolver",
    "LinearStats",
    "Neumann",
    "NormalCG",
    "Status",
    "Tag",
    "Triangular",
    "Tridiagonal",
    "block_jacobi",
    "function_operator",
    "gauss_newton_operator",
    "hessian_operator",
    "jacobi",
    "jacobian_operator",
    "linear_solve",
    "lstsq",
    "matrix_operator",
]
