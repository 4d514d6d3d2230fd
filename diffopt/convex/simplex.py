r"""Projections onto the simplex, by distance and by Kullback-Leibler divergence.

.. math:: \triangle_s = \{y \ge 0, \ \textstyle\sum_i y_i = s\}
"""

import torch
from torch import Tensor

from diffopt.convex.arguments import detached, flatten_vector, scalar
from diffopt.typing import Numeric, Tree

__all__ = ["kl_projection_simplex", "projection_simplex"]


def projection_simplex(x: Tree, value: Numeric = 1.0) -> Tree:
    r"""Project onto the simplex, which is sparsemax.

    .. math:: \arg\min_{y \in \triangle_s} \tfrac12 \|y - x\|^2 = \max(x - \tau, 0), \qquad
              \tau = \frac{\sum_{i \in S} x_i - s}{|S|}

    The support S is found by sorting. The Jacobian is :math:`\mathrm{diag}(1_S) - 1_S 1_S^\top / |S|`, and all higher
    derivatives are 0.

    Args:
        x: A tree of floating-point tensors of one dtype, taken as one vector, of any magnitude. Entries may be -inf,
            which excludes them.
        value: The sum s, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x. An entry on the edge of the support counts as outside.

    Raises:
        TypeError: If a leaf is not a floating-point tensor, or dtypes are mixed.
        ValueError: If value is negative or has dimensions, or x is empty.

    Example:
        >>> projection_simplex(torch.tensor([0.6, 0.1, -0.4, 0.55]))
        tensor([0.5167, 0.0167, 0.0000, 0.4667])

    References:
        Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions", ICML 2008, figure 1.
        Martins and Astudillo, "From softmax to sparsemax", ICML 2016, algorithm 1 and eq. 7.
    """
    vector, unravel = flatten_vector(x, "x")
    return unravel(project_rows(vector, scalar(value, "value", vector, at_least=0.0)))


def kl_projection_simplex(x: Tree, value: Numeric = 1.0) -> Tree:
    r"""Project onto the simplex by Kullback-Leibler divergence, which is softmax.

    .. math:: \arg\min_{y \in \triangle_s} \mathrm{KL}(y, e^x) = s\,\frac{e^{x}}{\sum_i e^{x_i}}

    Args:
        x: A tree of floating-point tensors of one dtype, taken as one vector; entries may be -inf.
        value: The sum s, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x.

    Raises:
        TypeError: If a leaf is not a floating-point tensor, or dtypes are mixed.
        ValueError: If value is negative or has dimensions, or x is empty.

    Example:
        >>> kl_projection_simplex(torch.tensor([0.0, 0.0, -torch.inf]))
        tensor([0.5000, 0.5000, 0.0000])

    References:
        Blondel, Martins and Niculae, "Learning with Fenchel-Young losses", JMLR 2020, table 1.
    """
    vector, unravel = flatten_vector(x, "x")
    return unravel(scalar(value, "value", vector, at_least=0.0) * torch.softmax(vector, -1))


def project_rows(x: Tensor, value: Numeric) -> Tensor:
    """The projection of each row of a tensor onto the simplex of its value, of shape (..., 1) or 0-d.

    A row that holds NaN or inf becomes NaN.
    """
    # the largest entry is held constant: a common shift moves no projection
    largest = x.detach().amax(-1, keepdim=True)
    shifted = x - largest
    support = _support(shifted.detach(), detached(value))
    count = support.sum(-1, keepdim=True).clamp(min=1)
    tau = (torch.where(support, shifted, 0.0).sum(-1, keepdim=True) - value) / count
    zero = (largest - largest) + (tau - tau).detach()  # or NaN
    return torch.where(support, (shifted - tau).clamp(min=0), zero)


def _support(shifted: Tensor, value: Numeric) -> Tensor:
    """Where the projection is positive, for rows whose largest entry is 0: entries below -value are never in it."""
    # twice as far, because the threshold itself may be at -value
    bounded = torch.maximum(shifted, -2 * torch.as_tensor(value, dtype=shifted.dtype, device=shifted.device))
    ordered = bounded.sort(-1, descending=True).values
    ranks = torch.arange(1, shifted.shape[-1] + 1, device=shifted.device)
    inside = ordered * ranks > ordered.cumsum(-1) - value
    tau = (torch.where(inside, ordered, 0.0).sum(-1, keepdim=True) - value) / inside.sum(-1, keepdim=True).clamp(min=1)
    return bounded > tau
