r"""Operators that are derivatives: Jacobians, Hessians and Gauss-Newton matrices, by products alone.

.. math:: \partial f(x), \qquad \nabla^2 \ell(x), \qquad J^\top \nabla^2 \ell\, J
"""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from diffopt import tree
from diffopt.autodiff import check_closed, grad, hoist, linearize
from diffopt.autodiff.levels import derivative_wanted
from diffopt.linalg.operators import LinearOperator, Space, Tag, bound_of, checked_tags
from diffopt.typing import Tree

__all__ = ["flat_jacobian", "gauss_newton_operator", "hessian_operator", "jacobian_operator"]


def jacobian_operator(
    fn: Callable[..., Tree], x: Tree, *args: Tree, tags: Iterable[Tag] = (), codomain: Tree = None
) -> LinearOperator:
    r"""The Jacobian of a function at a point.

    .. math:: v \mapsto \partial_x f(x, \theta)\, v

    Args:
        fn: `(x, *args) -> tree`.
        x: a tree of floating-point tensors, the point.
        args: trees; their tensors, and what `fn` captures, are parameters like `x`.
        tags: what is known of its structure.
        codomain: an example of the tree that `fn` returns; None evaluates it.

    Returns:
        The operator, which evaluates `fn` once per binding and not once per product.

    Example:
        >>> J = jacobian_operator(lambda x: x**2, torch.tensor([1.0, 2.0]))
        >>> J.materialize()
        tensor([[2., 0.],
                [0., 4.]])
    """
    rebuild, captured, complete = hoist(fn)
    vector, unravel = tree.ravel(x)
    leaves, fill = tree.partition(args)
    domain = Space.like(x)
    with torch.no_grad():
        image = Space.like(fn(x, *args) if codomain is None else codomain)

    def flat_fn(vector, *flat):
        args, found = fill(flat[: len(leaves)]), flat[len(leaves) :]
        return tree.ravel(rebuild(*found)(unravel(vector), *args))[0]

    parameters = (vector, *leaves, *captured)
    if not complete and derivative_wanted():
        check_closed(flat_fn, parameters, name="fn")
    return flat_jacobian(flat_fn, parameters, domain, image, checked_tags(tags, image.size, domain.size))


def flat_jacobian(
    fn: Callable[..., Tensor],
    parameters: tuple[Tensor, ...],
    domain: Space,
    codomain: Space,
    tags: frozenset[Tag] = frozenset(),
) -> LinearOperator:
    """The Jacobian of a closed function of flat tensors in the first of its parameters, a vector."""

    def bind(*flat):
        _, pull, push = linearize(lambda v: fn(v, *flat[1:]), flat[0])
        return bound_of(lambda v: push(v)[0], lambda u: pull(u)[0], domain, codomain)

    return LinearOperator(bind, parameters, domain, codomain, tags)


def hessian_operator(loss: Callable[..., Tensor], x: Tree, *args: Tree, tags: Iterable[Tag] = ()) -> LinearOperator:
    r"""The Hessian of a scalar function at a point, by Hessian-vector products.

    .. math:: v \mapsto \nabla^2_x \ell(x, \theta)\, v

    Args:
        loss: `(x, *args) -> scalar tensor`.
        x: a tree of floating-point tensors, the point.
        args: trees; their tensors, and what `loss` captures, are parameters like `x`.
        tags: further structure, such as "positive_definite"; "symmetric" is known.

    Returns:
        The operator.

    Example:
        >>> H = hessian_operator(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
        >>> H.matvec(torch.ones(2))
        tensor([ 6., 12.])

    References:
        Pearlmutter (1994), Fast exact multiplication by the Hessian, eq. 1.
    """
    operator = jacobian_operator(grad(loss), x, *args)
    tags = checked_tags(tags, *operator.shape, "symmetric")

    def bind(*flat):
        bound = operator.bind(*flat)
        return bound._replace(matvec=bound.rmatvec)  # one pullback is cheaper than a pushforward

    return dataclasses.replace(operator, bind=bind, tags=tags)


def gauss_newton_operator(
    model: Callable[..., Tree], loss: Callable[[Tree], Tensor], x: Tree, *args: Tree, tags: Iterable[Tag] = ()
) -> LinearOperator:
    r"""The generalized Gauss-Newton matrix of a loss of a model's output.

    .. math:: v \mapsto J^\top \nabla^2 \ell(f(x))\, J v, \qquad J = \partial_x f(x)

    Positive semi-definite for a convex loss; damp it before solving.

    Args:
        model: `(x, *args) -> outputs`, a tree.
        loss: `outputs -> scalar tensor`.
        x: a tree of floating-point tensors, the point.
        args: trees; their tensors, and what the functions capture, are parameters like `x`.
        tags: further structure; "symmetric" is known.

    Returns:
        The operator.

    Example:
        >>> G = gauss_newton_operator(lambda x: x**2, lambda y: (y**2).sum() / 2, torch.tensor([1.0, 2.0]))
        >>> G.matvec(torch.ones(2))
        tensor([ 4., 16.])

    References:
        Schraudolph (2002), Fast curvature matrix-vector products, section 3.
    """
    rebuild, captured, complete = hoist(model, loss)
    x_vector, unravel = tree.ravel(x)
    leaves, spec = tree.flatten(args)
    domain = Space.like(x)
    with torch.no_grad():
        codomain = Space.like(model(x, *args))

    def closed(flat):
        closed_model, closed_loss = rebuild(*flat[1 + len(leaves) :])
        args = spec.unflatten(flat[1 : 1 + len(leaves)])
        return lambda v: tree.ravel(closed_model(unravel(v), *args))[0], lambda y: closed_loss(codomain.unravel(y))

    def composed(*flat):
        flat_model, flat_loss = closed(flat)
        return flat_loss(flat_model(flat[0]))

    def bind(*flat):
        flat_model, flat_loss = closed(flat)
        out, pull, push = linearize(flat_model, flat[0])
        _, curve, _ = linearize(grad(flat_loss), out)

        def product(v):
            return pull(curve(push(v)[0])[0])[0]

        return bound_of(product, product, domain, domain)

    parameters = (x_vector, *leaves, *captured)
    if not complete and derivative_wanted():
        check_closed(composed, parameters, name="model or loss")
    return LinearOperator(bind, parameters, domain, domain, checked_tags(tags, domain.size, domain.size, "symmetric"))
