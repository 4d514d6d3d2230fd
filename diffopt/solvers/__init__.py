"""Solvers in SciPy's verbs, their solutions differentiable by the adjoint of your choice."""

from diffopt.solvers.admm import ADMM
from diffopt.solvers.anderson import Anderson
from diffopt.solvers.augmented_lagrangian import AugmentedLagrangian
from diffopt.solvers.bfgs import BFGS
from diffopt.solvers.block_coordinate import BlockCoordinateDescent
from diffopt.solvers.bracketing import Bisection, Brent, ScalarEquation
from diffopt.solvers.broyden import Broyden
from diffopt.solvers.dogleg import Dogleg
from diffopt.solvers.fixed_point import fixed_point
from diffopt.solvers.fixed_point_iteration import FixedPointIteration
from diffopt.solvers.frank_wolfe import FrankWolfe
from diffopt.solvers.gauss_newton import GaussNewton
from diffopt.solvers.golden_section import GoldenSection
from diffopt.solvers.gradient_descent import GradientDescent
from diffopt.solvers.iterate import Solver
from diffopt.solvers.lbfgs import LBFGS
from diffopt.solvers.lbfgsb import LBFGSB
from diffopt.solvers.least_squares import least_squares
from diffopt.solvers.levenberg_marquardt import LevenbergMarquardt
from diffopt.solvers.line_search import Backtracking, HagerZhang, LineSearch, Zoom
from diffopt.solvers.minimize import minimize
from diffopt.solvers.mirror_descent import Mirror, MirrorDescent, entropy_mirror
from diffopt.solvers.nelder_mead import NelderMead
from diffopt.solvers.newton import Chord, Newton
from diffopt.solvers.newton_cg import NewtonCG
from diffopt.solvers.nonlinear_cg import NonlinearCG
from diffopt.solvers.objective import Objective
from diffopt.solvers.optimizer_solver import FromOptimizer
from diffopt.solvers.proximal_gradient import ProximalGradient
from diffopt.solvers.residuals import Residuals
from diffopt.solvers.root import root
from diffopt.solvers.root_scalar import root_scalar
from diffopt.solvers.scipy_least_squares import SciPyLeastSquares
from diffopt.solvers.scipy_minimize import SciPyMinimize
from diffopt.solvers.scipy_root import SciPyRoot
from diffopt.solvers.solution import Solution, SolverError, Stats
from diffopt.solvers.squarem import SQUAREM, Aitken
from diffopt.solvers.trust_region import TrustRegion

__all__ = [
    "ADMM",
    "BFGS",
    "LBFGS",
    "LBFGSB",
    "SQUAREM",
    "Aitken",
    "Anderson",
    "AugmentedLagrangian",
    "Backtracking",
    "Bisection",
    "BlockCoordinateDescent",
    "Brent",
    "Broyden",
    "Chord",
    "Dogleg",
    "FixedPointIteration",
    "FrankWolfe",
    "FromOptimizer",
    "GaussNewton",
    "GoldenSection",
    "GradientDescent",
    "HagerZhang",
    "LevenbergMarquardt",
    "LineSearch",
    "Mirror",
    "MirrorDescent",
    "NelderMead",
    "Newton",
    "NewtonCG",
    "NonlinearCG",
    "Objective",
    "ProximalGradient",
    "Residuals",
    "ScalarEquation",
    "SciPyLeastSquares",
    "SciPyMinimize",
    "SciPyRoot",
    "Solution",
    "Solver",
    "SolverError",
    "Stats",
    "TrustRegion",
    "Zoom",
    "entropy_mirror",
    "fixed_point",
    "least_squares",
    "minimize",
    "root",
    "root_scalar",
]
