"""Implicit differentiation: derivatives of a solution by the equation it solves."""

from diffopt.implicit.adjoints import Detached, Implicit, OneStep, Unrolled
from diffopt.implicit.decorators import custom_fixed_point, custom_root
from diffopt.implicit.diagnostics import Diagnosis, diagnose
from diffopt.implicit.optimality import (
    KKT,
    fixed_point_map,
    kkt_map,
    projected_map,
    proximal_map,
    stationarity_map,
)
from diffopt.implicit.protocol import Adjoint, Equation
from diffopt.implicit.root import root_jvp, root_vjp

__all__ = [
    "KKT",
    "Adjoint",
    "Detached",
    "Diagnosis",
    "Equation",
    "Implicit",
    "OneStep",
    "Unrolled",
    "custom_fixed_point",
    "custom_root",
    "diagnose",
    "fixed_point_map",
    "kkt_map",
    "projected_map",
    "proximal_map",
    "root_jvp",
    "root_vjp",
    "stationarity_map",
]
