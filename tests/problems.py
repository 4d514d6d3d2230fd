"""Problems that several tests share, each with a plainly differentiable reference."""

import torch

from diffopt.autodiff import any_lane

__all__ = ["W", "equation", "newton_item", "newton_lanes", "newton_unrolled", "reference_root", "root_args"]

W = torch.tensor([[0.5, 0.2, -0.3], [0.1, 0.4, 0.2], [-0.2, 0.3, 0.6]], dtype=torch.float64)


def root_args():
    """`(a, b)`: the right side and the strength of the coupling of `equation`."""
    return torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)


def equation(x, a, b):
    """F(x) = x + b tanh(W x) + 0.2 x^3 - a, a small nonlinear system with one root."""
    return x + b * torch.tanh(W @ x) + 0.2 * x**3 - a


def _newton_direction(x, a, b):
    residual = equation(x, a, b)
    slope = torch.eye(3, dtype=x.dtype) + torch.diag(0.6 * x**2) + b * (1 - torch.tanh(W @ x) ** 2)[:, None] * W
    return torch.linalg.inv(slope) @ residual, residual


def newton_lanes(init, a, b):
    """Newton's method that stops with its last lane, and maps under vmap."""
    x, live = init, torch.ones((), dtype=torch.bool)
    for _ in range(50):
        if not any_lane(live):
            break
        direction, residual = _newton_direction(x, a, b)
        x = torch.where(live, x - direction, x)
        live = live & (residual.abs().max() > 1e-14)
    return x


def newton_item(init, a, b):
    """Newton's method with `.item()` inside, which vmap cannot map."""
    x = init
    for _ in range(50):
        direction, residual = _newton_direction(x, a, b)
        x = x - direction
        if residual.abs().max().item() < 1e-14:
            break
    return x


def newton_unrolled(init, a, b):
    """A fixed number of Newton steps."""
    x = init
    for _ in range(12):
        x = x - _newton_direction(x, a, b)[0]
    return x


def reference_root(a, b):
    """The root by plain unrolled Newton steps."""
    return newton_unrolled(torch.zeros_like(a), a, b)
