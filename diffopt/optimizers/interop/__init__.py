"""To and from `torch.optim`: training loops and checkpoints that exist already."""

from diffopt.optimizers.interop.torch_optim import TorchOptimizer, to_torch
from diffopt.optimizers.interop.torch_state import from_torch_state, to_torch_state

__all__ = ["TorchOptimizer", "from_torch_state", "to_torch", "to_torch_state"]
