"""Strategies: searches for the minimum of a function by its values alone, as pure ``init``, ``ask`` and ``tell``."""

from diffopt.zero_order.strategies.ars import ARSState, ars
from diffopt.zero_order.strategies.base import Strategy
from diffopt.zero_order.strategies.bounds import reflect
from diffopt.zero_order.strategies.cem import CEMState, cem
from diffopt.zero_order.strategies.clipup import ClipUpState, clipup
from diffopt.zero_order.strategies.cma_es import CMAESState, cma_es
from diffopt.zero_order.strategies.fitness import centered_rank, nes_utilities, rank_weights, raw_losses, standardize
from diffopt.zero_order.strategies.open_es import OpenESState, open_es
from diffopt.zero_order.strategies.pgpe import PGPEState, pgpe
from diffopt.zero_order.strategies.restarts import Attempt, RestartsResult, StopRules, run_with_restarts
from diffopt.zero_order.strategies.run import History, Result, evaluate_population, make_generation, run
from diffopt.zero_order.strategies.sep_cma_es import SepCMAESState, sep_cma_es
from diffopt.zero_order.strategies.snes import SNESState, snes
from diffopt.zero_order.strategies.xnes import XNESState, xnes

__all__ = [
    "ARSState",
    "Attempt",
    "CEMState",
    "CMAESState",
    "ClipUpState",
    "History",
    "OpenESState",
    "PGPEState",
    "RestartsResult",
    "Result",
    "SNESState",
    "SepCMAESState",
    "StopRules",
    "Strategy",
    "XNESState",
    "ars",
    "cem",
    "centered_rank",
    "clipup",
    "cma_es",
    "evaluate_population",
    "make_generation",
    "nes_utilities",
    "open_es",
    "pgpe",
    "rank_weights",
    "raw_losses",
    "reflect",
    "run",
    "run_with_restarts",
    "sep_cma_es",
    "snes",
    "standardize",
    "xnes",
]
