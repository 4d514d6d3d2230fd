"""Multilevel programs: problems whose losses read the solutions of other problems, as graphs of pure levels."""

from diffopt.implicit.adjoints import Detached, Implicit, OneStep, Unrolled
from diffopt.multilevel.graph import Graph, GraphState, Metrics, graph
from diffopt.multilevel.level import Edge, Level
from diffopt.multilevel.responses import PerStep, Report

__all__ = [
    "Detached",
    "Edge",
    "Graph",
    "GraphState",
    "Implicit",
    "Level",
    "Metrics",
    "OneStep",
    "PerStep",
    "Report",
    "Unrolled",
    "graph",
]
