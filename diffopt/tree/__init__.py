"""Trees of tensors: structure, raveling, arithmetic, and modules as pure functions of trees."""

from diffopt.tree.arithmetic import add, axpy, norm, scale, sub, vdot, where, zeros_like
from diffopt.tree.module import from_module, to_module
from diffopt.tree.partition import partition
from diffopt.tree.ravel import ravel
from diffopt.tree.structure import (
    check_like,
    check_same_structure,
    check_tensors,
    flatten,
    leaves,
    map,
    paths,
    unflatten,
)

__all__ = [
    "add",
    "axpy",
    "check_like",
    "check_same_structure",
    "check_tensors",
    "flatten",
    "from_module",
    "leaves",
    "map",
    "norm",
    "partition",
    "paths",
    "ravel",
    "scale",
    "sub",
    "to_module",
    "unflatten",
    "vdot",
    "where",
    "zeros_like",
]
