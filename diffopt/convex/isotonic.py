r"""Isotonic regression: the projection onto monotone sequences, by pooling adjacent violators.

.. math:: \min_z \tfrac12 \sum_i w_i (z_i - y_i)^2 \quad\text{s.t.}\quad z_1 \le z_2 \le \dots \le z_n
"""

import torch
from torch import Tensor

from diffopt.autodiff import while_loop
from diffopt.convex.arguments import check_tensor, check_vector, unless

__all__ = ["isotonic_regression"]


def isotonic_regression(y: Tensor, weights: Tensor | None = None, *, increasing: bool = True) -> Tensor:
    r"""Fit a monotone sequence by weighted least squares.

    .. math:: z_i = \frac{\sum_{j \in B(i)} w_j y_j}{\sum_{j \in B(i)} w_j}

    The blocks B are found by pooling neighbours that violate the order, all runs of them at once. The derivatives are
    those of the means: in y, the Jacobian is the averaging over each block.

    Args:
        y: The sequence, shape (n,); map over several with `torch.func.vmap`.
        weights: The weights w, shape (n,), positive; None is 1. They carry gradient.
        increasing: Whether the fit rises; otherwise it falls.

    Returns:
        The fit z, shape (n,). Neighbours of equal means count as separate blocks.

    Raises:
        TypeError: If an argument is not floating-point.
        ValueError: If y is not a vector, weights are not shaped like y, or one is not positive.

    Example:
        >>> isotonic_regression(torch.tensor([1.0, 3.0, 2.0, 4.0]))
        tensor([1.0000, 2.5000, 2.5000, 4.0000])

    References:
        Best and Chakravarti, "Active set algorithms for isotonic regression", Mathematical Programming 1990, section 2.
        Blondel et al., "Fast differentiable sorting and ranking", ICML 2020, proposition 4.
    """
    check_tensor(y, "y")
    if y.ndim != 1:
        raise ValueError(
            f"`y` must be a vector; got {tuple(y.shape)}. Map over several sequences with torch.func.vmap."
        )
    if weights is None:
        weights = torch.ones_like(y.detach())
    check_vector(weights, "weights", y.shape[0])
    weights = weights.to(y.dtype)
    unless((weights > 0).all(), "`weights` must be positive; leave out the entries that are to have none.")
    if y.numel() < 2:
        return y * 1
    sign = 1.0 if increasing else -1.0
    blocks = _pool(sign * y.detach(), weights.detach())
    # the first entry of each block is held constant: means of differences lose no digits to large entries
    base = _first(y.detach(), blocks)
    return base + _means(y - base, weights, blocks)


def _pool(y: Tensor, weights: Tensor) -> Tensor:
    """The number of the block of each entry, counted from 0."""

    def steps(blocks):
        means = _means(y, weights, blocks)
        return means.diff(), blocks.diff() != 0

    def live(blocks):
        rise, edge = steps(blocks)
        return (edge & (rise < 0)).any()

    def body(blocks):
        rise, edge = steps(blocks)
        kept = edge & (rise >= 0)
        return torch.cat([torch.zeros_like(blocks[:1]), kept.to(blocks.dtype).cumsum(0)])

    start = torch.arange(y.numel(), device=y.device) + torch.zeros_like(y, dtype=torch.int64)
    return while_loop(live, body, start, max_steps=y.numel())


def _means(y: Tensor, weights: Tensor, blocks: Tensor) -> Tensor:
    zeros = torch.zeros_like(y.detach())
    totals = zeros.scatter_add(0, blocks, weights * y)
    masses = zeros.scatter_add(0, blocks, weights)
    return totals.gather(0, blocks) / masses.gather(0, blocks)


def _first(y: Tensor, blocks: Tensor) -> Tensor:
    edge = torch.cat([torch.ones_like(blocks[:1]), blocks.diff()]) > 0
    places = torch.where(edge, torch.arange(y.numel(), device=y.device), 0).cummax(0).values
    return y.gather(0, places)
