r"""Samplers: the directions along which a function is probed.

A sampler draws directions u for which the average of :math:`c\, u u^\top` is the identity, so that

.. math:: \frac{c}{m \sigma} \sum_{i=1}^m f(x + \sigma u_i)\, u_i

estimates the gradient of f. Direction i is a function of the key and of i alone: shards of a population agree.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffopt.random import fold_in, permutation
from diffopt.typing import Shape
from diffopt.zero_order.noise import accumulate, noise

__all__ = ["Sampler", "coordinate", "gaussian", "guided", "low_rank", "orthogonal", "rademacher", "sphere"]

Draw = Callable[[Tensor, Sequence[Shape], int, int, torch.dtype], Tensor]
Sum = Callable[[Tensor, Sequence[Shape], Tensor, int], Tensor]


@dataclass(frozen=True)
class Sampler:
    """A distribution of directions.

    Args:
        name: What messages call it.
        draw: `(key, shapes, members, start, dtype) -> (members, n)`, the directions of members start, ...,
            start + members - 1 for leaves of those shapes, raveled to n numbers.
        scale: n to the constant c.
        normal: Whether each direction on its own is standard normal, so that derivatives of every order exist.
        independent: Whether directions are independent of each other.
        tensors: Tensors that `draw` holds; no derivative passes through them.
        sum: `(key, shapes, weights, start) -> (n,)`, the weighted sum of directions, where it can be had in the memory
            of one; None draws them.

    Example:
        >>> gaussian().draw(torch.tensor([42, 0]), [(2, 3), (4,)], 5, 0, torch.float32).shape
        torch.Size([5, 10])
    """

    name: str
    draw: Draw
    scale: Callable[[int], float] = lambda size: 1.0
    normal: bool = False
    independent: bool = True
    tensors: tuple[Tensor, ...] = ()
    sum: Sum | None = None


def gaussian() -> Sampler:
    r"""Standard normal directions, :math:`u \sim N(0, I)`.

    Returns:
        The sampler: its estimates are unbiased for derivatives, of every order, of the Gaussian-smoothed function.

    Example:
        >>> gaussian().normal
        True

    References:
        Nesterov and Spokoiny, "Random gradient-free minimization of convex functions", 2017, eq. 26.
    """

    def draw(key, shapes, members, start, dtype):
        return noise(key, _size(shapes), members, start=start, dtype=dtype)

    def add(key, shapes, weights, start):
        return accumulate(key, weights, _size(shapes), start=start)

    return Sampler("gaussian", draw, normal=True, sum=add)


def rademacher() -> Sampler:
    r"""Directions of random signs, :math:`u \in \{-1, 1\}^n`: simultaneous perturbation (SPSA).

    Returns:
        The sampler: with antithetic pairs, the estimate of a quadratic's gradient is unbiased, and its variance is the
        least among directions of independent entries.

    Example:
        >>> rademacher().draw(torch.tensor([42, 0]), [(3,)], 4, 0, torch.float32).abs().sum()
        tensor(12.)

    References:
        Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation", 1992,
        eq. 2.2.
    """

    def draw(key, shapes, members, start, dtype):
        return noise(key, _size(shapes), members, start=start, dtype=dtype, distribution="rademacher")

    def add(key, shapes, weights, start):
        return accumulate(key, weights, _size(shapes), start=start, distribution="rademacher")

    return Sampler("rademacher", draw, sum=add)


def sphere() -> Sampler:
    r"""Directions uniform on the unit sphere, with c = n.

    Returns:
        The sampler: its estimates are unbiased for the gradient of the function averaged over the ball of radius
        sigma.

    Example:
        >>> sphere().draw(torch.tensor([42, 0]), [(3,)], 4, 0, torch.float64).norm(dim=1).round(decimals=6)
        tensor([1., 1., 1., 1.], dtype=torch.float64)

    References:
        Flaxman, Kalai and McMahan, "Online convex optimization in the bandit setting", 2005, lemma 2.1.
    """

    def draw(key, shapes, members, start, dtype):
        z = noise(key, _size(shapes), members, start=start, dtype=dtype)
        return z / z.norm(dim=1, keepdim=True)

    return Sampler("sphere", draw, float)


def orthogonal() -> Sampler:
    r"""Standard normal directions that are orthogonal to each other, in blocks of n.

    Their variance is smaller than that of independent ones: for a linear function and m a multiple of n directions,
    :math:`2 |g|^2 / m` in place of :math:`(n + 1) |g|^2 / m`.

    Returns:
        The sampler: unbiased like `gaussian`. It decomposes a matrix of at most n x n numbers.

    Example:
        >>> u = orthogonal().draw(torch.tensor([42, 0]), [(3,)], 3, 0, torch.float64)
        >>> bool(((u @ u.T).fill_diagonal_(0).abs() < 1e-12).all())
        True

    References:
        Choromanski, Rowland, Sindhwani, Turner and Weller, "Structured evolution with compact architectures for
        scalable policy optimization", ICML 2018, section 3.
    """

    def draw(key, shapes, members, start, dtype):
        size, real = _size(shapes), torch.float64 if dtype == torch.float64 else torch.float32
        first, last = start // size, (start + members - 1) // size
        # the last directions of a block do not change the first: of a single block, what is not asked for is not drawn
        rows = size if last > first else start + members - first * size
        z = noise(key, size, (last - first + 1) * rows, start=first * size, dtype=real).reshape(-1, rows, size)
        q, r = torch.linalg.qr(z.mT)
        signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
        u = (q.mT * (signs * z.norm(dim=-1))[..., None]).reshape(-1, size)
        begin = start - first * size
        return u[begin : begin + members].to(dtype)

    return Sampler("orthogonal", draw, normal=True, independent=False)


def coordinate() -> Sampler:
    """Directions along the axes, in random order, each once in every n; c = n.

    Returns:
        The sampler: with antithetic pairs and num_samples = 2 n, central finite differences.

    Example:
        >>> coordinate().draw(torch.tensor([42, 0]), [(3,)], 3, 0, torch.float32).sum(0)
        tensor([1., 1., 1.])

    References:
        Kiefer and Wolfowitz, "Stochastic estimation of the maximum of a regression function", 1952.
    """

    def draw(key, shapes, members, start, dtype):
        size = _size(shapes)
        first, last = start // size, (start + members - 1) // size
        orders = [permutation(fold_in(key, block), size) for block in range(first, last + 1)]
        begin = start - first * size
        axes = torch.cat(orders)[begin : begin + members]
        return (axes[:, None] == torch.arange(size, device=key.device)).to(dtype)

    return Sampler("coordinate", draw, float, independent=False)


def guided(subspace: Tensor, *, alpha: float = 0.5, beta: float | None = None) -> Sampler:
    r"""Directions with more variance in a subspace that is known to be good, such as that of surrogate gradients.

    .. math:: u \sim N(0, \Sigma), \qquad \Sigma = \frac{\alpha}{n} I + \frac{1 - \alpha}{k} U U^\top, \qquad c = \beta

    Args:
        subspace: U, shape (n, k), in the order of the raveled tree (`tree.ravel`); its columns are made orthonormal.
        alpha: How much of the variance is spread over all of the space, in (0, 1].
        beta: The scale of the estimate. Default: n, which with alpha = 1 makes it unbiased.

    Returns:
        The sampler. The mean of its estimate is :math:`\beta \Sigma \nabla f`: a descent direction, and biased unless
        alpha is 1.

    Raises:
        TypeError: If the subspace is not a floating-point tensor.
        ValueError: If it is not a matrix with k <= n columns, or alpha is not in (0, 1].

    Example:
        >>> U = torch.tensor([[1.0], [0.0], [0.0]])
        >>> guided(U, alpha=0.1).draw(torch.tensor([42, 0]), [(3,)], 1000, 0, torch.float32).std(0).round(decimals=1)
        tensor([1.0000, 0.2000, 0.2000])

    References:
        Maheswaranathan, Metz, Tucker, Choi and Sohl-Dickstein, "Guided evolutionary strategies: augmenting random
        search with surrogate gradients", ICML 2019, eqs. 1 and 2.
    """
    if not isinstance(subspace, Tensor) or not subspace.is_floating_point():
        raise TypeError(f"`subspace` must be a floating-point tensor; got {_kind(subspace)}.")
    if subspace.ndim != 2 or not 1 <= subspace.shape[1] <= subspace.shape[0]:
        raise ValueError(f"`subspace` must have shape (n, k), 1 <= k <= n; got {tuple(subspace.shape)}.")
    if not 0 < alpha <= 1:
        raise ValueError(f"`alpha` must be in (0, 1]; got {alpha}.")
    n, k = subspace.shape

    def draw(key, shapes, members, start, dtype):
        if _size(shapes) != n:
            raise ValueError(f"`subspace` must have as many rows as x has numbers, {_size(shapes)}; got {n}.")
        U = torch.linalg.qr(subspace.detach()).Q.to(dtype)
        z = noise(key, n + k, members, start=start, dtype=dtype)
        return math.sqrt(alpha / n) * z[:, :n] + math.sqrt((1 - alpha) / k) * z[:, n:] @ U.mT

    return Sampler("guided", draw, lambda size: float(size) if beta is None else beta, tensors=(subspace,))


def low_rank(rank: int = 1) -> Sampler:
    r"""Directions whose matrices are of low rank: :math:`A B^\top / \sqrt{r}` for each leaf of two or more dimensions.

    A and B are standard normal, of r columns; a leaf of more dimensions is a matrix of its first by the rest. Leaves of
    fewer dimensions get standard normal directions. A network pays for r (p + q) random numbers, not p q.

    Args:
        rank: r, at least 1.

    Returns:
        The sampler: entries are uncorrelated and of variance 1, but not normal.

    Raises:
        ValueError: If the rank is not a positive int.

    Example:
        >>> u = low_rank(1).draw(torch.tensor([42, 0]), [(3, 4)], 2, 0, torch.float64)
        >>> torch.linalg.matrix_rank(u.reshape(2, 3, 4))
        tensor([1, 1])

    References:
        Sarkar et al., "Evolution strategies at the hyperscale", 2025.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"`rank` must be a positive int; got {rank!r}.")

    def draw(key, shapes, members, start, dtype):
        sizes = [_size([s]) if len(s) < 2 else rank * (s[0] + math.prod(s[1:])) for s in shapes]
        parts = noise(key, sum(sizes), members, start=start, dtype=dtype).split(sizes, dim=1)
        return torch.cat([_product(part, shape, rank) for part, shape in zip(parts, shapes, strict=True)], dim=1)

    return Sampler("low_rank", draw)


def _product(part: Tensor, shape: Shape, rank: int) -> Tensor:
    if len(shape) < 2:
        return part
    a, b = part.split([rank * shape[0], rank * math.prod(shape[1:])], dim=1)
    matrices = a.reshape(-1, shape[0], rank) @ b.reshape(-1, rank, math.prod(shape[1:]))
    return matrices.reshape(part.shape[0], -1) / math.sqrt(rank)


def _size(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
