"""diffopt: differentiable optimization for PyTorch, as pure functions that compose with torch.func."""
