"""Gradient transformations: pure `init` and `update` functions, and the verbs that chain and apply them."""

from diffopt.transforms.adam import ScaleByAdamState, scale_by_adam
from diffopt.transforms.base import EmptyState, GradientTransformation, apply_updates, identity, step
from diffopt.transforms.chain import chain
from diffopt.transforms.scale import ScaleByScheduleState, scale, scale_by_learning_rate
from diffopt.transforms.trace import TraceState, trace
from diffopt.transforms.weight_decay import add_decayed_weights

__all__ = [
    "EmptyState",
    "GradientTransformation",
    "ScaleByAdamState",
    "ScaleByScheduleState",
    "TraceState",
    "add_decayed_weights",
    "apply_updates",
    "chain",
    "identity",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "step",
    "trace",
]
