r"""Bilevel problems whose losses are means over samples, and the vector products that methods take of them.

.. math:: \min_x\; h(x) = F(z^\star(x), x), \qquad z^\star(x) = \arg\min_z G(z, x), \qquad
          G = \frac1n \sum_i G_i, \quad F = \frac1m \sum_j F_j
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import grad, vjp
from diffopt.typing import Tree

__all__ = ["BilevelProblem", "Products", "products_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class BilevelProblem:
    r"""A bilevel problem of two finite sums.

    .. math:: \min_x F(z^\star(x), x), \qquad z^\star(x) = \arg\min_z G(z, x)

    Args:
        inner: `inner(z, x, batch)`, a scalar: the mean of :math:`G_i` over the samples of a batch, strongly convex in
            `z` in the mean over all. `batch` is a tree like `inner_data` with fewer samples.
        outer: `outer(z, x, batch)`, a scalar: the mean of :math:`F_j` over the samples of a batch.
        inner_data: All samples of the inner problem, a tree of tensors of one leading size `n`.
        outer_data: All samples of the outer problem, likewise, of leading size `m`.

    Raises:
        TypeError: If a loss is no function, or a leaf of the data no tensor.
        ValueError: If there are no samples, or leaves differ in their number.

    Example:
        >>> ridge = lambda w, penalty, batch: ((batch - w) ** 2).mean() + penalty.exp() * (w**2).sum()
        >>> error = lambda w, penalty, batch: ((batch - w) ** 2).mean()
        >>> problem = BilevelProblem(ridge, error, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0]))
        >>> problem.inner_size, problem.outer_size
        (3, 2)

    References:
        Dagréou, Ablin, Vaiter and Moreau (2022), A framework for bilevel optimization that enables stochastic and
        global variance reduction algorithms, section 1.
    """

    inner: Callable[[Tree, Tree, Tree], Tensor]
    outer: Callable[[Tree, Tree, Tree], Tensor]
    inner_data: Tree
    outer_data: Tree

    def __post_init__(self):
        for name in ("inner", "outer"):
            loss = getattr(self, name)
            if not callable(loss):
                raise TypeError(f"`{name}` must be a function (z, x, batch) -> scalar; got {loss!r:.60}.")
            _check_data(getattr(self, f"{name}_data"), f"{name}_data")

    @property
    def inner_size(self) -> int:
        """The number of samples of the inner problem."""
        return tree.leaves(self.inner_data)[0].shape[0]

    @property
    def outer_size(self) -> int:
        """The number of samples of the outer problem."""
        return tree.leaves(self.outer_data)[0].shape[0]


class Products(NamedTuple):
    """The first derivatives of a problem, and products with its second, at flat vectors.

    Attributes:
        problem: The problem.
        unravel_z: From a flat vector to a tree like `z`.
        unravel_x: From a flat vector to a tree like `x`.
    """

    problem: BilevelProblem
    unravel_z: Callable[[Tensor], Tree]
    unravel_x: Callable[[Tensor], Tree]

    def inner_z(self, z: Tensor, x: Tensor, batch: Tensor) -> Tensor:
        r"""The slope :math:`\nabla_1 G` over a batch of indices."""
        return grad(self._inner(batch))(z, x)

    def inner_x(self, z: Tensor, x: Tensor, batch: Tensor) -> Tensor:
        r"""The slope :math:`\nabla_2 G` over a batch of indices."""
        return grad(self._inner(batch), argnums=1)(z, x)

    def outer_z(self, z: Tensor, x: Tensor, batch: Tensor) -> Tensor:
        r"""The slope :math:`\nabla_1 F` over a batch of indices."""
        return grad(self._outer(batch))(z, x)

    def outer_x(self, z: Tensor, x: Tensor, batch: Tensor) -> Tensor:
        r"""The slope :math:`\nabla_2 F` over a batch of indices."""
        return grad(self._outer(batch), argnums=1)(z, x)

    def outer(self, z: Tensor, x: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        r"""The slopes :math:`\nabla_1 F, \nabla_2 F` over a batch of indices."""
        return grad(self._outer(batch), argnums=(0, 1))(z, x)

    def inner(self, z: Tensor, x: Tensor, v: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""The slope :math:`\nabla_1 G` and the products :math:`\nabla^2_{11} G\, v,\ \nabla^2_{21} G\, v`."""
        slope, pull = vjp(grad(self._inner(batch)), z, x)
        hessian_v, cross_v = pull(v)
        return slope, hessian_v, cross_v

    def hessian(self, z: Tensor, x: Tensor, v: Tensor, batch: Tensor) -> Tensor:
        r"""The product :math:`\nabla^2_{11} G\, v` over a batch of indices."""
        fn = self._inner(batch)
        return vjp(lambda z: grad(fn)(z, x), z)[1](v)[0]

    def cross(self, z: Tensor, x: Tensor, v: Tensor, batch: Tensor) -> Tensor:
        r"""The product :math:`\nabla^2_{21} G\, v` over a batch of indices."""
        fn = self._inner(batch)
        return vjp(lambda x: grad(fn)(z, x), x)[1](v)[0]

    def inner_rows(self, z: Tensor, x: Tensor, v: Tensor, batch: Tensor) -> Tensor:
        r"""All that `inner` gives, side by side, of each sample on its own: a row a sample."""
        fn, (zs, xs, vs) = self._inner_sum(batch), (_repeated(t, batch) for t in (z, x, v))
        slopes, pull = vjp(grad(fn), zs, xs)
        return torch.cat([slopes, *pull(vs)], dim=1)

    def outer_rows(self, z: Tensor, x: Tensor, batch: Tensor) -> Tensor:
        r"""All that `outer` gives, side by side, of each sample on its own: a row a sample."""
        zs, xs = _repeated(z, batch), _repeated(x, batch)
        return torch.cat(grad(self._outer_sum(batch), argnums=(0, 1))(zs, xs), dim=1)

    def _inner(self, batch: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return self._on_vectors(self.problem.inner, _samples(self.problem.inner_data, batch))

    def _outer(self, batch: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return self._on_vectors(self.problem.outer, _samples(self.problem.outer_data, batch))

    def _inner_sum(self, batch: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return self._sum(self.problem.inner, _samples(self.problem.inner_data, batch))

    def _outer_sum(self, batch: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return self._sum(self.problem.outer, _samples(self.problem.outer_data, batch))

    def _on_vectors(self, loss: Callable[..., Tensor], samples: Tree) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, x: loss(self.unravel_z(z), self.unravel_x(x), samples)

    def _sum(self, loss: Callable[..., Tensor], samples: Tree) -> Callable[[Tensor, Tensor], Tensor]:
        """The sum of the losses of single samples, each at variables of its own: its gradient has a row a sample."""

        def single(z: Tensor, x: Tensor, sample: tuple[Tensor, ...]) -> Tensor:
            return self._on_vectors(loss, tree.unflatten(spec, [leaf[None] for leaf in sample]))(z, x).reshape(())

        leaves, spec = tree.flatten(samples)
        return lambda zs, xs: torch.func.vmap(single)(zs, xs, tuple(leaves)).sum()


def products_of(problem: BilevelProblem, z: Tree, x: Tree) -> tuple[Products, Tensor, Tensor]:
    """Flatten both variables, and give the vector products of the problem in them.

    Args:
        problem: The problem.
        z: The inner variable, a tree of tensors of one dtype.
        x: The outer variable, likewise.

    Returns:
        The products, and both variables as vectors.

    Example:
        >>> loss = lambda z, x, batch: (batch * z["a"] * x).mean()
        >>> problem = BilevelProblem(loss, loss, torch.tensor([1.0, 3.0]), torch.tensor([1.0]))
        >>> products, z, x = products_of(problem, {"a": torch.tensor(2.0)}, torch.tensor(5.0))
        >>> products.inner_z(z, x, torch.tensor([0, 1]))
        tensor([10.])
    """
    flat_z, unravel_z = tree.ravel(z)
    flat_x, unravel_x = tree.ravel(x)
    return Products(problem, unravel_z, unravel_x), flat_z, flat_x


def _samples(data: Tree, batch: Tensor) -> Tree:
    return tree.map(lambda leaf: leaf.index_select(0, batch), data)


def _repeated(x: Tensor, batch: Tensor) -> Tensor:
    return x.expand(batch.shape[0], -1)


def _check_data(data: Tree, name: str) -> None:
    tree.check_tensors(data, name=name)
    leaves = tree.leaves(data)
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(sizes) != 1 or sizes & {None, 0}:
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(f"`{name}` must have the samples first, one leading size in all leaves; got shapes {shapes}.")
