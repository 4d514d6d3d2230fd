"""Optimizers: chains of gradient transformations, one a file."""

from diffopt.optimizers.adam import adam
from diffopt.optimizers.adamw import adamw
from diffopt.optimizers.sgd import sgd

__all__ = ["adam", "adamw", "sgd"]
