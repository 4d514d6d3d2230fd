"""The primitives: derivatives by rule, loops that stop, closures, checkpoints and compiling."""

from diffopt.autodiff.checkpoint import checkpoint, unroll
from diffopt.autodiff.closures import check_closed, hoist
from diffopt.autodiff.compilation import compile
from diffopt.autodiff.custom_derivative import Batching, choose, custom_derivative, rules_of
from diffopt.autodiff.fused_op import fused_op
from diffopt.autodiff.gradients import grad, jvp, linearize, value_and_grad, vjp
from diffopt.autodiff.levels import any_lane, transforms_active
from diffopt.autodiff.while_loop import while_loop

__all__ = [
    "Batching",
    "any_lane",
    "check_closed",
    "checkpoint",
    "choose",
    "compile",
    "custom_derivative",
    "fused_op",
    "grad",
    "hoist",
    "jvp",
    "linearize",
    "rules_of",
    "transforms_active",
    "unroll",
    "value_and_grad",
    "vjp",
    "while_loop",
]
