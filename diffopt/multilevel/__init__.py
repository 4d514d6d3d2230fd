"""Multilevel programs: problems whose losses read the solutions of other problems, as graphs of pure levels."""

from diffopt.implicit.adjoints import Detached, Implicit, OneStep, Unrolled
from diffopt.multilevel.checkpoints import load, save
from diffopt.multilevel.graph import Graph, graph
from diffopt.multilevel.level import Edge, Level
from diffopt.multilevel.logs import log_to_tensorboard
from diffopt.multilevel.methods import SAMA, FiniteDifference, Nystrom, Reinforce, ZeroOrder
from diffopt.multilevel.responses import PerStep, Report
from diffopt.multilevel.sources import minibatches
from diffopt.multilevel.trainer import NotFiniteError, Trained, train
from diffopt.multilevel.update import GraphState, Metrics

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
    "NotFiniteError",
    "Nystrom",
    "OneStep",
    "PerStep",
    "Reinforce",
    "Report",
    "Trained",
    "Unrolled",
    "ZeroOrder",
    "graph",
    "load",
    "log_to_tensorboard",
    "minibatches",
    "save",
    "train",
]
