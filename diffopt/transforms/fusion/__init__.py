"""Fused steps: one pass over all leaves, differentiable, in place where memory is donated."""

from diffopt.transforms.fusion.inner_loop import InnerLoop, inner_loop
from diffopt.transforms.fusion.separable import by_pieces
from diffopt.transforms.fusion.steps import fuse

__all__ = ["InnerLoop", "by_pieces", "fuse", "inner_loop"]
