"""Gradient transformations: pure `init` and `update` functions, and the verbs that chain and apply them."""

from diffopt.transforms.adam import ScaleByAdamState, scale_by_adam
from diffopt.transforms.adam_variants import (
    ScaleByAmsgradState,
    ScaleByNadamState,
    scale_by_adabelief,
    scale_by_adamax,
    scale_by_amsgrad,
    scale_by_nadam,
    scale_by_radam,
    scale_by_yogi,
)
from diffopt.transforms.adan import ScaleByAdanState, scale_by_adan
from diffopt.transforms.base import EmptyState, GradientTransformation, apply_updates, identity, step
from diffopt.transforms.chain import chain, named_chain
from diffopt.transforms.clipping import adaptive_grad_clip, clip, clip_by_block_rms, clip_by_global_norm
from diffopt.transforms.ema import EmaState, ema
from diffopt.transforms.gradients import AddNoiseState, ZeroNansState, add_noise, centralize, zero_nans
from diffopt.transforms.inject import InjectHyperparamsState, inject_hyperparams
from diffopt.transforms.masked import MaskedNode, MaskedState, PartitionState, freeze, masked, partition
from diffopt.transforms.mean_square import (
    ScaleByAdadeltaState,
    ScaleByRmsState,
    ScaleByRssState,
    ScaleByStddevState,
    scale_by_adadelta,
    scale_by_rms,
    scale_by_rss,
    scale_by_stddev,
)
from diffopt.transforms.parameters import PolyakAverageState, keep_params_nonnegative, polyak_average
from diffopt.transforms.scale import ScaleByScheduleState, scale, scale_by_learning_rate, scale_by_schedule
from diffopt.transforms.sign import ScaleByLionState, scale_by_lion, scale_by_sign
from diffopt.transforms.step_sizes import scale_by_polyak, scale_by_trust_ratio
from diffopt.transforms.trace import TraceState, trace
from diffopt.transforms.weight_decay import add_decayed_weights
from diffopt.transforms.wrappers import (
    AccumulateState,
    ApplyIfFiniteState,
    LookaheadState,
    accumulate,
    apply_if_finite,
    flatten,
    lookahead,
)

__all__ = [
    "AccumulateState",
    "AddNoiseState",
    "ApplyIfFiniteState",
    "EmaState",
    "EmptyState",
    "GradientTransformation",
    "InjectHyperparamsState",
    "LookaheadState",
    "MaskedNode",
    "MaskedState",
    "PartitionState",
    "PolyakAverageState",
    "ScaleByAdadeltaState",
    "ScaleByAdamState",
    "ScaleByAdanState",
    "ScaleByAmsgradState",
    "ScaleByLionState",
    "ScaleByNadamState",
    "ScaleByRmsState",
    "ScaleByRssState",
    "ScaleByScheduleState",
    "ScaleByStddevState",
    "TraceState",
    "ZeroNansState",
    "accumulate",
    "adaptive_grad_clip",
    "add_decayed_weights",
    "add_noise",
    "apply_if_finite",
    "apply_updates",
    "centralize",
    "chain",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "ema",
    "flatten",
    "freeze",
    "identity",
    "inject_hyperparams",
    "keep_params_nonnegative",
    "lookahead",
    "masked",
    "named_chain",
    "partition",
    "polyak_average",
    "scale",
    "scale_by_adabelief",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_amsgrad",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_nadam",
    "scale_by_polyak",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_sign",
    "scale_by_stddev",
    "scale_by_trust_ratio",
    "scale_by_yogi",
    "step",
    "trace",
    "zero_nans",
]
