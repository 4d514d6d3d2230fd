"""Stochastic bilevel methods that move inner and outer variables together, as pure steps on batches of indices.

A method is a frozen value of step sizes: `init(problem, z, x)` makes a state, and `step(problem, state, inner_batch,
outer_batch)` the next one; `run` is the loop. All read the problem through gradients and vector products alone.
"""

from diffopt.multilevel.single_loop.amigo import AmIGO, AmIGOState
from diffopt.multilevel.single_loop.f2sa import F2SA, F2SAState
from diffopt.multilevel.single_loop.mrbo import MRBO, MRBOState
from diffopt.multilevel.single_loop.problem import BilevelProblem
from diffopt.multilevel.single_loop.protocol import Draws, SingleLoop
from diffopt.multilevel.single_loop.run import draw, run
from diffopt.multilevel.single_loop.saba import SABA, SABAState
from diffopt.multilevel.single_loop.soba import SOBA, SOBAState
from diffopt.multilevel.single_loop.stocbio import StocBiO, StocBiOState
from diffopt.multilevel.single_loop.sustain import SUSTAIN, SUSTAINState

__all__ = [
    "F2SA",
    "MRBO",
    "SABA",
    "SOBA",
    "SUSTAIN",
    "AmIGO",
    "AmIGOState",
    "BilevelProblem",
    "Draws",
    "F2SAState",
    "MRBOState",
    "SABAState",
    "SOBAState",
    "SUSTAINState",
    "SingleLoop",
    "StocBiO",
    "StocBiOState",
    "draw",
    "run",
]
