"""Schedules: hyperparameters as pure functions of the step count, differentiable in their own parameters."""

from diffopt.schedules.cosine import cosine_decay_schedule, sgdr_schedule, warmup_cosine_decay_schedule
from diffopt.schedules.join import join_schedules
from diffopt.schedules.one_cycle import cosine_onecycle_schedule, linear_onecycle_schedule
from diffopt.schedules.polynomial import (
    constant_schedule,
    exponential_decay,
    linear_schedule,
    piecewise_constant_schedule,
    polynomial_schedule,
)
from diffopt.schedules.warmup import warmup_constant_schedule, warmup_exponential_decay_schedule

__all__ = [
    "constant_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "exponential_decay",
    "join_schedules",
    "linear_onecycle_schedule",
    "linear_schedule",
    "piecewise_constant_schedule",
    "polynomial_schedule",
    "sgdr_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
]
