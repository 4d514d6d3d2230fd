"""Modules that change in place, with gradients through their changes: for those who come from nn.Module libraries."""

from diffopt.nn.functional import functional
from diffopt.nn.implicit_module import ImplicitModule
from diffopt.nn.meta_optimizer import MetaOptimizer
from diffopt.nn.state import ModuleState, OptimizerState, extract_state, recover_state, stop_gradient
from diffopt.nn.zero_order_module import ZeroOrderModule

__all__ = [
    "ImplicitModule",
    "MetaOptimizer",
    "ModuleState",
    "OptimizerState",
    "ZeroOrderModule",
    "extract_state",
    "functional",
    "recover_state",
    "stop_gradient",
]
