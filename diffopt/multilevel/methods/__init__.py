"""Ways to differentiate a best response that need less than an adjoint solve: adjoints for edges, one file each."""

from diffopt.multilevel.methods.finite_difference import FiniteDifference
from diffopt.multilevel.methods.nystrom import Nystrom
from diffopt.multilevel.methods.reinforce import Reinforce
from diffopt.multilevel.methods.sama import SAMA
from diffopt.multilevel.methods.zero_order import ZeroOrder

__all__ = ["SAMA", "FiniteDifference", "Nystrom", "Reinforce", "ZeroOrder"]
