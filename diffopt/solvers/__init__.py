"""Solvers in SciPy's verbs, their solutions differentiable by the adjoint of your choice."""

from diffopt.solvers.lbfgs import LBFGS
from diffopt.solvers.line_search import LineSearch, Zoom
from diffopt.solvers.minimize import minimize
from diffopt.solvers.newton import Chord, Newton
from diffopt.solvers.objective import Objective
from diffopt.solvers.proximal_gradient import ProximalGradient
from diffopt.solvers.root import root
from diffopt.solvers.solution import Solution, SolverError, Stats

__all__ = [
    "LBFGS",
    "Chord",
    "LineSearch",
    "Newton",
    "Objective",
    "ProximalGradient",
    "Solution",
    "SolverError",
    "Stats",
    "Zoom",
    "minimize",
    "root",
]
