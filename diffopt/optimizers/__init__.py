"""Optimizers: chains of gradient transformations, one a file."""

from diffopt.optimizers.adabelief import adabelief
from diffopt.optimizers.adadelta import adadelta
from diffopt.optimizers.adagrad import adagrad
from diffopt.optimizers.adam import adam
from diffopt.optimizers.adamax import adamax
from diffopt.optimizers.adamw import adamw
from diffopt.optimizers.adan import adan
from diffopt.optimizers.amsgrad import amsgrad
from diffopt.optimizers.interop import TorchOptimizer, from_torch_state, to_torch, to_torch_state
from diffopt.optimizers.lamb import lamb
from diffopt.optimizers.lars import lars
from diffopt.optimizers.lion import lion
from diffopt.optimizers.muon import muon, orthogonalize
from diffopt.optimizers.nadam import nadam
from diffopt.optimizers.prodigy import ProdigyState, prodigy
from diffopt.optimizers.radam import radam
from diffopt.optimizers.rmsprop import rmsprop
from diffopt.optimizers.sam import sam
from diffopt.optimizers.schedule_free import ScheduleFreeState, schedule_free
from diffopt.optimizers.sgd import sgd
from diffopt.optimizers.yogi import yogi

__all__ = [
    "ProdigyState",
    "ScheduleFreeState",
    "TorchOptimizer",
    "adabelief",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "adan",
    "amsgrad",
    "from_torch_state",
    "lamb",
    "lars",
    "lion",
    "muon",
    "nadam",
    "orthogonalize",
    "prodigy",
    "radam",
    "rmsprop",
    "sam",
    "schedule_free",
    "sgd",
    "to_torch",
    "to_torch_state",
    "yogi",
]
