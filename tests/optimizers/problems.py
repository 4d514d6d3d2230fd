"""One small problem for all optimizers: a nested tree of parameters and a smooth loss."""

import torch

from diffopt import tree


def start(dtype=torch.float64):
    """Parameters: a matrix, a vector and a scalar."""
    generator = torch.Generator().manual_seed(0)
    w, b, s = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in [(3, 2), (2,), ()])
    return {"w": w.to(dtype), "b": (b.to(dtype), s.to(dtype))}


def loss(params):
    """A smooth loss of bounded curvature that couples the leaves."""
    w, (b, s) = params["w"], params["b"]
    return 0.5 * ((w + b) ** 2).sum() + torch.log(torch.cosh(w * s - 1)).sum() + 0.5 * (s - 0.3) ** 2


def torch_trajectory(optimizer_class, steps=20, **options):
    """Leaves of the parameters after each step of a torch optimizer."""
    leaves, treespec = tree.flatten(start())
    leaves = [leaf.requires_grad_() for leaf in leaves]
    optimizer = optimizer_class(leaves, **options)
    trajectory = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(tree.unflatten(treespec, leaves)).backward()
        optimizer.step()
        trajectory.append([leaf.detach().clone() for leaf in leaves])
    return trajectory
