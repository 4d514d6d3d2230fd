"""Solvers in SciPy's verbs, their solutions differentiable by the adjoint of your choice."""

from diffopt.solvers.augmented_lagrangian import AugmentedLagrangian
from diffopt.solvers.bfgs import BFGS
from diffopt.solvers.broyden import Broyden
from diffopt.solvers.gradient_descent import GradientDescent
from diffopt.solvers.lbfgs import LBFGS
from diffopt.solvers.lbfgsb import LBFGSB
from diffopt.solvers.line_search import Backtracking, HagerZhang, LineSearch, Zoom
from diffopt.solvers.minimize import minimize
from diffopt.solvers.newton import Chord, Newton
from diffopt.solvers.nonlinear_cg import NonlinearCG
from diffopt.solvers.objective import Objective
from diffopt.solvers.proximal_gradient import ProximalGradient
from diffopt.solvers.root import root
from diffopt.solvers.scipy_minimize import SciPyMinimize
from diffopt.solvers.scipy_root import SciPyRoot
from diffopt.solvers.solution import Solution, SolverError, Stats

__all__ = [
    "BFGS",
    "LBFGS",
    "LBFGSB",
    "AugmentedLagrangian",
    "Backtracking",
    "Broyden",
    "Chord",
    "GradientDescent",
    "HagerZhang",
    "LineSearch",
    "Newton",
    "NonlinearCG",
    "Objective",
    "ProximalGradient",
    "SciPyMinimize",
    "SciPyRoot",
    "Solution",
    "SolverError",
    "Stats",
    "Zoom",
    "minimize",
    "root",
]
