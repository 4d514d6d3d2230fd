r"""Projections onto the balls and the spheres of the 1-, 2- and infinity-norm.

.. math:: \min_y \tfrac12 \|y - x\|_2^2 \quad\text{s.t.}\quad \|y\|_p \le r \ \text{ or }\ \|y\|_p = r
"""

import torch
from torch import Tensor

from diffopt import tree
from diffopt.convex.arguments import flatten_floating, flatten_vector, norm, scalar
from diffopt.convex.boxes import clip
from diffopt.convex.simplex import project_rows
from diffopt.typing import Numeric, Tree

__all__ = [
    "projection_l1_ball",
    "projection_l1_sphere",
    "projection_l2_ball",
    "projection_l2_sphere",
    "projection_linf_ball",
]


def projection_l1_sphere(x: Tree, value: Numeric = 1.0) -> Tree:
    r"""Project onto the sphere of the 1-norm.

    .. math:: \arg\min_{\|y\|_1 = r} \tfrac12 \|y - x\|^2 = \mathrm{sign}(x)\, P_{\triangle_r}(|x|)

    Args:
        x: A tree of floating-point tensors of one dtype, taken as one vector.
        value: The radius r, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x, a nearest point of the sphere; there are several where an entry inside is 0, and then the one
        with that entry positive is taken.

    Raises:
        TypeError: If a leaf is not a floating-point tensor, or dtypes are mixed.
        ValueError: If value is negative or has dimensions, or x is empty.

    Example:
        >>> projection_l1_sphere(torch.tensor([1.0, -1.8, 0.5]))
        tensor([ 0.1000, -0.9000,  0.0000])

    References:
        Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions", ICML 2008, section 4.
    """
    vector, unravel = flatten_vector(x, "x")
    return unravel(_onto_l1_sphere(vector, scalar(value, "value", vector, at_least=0.0)))


def projection_l1_ball(x: Tree, max_value: Numeric = 1.0) -> Tree:
    r"""Project onto the ball of the 1-norm.

    .. math:: \arg\min_{\|y\|_1 \le r} \tfrac12 \|y - x\|^2 = \begin{cases} x & \|x\|_1 \le r \\
              \mathrm{sign}(x)\, P_{\triangle_r}(|x|) & \text{else} \end{cases}

    Args:
        x: A tree of floating-point tensors of one dtype, taken as one vector.
        max_value: The radius r, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x. On the sphere itself the derivative is that of the inside.

    Raises:
        TypeError: If a leaf is not a floating-point tensor, or dtypes are mixed.
        ValueError: If max_value is negative or has dimensions, or x is empty.

    Example:
        >>> projection_l1_ball(torch.tensor([1.0, -0.8, 0.1]))
        tensor([ 0.6000, -0.4000,  0.0000])

    References:
        Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions", ICML 2008, section 4.
    """
    vector, unravel = flatten_vector(x, "x")
    radius = scalar(max_value, "max_value", vector, at_least=0.0)
    inside = vector.abs().sum() <= radius
    return unravel(torch.where(inside, vector, _onto_l1_sphere(vector, radius)))


def projection_l2_sphere(x: Tree, value: Numeric = 1.0) -> Tree:
    r"""Project onto the sphere of the 2-norm.

    .. math:: \arg\min_{\|y\|_2 = r} \tfrac12 \|y - x\|^2 = r\, \frac{x}{\|x\|_2}

    Args:
        x: A tree of floating-point tensors of one dtype, taken as one vector.
        value: The radius r, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x. At x = 0 every point of the sphere is nearest: the one with all entries equal is returned, with
        derivative 0 in x.

    Raises:
        TypeError: If a leaf is not a floating-point tensor, or dtypes are mixed.
        ValueError: If value is negative or has dimensions, or x is empty.

    Example:
        >>> projection_l2_sphere(torch.tensor([3.0, -4.0]))
        tensor([ 0.6000, -0.8000])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.5.1.
    """
    vector, unravel = flatten_vector(x, "x")
    radius = scalar(value, "value", vector, at_least=0.0)
    length = norm(vector)
    nonzero = length != 0  # NaN stays
    direction = torch.where(nonzero, vector / torch.where(nonzero, length, 1.0), vector.numel() ** -0.5)
    return unravel(radius * direction)


def projection_l2_ball(x: Tree, max_value: Numeric = 1.0) -> Tree:
    r"""Project onto the ball of the 2-norm.

    .. math:: \arg\min_{\|y\|_2 \le r} \tfrac12 \|y - x\|^2 = x\, \min\left(1, \frac{r}{\|x\|_2}\right)

    Args:
        x: A tree of floating-point tensors of one dtype, taken as one vector.
        max_value: The radius r, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x. On the sphere itself, and at 0, the derivative is that of the inside.

    Raises:
        TypeError: If a leaf is not a floating-point tensor, or dtypes are mixed.
        ValueError: If max_value is negative or has dimensions, or x is empty.

    Example:
        >>> projection_l2_ball(torch.tensor([3.0, -4.0]))
        tensor([ 0.6000, -0.8000])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.5.1.
    """
    vector, unravel = flatten_vector(x, "x")
    radius = scalar(max_value, "max_value", vector, at_least=0.0)
    length = norm(vector)
    inside = length <= radius  # not so of NaN, which stays
    return unravel(torch.where(inside, vector, radius * (vector / torch.where(inside, 1.0, length))))


def projection_linf_ball(x: Tree, max_value: Numeric = 1.0) -> Tree:
    r"""Project onto the ball of the infinity-norm: :math:`y = \min(\max(x, -r), r)`.

    Args:
        x: A tree of floating-point tensors of any shapes.
        max_value: The radius r, at least 0, a number or a 0-d tensor.

    Returns:
        A tree like x.

    Raises:
        TypeError: If a leaf is not a floating-point tensor.
        ValueError: If max_value is negative or has dimensions.

    Example:
        >>> projection_linf_ball(torch.tensor([3.0, -0.5]))
        tensor([ 1.0000, -0.5000])

    References:
        Parikh and Boyd, "Proximal algorithms", 2014, section 6.5.2.
    """
    leaves, treespec = flatten_floating(x, "x")
    radii = [scalar(max_value, "max_value", leaf, at_least=0.0) for leaf in leaves]
    return tree.unflatten(treespec, [clip(leaf, -r, r) for leaf, r in zip(leaves, radii, strict=True)])


def _onto_l1_sphere(x: Tensor, radius: Numeric) -> Tensor:
    sign = torch.where(x < 0, -1.0, 1.0).to(x.dtype)
    return sign * project_rows(sign * x, radius)
