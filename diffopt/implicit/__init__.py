"""Implicit differentiation: derivatives of a solution by the equation it solves."""

from diffopt.implicit.decorators import custom_fixed_point, custom_root
from diffopt.implicit.root import root_jvp, root_vjp

__all__ = ["custom_fixed_point", "custom_root", "root_jvp", "root_vjp"]
