r"""Linear operators: a matrix known by its products, with the tensors it depends on held as explicit parameters.

.. math:: A_\theta : \mathbb R^n \to \mathbb R^m, \qquad v \mapsto A_\theta v, \quad u \mapsto A_\theta^\top u

Products act on trees; inside, everything is one flat vector. Because the parameters are explicit, `linear_solve` can
differentiate a solution in them without differentiating the solver's iterations.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import any_lane, check_closed, hoist, transforms_active, vjp
from diffopt.autodiff.levels import derivative_wanted
from diffopt.typing import Tree

__all__ = ["Bound", "LinearOperator", "Tag", "function_operator", "matrix_operator"]

Tag: TypeAlias = Literal[
    "symmetric", "positive_definite", "diagonal", "tridiagonal", "lower_triangular", "upper_triangular"
]
Product: TypeAlias = Callable[[Tensor], Tensor]

_TRANSPOSED = {"lower_triangular": "upper_triangular", "upper_triangular": "lower_triangular"}
FEW = 8  # rows that cost less one by one than through vmap


class Bound(NamedTuple):
    """An operator at given parameters, on flat vectors: its two products, its dense matrix, and whether it holds it.

    A transposed one keeps the product that it was given, `untransposed`: where the operator is symmetric, that has the
    same values, without the automatic transposition.
    """

    matvec: Product
    rmatvec: Product
    dense: Callable[[], Tensor]
    held: bool = False
    untransposed: Product | None = None


class Space(NamedTuple):
    """The trees that an operator takes or returns, as flat vectors."""

    size: int
    dtype: torch.dtype
    device: torch.device
    unravel: Callable[[Tensor], Tree]

    def check(self, value: Tree, name: str) -> Tensor:
        """The vector of a tree of this space, once its structure, shapes, dtype and device are known to be right."""
        vector, _ = tree.ravel(value)
        if vector.numel() != self.size:
            raise ValueError(f"{name} must have {self.size} elements; got {vector.numel()}. Use vmap for several")
        self.check_kind(vector, name)
        tree.check_like(value, self.unravel(vector), name=name, reference_name="the operator's space")
        return vector

    def check_kind(self, tensor: Tensor, name: str) -> None:
        """Raise unless a tensor has the dtype and device of this space."""
        if tensor.dtype != self.dtype or tensor.device != self.device:
            raise TypeError(
                f"{name} must be {self.dtype} on {self.device}, like the operator; got {tensor.dtype}, {tensor.device}"
            )

    @staticmethod
    def like(example: Tree) -> "Space":
        return Space.of(*tree.ravel(example))

    @staticmethod
    def of(vector: Tensor, unravel: Callable[[Tensor], Tree]) -> "Space":
        if not vector.is_floating_point():
            advice = "; pass torch.view_as_real of complex tensors" if vector.is_complex() else ""
            raise TypeError(f"real floating-point tensors are needed; got {vector.dtype}{advice}")
        return Space(vector.numel(), vector.dtype, vector.device, unravel)

    def zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=self.dtype, device=self.device)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearOperator:
    r"""A linear map known by its products.

    .. math:: v \mapsto A_\theta v

    Made by `matrix_operator`, `function_operator`, `jacobian_operator`, `hessian_operator` and
    `gauss_newton_operator`.

    Args:
        bind: `(*parameters) -> Bound`; captures no tracked tensor.
        parameters: the tensors that the operator depends on, flat.
        domain: what it takes.
        codomain: what it returns.
        tags: what is known of its structure.

    Example:
        >>> A = matrix_operator(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), tags=["upper_triangular"])
        >>> A.matvec(torch.ones(2)), A.transpose().matvec(torch.ones(2))
        (tensor([3., 3.]), tensor([2., 4.]))
    """

    bind: Callable[..., Bound]
    parameters: tuple[Tensor, ...]
    domain: Space
    codomain: Space
    tags: frozenset[Tag] = frozenset()

    @property
    def shape(self) -> tuple[int, int]:
        """`(m, n)`: numbers of elements out and in."""
        return self.codomain.size, self.domain.size

    @property
    def symmetric(self) -> bool:
        """Whether the tags say that the operator equals its transpose."""
        return bool(self.tags & {"symmetric", "positive_definite", "diagonal"})

    def bind_values(self, *parameters: Tensor) -> Bound:
        """`bind`, for values that are not differentiated: a symmetric operator needs no transposed product."""
        bound = self.bind(*parameters)
        if not self.symmetric:
            return bound
        product = bound.untransposed or bound.matvec
        return bound._replace(matvec=product, rmatvec=product)

    def matvec(self, v: Tree) -> Tree:
        """The product `A v`, a tree like the codomain."""
        return self.codomain.unravel(self.bind(*self.parameters).matvec(self.domain.check(v, "v")))

    def rmatvec(self, u: Tree) -> Tree:
        """The product `A^T u`, a tree like the domain."""
        return self.domain.unravel(self.bind(*self.parameters).rmatvec(self.codomain.check(u, "u")))

    def transpose(self, *, trusted: bool = True) -> "LinearOperator":
        """The operator `A^T`.

        Args:
            trusted: Whether the tags are known to hold. If not, its products are those of the transpose also where it
                is tagged symmetric, so that a solver's own check sees the right system.
        """

        def bind(*parameters):
            bound = self.bind(*parameters)
            return Bound(
                bound.rmatvec, bound.matvec, lambda: bound.dense().mT, bound.held, bound.matvec if trusted else None
            )

        tags = frozenset(_TRANSPOSED.get(tag, tag) for tag in self.tags)
        return dataclasses.replace(self, bind=bind, domain=self.codomain, codomain=self.domain, tags=tags)

    def materialize(self) -> Tensor:
        """The dense matrix of shape `(m, n)`, on flat vectors."""
        return self.bind(*self.parameters).dense()

    def shifted(self, damping: float | Tensor) -> "LinearOperator":
        r"""The operator :math:`A + \lambda I`, differentiable in a tensor :math:`\lambda`."""
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"only a square operator can be shifted; got shape {self.shape}")
        shift = torch.as_tensor(damping, dtype=self.domain.dtype, device=self.domain.device)

        def bind(*parameters):
            *inner, shift = parameters
            bound = self.bind(*inner)
            size, dtype, device = self.domain.size, self.domain.dtype, self.domain.device
            return Bound(
                lambda v: bound.matvec(v) + shift * v,
                lambda u: bound.rmatvec(u) + shift * u,
                lambda: bound.dense() + shift * torch.eye(size, dtype=dtype, device=device),
                bound.held,
            )

        return dataclasses.replace(self, bind=bind, parameters=(*self.parameters, shift))


def matrix_operator(
    A: Tensor, *, tags: Iterable[Tag] = (), domain: Tree = None, codomain: Tree = None
) -> LinearOperator:
    """The operator of a dense matrix.

    Args:
        A: floating-point tensor of shape `(m, n)`.
        tags: what is known of its structure; believed, not checked.
        domain: an example of the tree it takes, of n elements in all; a vector by default.
        codomain: an example of the tree it returns, of m elements in all; a vector by default.

    Returns:
        The operator, differentiable in `A`.

    Raises:
        TypeError: if `A` is not a floating-point tensor.
        ValueError: if a shape or a tag is wrong.

    Example:
        >>> matrix_operator(torch.eye(3)).shape
        (3, 3)
    """
    if not isinstance(A, Tensor) or not A.is_floating_point():
        raise TypeError(f"A must be a real floating-point tensor; got {getattr(A, 'dtype', type(A).__name__)}")
    if A.dim() != 2:
        raise ValueError(f"A must have shape (m, n); got {tuple(A.shape)}. Map over batches with vmap")
    spaces = [
        Space.like(A.new_empty(n) if example is None else example)
        for n, example in zip(A.shape, (codomain, domain), strict=True)
    ]
    for n, space, name in zip(A.shape, spaces, ("codomain", "domain"), strict=True):
        if space.size != n:
            raise ValueError(f"a matrix of shape {tuple(A.shape)} needs a {name} of {n} elements; got {space.size}")
    tags = checked_tags(tags, A.shape[0], A.shape[1])
    return LinearOperator(_bind_matrix, (A,), spaces[1], spaces[0], tags)


def _bind_matrix(A: Tensor) -> Bound:
    return Bound(lambda v: A @ v, lambda u: A.mT @ u, lambda: A, held=True)


def function_operator(
    fn: Callable[[Any, Tree], Tree], parameters: Tree, example: Tree, *, tags: Iterable[Tag] = ()
) -> LinearOperator:
    r"""The operator of a function that is linear in its second argument.

    .. math:: v \mapsto f(\theta, v)

    The transpose is taken by automatic differentiation.

    Args:
        fn: `(parameters, v) -> A v`, linear in `v` (believed, not checked).
        parameters: a tree of tensors to differentiate in; what else `fn` captures is found and added.
        example: a tree like `v`; its values do not matter.
        tags: what is known of its structure.

    Returns:
        The operator.

    Raises:
        TypeError: if `example` or the output mixes dtypes or devices, or is not floating-point.
        ValueError: if a tag is wrong.

    Example:
        >>> A = function_operator(lambda d, v: d * v, torch.tensor([1.0, 2.0]), torch.ones(2), tags=["diagonal"])
        >>> A.matvec(torch.tensor([3.0, 4.0]))
        tensor([3., 8.])
    """
    tree.check_tensors(parameters, name="parameters")
    rebuild, captured, complete = hoist(fn)
    leaves, spec = tree.flatten(parameters)
    domain = Space.like(example)
    with torch.no_grad():
        at_zero, unravel = tree.ravel(fn(parameters, tree.zeros_like(example)))
        codomain = Space.of(at_zero, unravel)
    if not torch.compiler.is_compiling() and any_lane(at_zero != 0):
        raise ValueError("fn must be linear in v, but fn(parameters, 0) is not 0")

    def bind(*flat):
        given, found = spec.unflatten(flat[: len(leaves)]), flat[len(leaves) :]
        closed = rebuild(*found)

        def product(v):
            return tree.ravel(closed(given, domain.unravel(v)))[0]

        return bound_of(product, lambda u: vjp(product, domain.zeros())[1](u)[0], domain, codomain)

    if not complete and derivative_wanted():
        check_closed(lambda *flat: bind(*flat).matvec(domain.zeros()), (*leaves, *captured), name="fn")
    return LinearOperator(bind, (*leaves, *captured), domain, codomain, checked_tags(tags, codomain.size, domain.size))


def bound_of(matvec: Product, rmatvec: Product, domain: Space, codomain: Space) -> Bound:
    """An operator known by its products; its matrix is made of rows, or of columns where they are fewer."""
    few, product = (domain, matvec) if domain.size < codomain.size else (codomain, rmatvec)

    def dense():
        if few.size == 0:
            raise ValueError("an operator on zero elements has no matrix")
        units = torch.eye(few.size, dtype=few.dtype, device=few.device)
        if few.size <= FEW and not transforms_active():
            found = torch.stack([product(unit) for unit in units])
        else:
            found = torch.func.vmap(product)(units)
        return found if few is codomain else found.mT

    return Bound(matvec, rmatvec, dense)


def checked_tags(tags: Iterable[Tag], m: int, n: int, *known: Tag) -> frozenset[Tag]:
    """Tags with what is known, once they are known to be tags, and the operator to be square if there are any."""
    if isinstance(tags, str):
        raise TypeError(f"tags must be a collection of strings; got {tags!r}, write tags=[{tags!r}]")
    found = frozenset((*tags, *known))
    unknown = found - set(get_args(Tag))
    if unknown:
        raise ValueError(f"unknown tags {sorted(unknown)}; the tags are {', '.join(get_args(Tag))}")
    if found and m != n:
        raise ValueError(f"tags describe square operators; got {sorted(found)} for shape {(m, n)}")
    return found
