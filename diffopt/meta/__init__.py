"""Meta-learning: adaptation to tasks, unrolled or implicit, and learning through the learning of others."""

from diffopt.autodiff import unroll
from diffopt.meta.adapt import Adapted, adapt
from diffopt.meta.anil import anil
from diffopt.meta.bilevel import bilevel
from diffopt.meta.dice import dice
from diffopt.meta.imaml import adapt_proximal, imaml
from diffopt.meta.lola import lola
from diffopt.meta.maml import fomaml, maml
from diffopt.meta.mgrl import MGRL, MGRLInfo, MGRLState, lambda_return, mgrl
from diffopt.meta.rates import MetaSGDState, meta_sgd, per_step
from diffopt.meta.reptile import reptile
from diffopt.meta.reweight import reweight
from diffopt.meta.task_batch import task_batch, task_mean

__all__ = [
    "MGRL",
    "Adapted",
    "MGRLInfo",
    "MGRLState",
    "MetaSGDState",
    "adapt",
    "adapt_proximal",
    "anil",
    "bilevel",
    "dice",
    "fomaml",
    "imaml",
    "lambda_return",
    "lola",
    "maml",
    "meta_sgd",
    "mgrl",
    "per_step",
    "reptile",
    "reweight",
    "task_batch",
    "task_mean",
    "unroll",
]
