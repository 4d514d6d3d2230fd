"""Trees of tensors as vectors: sums, multiples, inner products and norms.

Trees that meet must have the same structure and the same shapes: nothing broadcasts, and nothing promotes a
leaf but another leaf. Scalars take the dtype of each leaf.
"""

import torch
from optree import PyTreeSpec
from torch import Tensor

from diffopt.tree.structure import check_same_structure, flatten, map, paths, unflatten
from diffopt.typing import Numeric, Tree

__all__ = ["add", "axpy", "norm", "scale", "sub", "vdot", "where", "zeros_like"]


def add(x: Tree, y: Tree) -> Tree:
    """Add two trees: x + y.

    Args:
        x: A tree of tensors.
        y: A tree of the same structure and shapes.

    Returns:
        The sum, a tree like x.

    Raises:
        ValueError: If structures or shapes differ.

    Example:
        >>> add({"a": torch.ones(2)}, {"a": torch.ones(2)})
        {'a': tensor([2., 2.])}
    """
    xs, ys, treespec = _flatten_pair(x, y)
    return unflatten(treespec, [a + b for a, b in zip(xs, ys, strict=True)])


def sub(x: Tree, y: Tree) -> Tree:
    """Subtract two trees: x - y.

    Args:
        x: A tree of tensors.
        y: A tree of the same structure and shapes.

    Returns:
        The difference, a tree like x.

    Raises:
        ValueError: If structures or shapes differ.

    Example:
        >>> sub({"a": torch.ones(2)}, {"a": torch.ones(2)})
        {'a': tensor([0., 0.])}
    """
    xs, ys, treespec = _flatten_pair(x, y)
    return unflatten(treespec, [a - b for a, b in zip(xs, ys, strict=True)])


def scale(tree: Tree, scalar: Numeric) -> Tree:
    """Multiply a tree by a scalar: scalar * tree.

    Args:
        tree: A tree of tensors.
        scalar: A number or a 0-d tensor; it takes the dtype of each leaf and may carry gradient.

    Returns:
        The multiple, a tree with the leaves' dtypes.

    Raises:
        ValueError: If the scalar is a tensor with dimensions.
        TypeError: If a leaf's dtype cannot hold the scalar: a fraction times integers, a complex number
            times reals.

    Example:
        >>> scale({"a": torch.ones(2)}, torch.tensor(3.0, dtype=torch.float64))
        {'a': tensor([3., 3.])}
    """
    leaves, treespec = flatten(tree)
    return unflatten(treespec, [_scalar_like(scalar, leaf) * leaf for leaf in leaves])


def axpy(a: Numeric, x: Tree, y: Tree) -> Tree:
    """Add a multiple of one tree to another: a x + y.

    Args:
        a: A number or a 0-d tensor; it takes the dtype of each leaf of x and may carry gradient.
        x: A tree of tensors.
        y: A tree of the same structure and shapes.

    Returns:
        A tree like y.

    Raises:
        ValueError: If structures or shapes differ, or if a is a tensor with dimensions.
        TypeError: If the dtype of a leaf of x cannot hold a.

    Example:
        >>> axpy(-0.5, {"a": torch.ones(2)}, {"a": torch.ones(2)})
        {'a': tensor([0.5000, 0.5000])}
    """
    xs, ys, treespec = _flatten_pair(x, y)
    return unflatten(treespec, [_scalar_like(a, u) * u + v for u, v in zip(xs, ys, strict=True)])


def vdot(x: Tree, y: Tree) -> Tensor:
    """Take the inner product of two trees: the sum over leaves of conj(x) . y.

    Half-precision leaves are accumulated in float32.

    Args:
        x: A tree of tensors; complex ones are conjugated.
        y: A tree of the same structure and shapes.

    Returns:
        A 0-d tensor of the leaves' (promoted) dtype. An empty tree gives 0 in the default dtype.

    Raises:
        ValueError: If structures or shapes differ.

    Example:
        >>> vdot({"a": torch.ones(2), "b": torch.ones(())}, {"a": torch.ones(2), "b": torch.ones(())})
        tensor(3.)
    """
    xs, ys, _ = _flatten_pair(x, y)
    if not xs:
        return torch.zeros(())
    total = sum((_dot(a, b) for a, b in zip(xs[1:], ys[1:], strict=True)), start=_dot(xs[0], ys[0]))
    return total.to(_promoted([*xs, *ys]))


def norm(tree: Tree) -> Tensor:
    """Take the 2-norm of a tree over all its leaves, with derivative 0 at 0.

    ``||x|| = sqrt(sum over leaves of |x|^2)``. At x = 0, where the norm has a kink, derivatives of every order
    are 0 and not NaN. The squares must be representable: no rescaling is done. Half-precision leaves are
    accumulated in float32.

    Args:
        tree: A tree of real or complex tensors.

    Returns:
        A real 0-d tensor of the leaves' (promoted) dtype. An empty tree gives 0 in the default dtype.

    Example:
        >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        tensor(5.)
        >>> torch.func.grad(norm)(torch.zeros(2))
        tensor([0., 0.])
    """
    leaves, _ = flatten(tree)
    if not leaves:
        return torch.zeros(())
    squares = [_dot(leaf, leaf) for leaf in leaves]
    squares = [square.real if square.is_complex() else square for square in squares]
    total = sum(squares[1:], start=squares[0])
    is_zero = total == 0
    # The root is taken of 1 where the sum is 0, so that no infinite slope meets a zero in any derivative.
    root = torch.sqrt(torch.where(is_zero, torch.ones_like(total), total))
    value, dtype = torch.where(is_zero, torch.zeros_like(total), root), _promoted(leaves)
    return value if dtype.is_complex else value.to(dtype)


def where(mask: Tensor | Tree, a: Tree, b: Tree) -> Tree:
    """Choose between two trees: a where the mask holds, b elsewhere.

    Args:
        mask: A bool tensor that expands to the shape of every leaf (0-d serves all), or a tree of such
            masks with the structure of a.
        a: A tree of tensors.
        b: A tree of the same structure and shapes.

    Returns:
        A tree like a.

    Raises:
        ValueError: If structures or shapes differ, or if a mask does not expand to a leaf's shape.

    Example:
        >>> where(torch.tensor(True), {"a": torch.ones(2)}, {"a": torch.zeros(2)})
        {'a': tensor([1., 1.])}
    """
    first, second, treespec = _flatten_pair(a, b, names=("a", "b"))
    if isinstance(mask, Tensor):
        masks = [mask] * len(first)
    else:
        check_same_structure(mask, a, name="mask", reference_name="a")
        masks = flatten(mask)[0]
    chosen = [torch.where(m, u, v) for m, u, v in zip(masks, first, second, strict=True)]
    for i, (leaf, u) in enumerate(zip(chosen, first, strict=True)):
        if leaf.shape != u.shape:
            raise ValueError(
                f"`mask` of shape {tuple(masks[i].shape)} does not expand to `a{paths(a)[i]}` of shape "
                f"{tuple(u.shape)}."
            )
    return unflatten(treespec, chosen)


def zeros_like(tree: Tree) -> Tree:
    """Make a tree of zeros with the structure, shapes, dtypes and devices of another.

    Args:
        tree: A tree of tensors.

    Returns:
        The zeros.

    Example:
        >>> zeros_like({"a": torch.ones(2)})
        {'a': tensor([0., 0.])}
    """
    return map(torch.zeros_like, tree)


def _flatten_pair(
    x: Tree, y: Tree, names: tuple[str, str] = ("x", "y")
) -> tuple[list[Tensor], list[Tensor], PyTreeSpec]:
    xs, treespec = flatten(x)
    ys, other = flatten(y)
    if treespec != other:
        check_same_structure(y, x, name=names[1], reference_name=names[0])
    for i, (a, b) in enumerate(zip(xs, ys, strict=True)):
        if a.shape != b.shape:
            path = paths(x)[i]
            raise ValueError(
                f"`{names[1]}{path}` must have shape {tuple(a.shape)}, as `{names[0]}{path}` has; got {tuple(b.shape)}."
            )
    return xs, ys, treespec


def _scalar_like(scalar: Numeric, leaf: Tensor) -> Numeric:
    if not isinstance(scalar, Tensor):
        dtype = torch.float32 if isinstance(scalar, float) else torch.int64
        dtype = torch.complex64 if isinstance(scalar, complex) else dtype
        _check_castable(dtype, leaf)
        return scalar
    if scalar.ndim:
        raise ValueError(f"a scalar must be a number or a 0-d tensor; got shape {tuple(scalar.shape)}.")
    _check_castable(scalar.dtype, leaf)
    return scalar.to(leaf.dtype)


def _check_castable(dtype: torch.dtype, leaf: Tensor) -> None:
    rank, room = (_rank(kind) for kind in (dtype, leaf.dtype))
    if rank > room:
        raise TypeError(
            f"a leaf of dtype {leaf.dtype} cannot keep it when multiplied by a scalar of {dtype}. "
            "Convert the leaf first."
        )


def _rank(dtype: torch.dtype) -> int:
    return 2 if dtype.is_complex else int(dtype.is_floating_point)


def _promoted(leaves: list[Tensor]) -> torch.dtype:
    dtype = leaves[0].dtype
    for leaf in leaves[1:]:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def _dot(x: Tensor, y: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, y.dtype)
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    return torch.vdot(x.to(dtype).reshape(-1), y.to(dtype).reshape(-1))
