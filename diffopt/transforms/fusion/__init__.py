"""Fused steps: one pass over all leaves, differentiable, in place where memory is donated."""

from diffopt.transforms.fusion.inner_loop import InnerLoop, inner_loop
from diffopt.transforms.fusion.steps import fuse

__all__ = ["InnerLoop", "fuse", "inner_loop"]
