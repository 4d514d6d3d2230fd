"""Multilevel programs: problems whose losses read the solutions of other problems, as graphs of pure levels."""

from diffopt.implicit.adjoints import Detached, Implicit, OneStep, Unrolled
from diffopt.multilevel.graph import Graph, GraphState, Metrics, graph
from diffopt.multilevel.level import Edge, Level
from diffopt.multilevel.methods import SAMA, FiniteDifference, Nystrom, Reinforce, ZeroOrder
from diffopt.multilevel.responses import PerStep, Report

__all__ = [
    "SAMA",
    "Detached",
    "Edge",
    "FiniteDifference",
    "Graph",
    "GraphState",
    "Implicit",
    "Level",
    "Metrics",
    "Nystrom",
    "OneStep",
    "PerStep",
    "Reinforce",
    "Report",
    "Unrolled",
    "ZeroOrder",
    "graph",
]
