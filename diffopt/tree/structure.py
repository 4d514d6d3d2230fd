"""The structure of trees: flatten, rebuild, map, name leaves by path, and compare.

A tree is any optree pytree: a tensor, or tuples, lists, dicts, named tuples and registered classes of
trees. Dict keys are sorted and ``None`` is an empty subtree, not a leaf.
"""

import builtins
from collections.abc import Callable, Sequence
from typing import Any

import optree
from torch import Tensor

from diffopt.typing import Tree

__all__ = [
    "check_like",
    "check_same_structure",
    "check_tensors",
    "flatten",
    "leaves",
    "map",
    "paths",
    "unflatten",
]


def flatten(tree: Tree) -> tuple[list[Any], optree.PyTreeSpec]:
    """Split a tree into the list of its leaves and its structure.

    Args:
        tree: Any tree.

    Returns:
        The leaves, in order, and the treespec that `unflatten` takes.

    Example:
        >>> leaves, treespec = flatten({"b": 2, "a": (1, None)})
        >>> leaves
        [1, 2]
    """
    return optree.tree_flatten(tree)  # type: ignore[return-value]


def unflatten(treespec: optree.PyTreeSpec, leaves: Sequence[Any]) -> Tree:
    """Rebuild a tree from its structure and its leaves: the inverse of `flatten`.

    Args:
        treespec: The structure, from `flatten`.
        leaves: As many leaves as the structure has.

    Returns:
        The tree.

    Raises:
        ValueError: If the number of leaves differs from the structure's.

    Example:
        >>> leaves, treespec = flatten({"a": (1, None), "b": 2})
        >>> unflatten(treespec, [10, 20])
        {'a': (10, None), 'b': 20}
    """
    if len(leaves) != treespec.num_leaves:
        raise ValueError(f"`unflatten` needs {treespec.num_leaves} leaves for {treespec}; got {len(leaves)}.")
    return optree.tree_unflatten(treespec, leaves)


def leaves(tree: Tree) -> list[Any]:
    """List the leaves of a tree, in the order of `flatten`.

    Args:
        tree: Any tree.

    Returns:
        The leaves.

    Example:
        >>> leaves({"b": 2, "a": (1, None)})
        [1, 2]
    """
    return flatten(tree)[0]


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply a function to corresponding leaves of one or more trees.

    Args:
        fn: Takes one leaf of each tree.
        tree: Any tree.
        *rest: Trees of the same structure.

    Returns:
        A tree of that structure, of the function's results.

    Raises:
        ValueError: If the structures differ; the message names the path.

    Example:
        >>> map(lambda x, y: x + y, {"a": 1, "b": (2,)}, {"a": 10, "b": (20,)})
        {'a': 11, 'b': (22,)}
    """
    first, treespec = optree.tree_flatten(tree)
    columns = [first]
    for i, other in enumerate(rest):
        column, other_spec = optree.tree_flatten(other)
        if other_spec != treespec:
            check_same_structure(other, tree, name=f"rest[{i}]", reference_name="tree")
        columns.append(column)
    return optree.tree_unflatten(treespec, [fn(*row) for row in zip(*columns, strict=True)])


def paths(tree: Tree) -> list[str]:
    """Name each leaf of a tree by the Python expression that reaches it.

    Args:
        tree: Any tree.

    Returns:
        A string for each leaf, in the order of `flatten`: ``"['a'][0]"`` for ``tree['a'][0]``, and ``""``
        for a tree that is itself a leaf.

    Example:
        >>> paths({"b": 2, "a": (1, None)})
        ["['a'][0]", "['b']"]
    """
    return [accessor.codify("") for accessor in optree.tree_accessors(tree)]


def check_tensors(tree: Tree, *, name: str = "tree") -> None:
    """Check that every leaf of a tree is a tensor.

    Args:
        tree: Any tree.
        name: What the error message calls it.

    Raises:
        TypeError: If a leaf is not a tensor; the message names its path.

    Example:
        >>> check_tensors({"a": 1.0}, name="params")
        Traceback (most recent call last):
        ...
        TypeError: `params['a']` must be a tensor, got float: 1.0. Use torch.as_tensor.
    """
    for i, leaf in enumerate(optree.tree_leaves(tree)):
        if not isinstance(leaf, Tensor):
            raise TypeError(_not_a_tensor(name + paths(tree)[i], leaf))


def check_same_structure(tree: Tree, reference: Tree, *, name: str = "tree", reference_name: str = "reference") -> None:
    """Check that two trees have the same structure, whatever their leaves.

    Args:
        tree: The tree to check.
        reference: The tree that it must resemble.
        name: What the error message calls the tree.
        reference_name: What the error message calls the reference.

    Raises:
        ValueError: If the structures differ; the message names the first path where they do.

    Example:
        >>> check_same_structure({"a": (1, 2)}, {"a": 1}, name="grads", reference_name="params")
        Traceback (most recent call last):
        ...
        ValueError: `grads` must have the structure of `params`. At `grads['a']`: expected a leaf, got a
        tuple of 2.
    """
    spec, expected = optree.tree_structure(tree), optree.tree_structure(reference)
    if spec == expected:
        return
    path, difference = _first_difference(spec, expected) or ("", f"expected {expected}, got {spec}")
    raise ValueError(f"`{name}` must have the structure of `{reference_name}`. At `{name}{path}`: {difference}.")


def check_like(tree: Tree, reference: Tree, *, name: str = "tree", reference_name: str = "reference") -> None:
    """Check that two trees of tensors have the same structure, shapes, dtypes and devices.

    Args:
        tree: The tree to check.
        reference: The tree of tensors that it must resemble.
        name: What the error message calls the tree.
        reference_name: What the error message calls the reference.

    Raises:
        ValueError: If structures, shapes or devices differ; the message names the path.
        TypeError: If a leaf is not a tensor, or dtypes differ; the message names the path.

    Example:
        >>> import torch
        >>> check_like([torch.ones(2)], [torch.ones(3)], name="grads", reference_name="params")
        Traceback (most recent call last):
        ...
        ValueError: `grads[0]` must have shape (3,), as `params[0]` has; got (2,).
    """
    if isinstance(tree, Tensor) and isinstance(reference, Tensor) and _leaf_difference(tree, reference) is None:
        return
    found, spec = flatten(tree)
    expected, reference_spec = flatten(reference)
    if spec != reference_spec:
        check_same_structure(tree, reference, name=name, reference_name=reference_name)
    for i, (leaf, like) in enumerate(zip(found, expected, strict=True)):
        problem = _leaf_difference(leaf, like)
        if problem is None:
            continue
        path = paths(reference)[i]
        if problem == "type":
            culprit, label = (like, reference_name) if isinstance(leaf, Tensor) else (leaf, name)
            raise TypeError(_not_a_tensor(label + path, culprit))
        want, got = (_attribute(value, problem) for value in (like, leaf))
        message = f"`{name}{path}` must have {problem} {want}, as `{reference_name}{path}` has; got {got}."
        raise TypeError(message) if problem == "dtype" else ValueError(message)


def _leaf_difference(leaf: Any, like: Any) -> str | None:
    if not (isinstance(leaf, Tensor) and isinstance(like, Tensor)):
        return "type"
    if leaf.shape != like.shape:
        return "shape"
    if leaf.dtype != like.dtype:
        return "dtype"
    return "device" if leaf.device != like.device else None


def _attribute(leaf: Tensor, problem: str) -> Any:
    return tuple(leaf.shape) if problem == "shape" else getattr(leaf, problem)


def _not_a_tensor(path: str, leaf: Any) -> str:
    return f"`{path}` must be a tensor, got {type(leaf).__name__}: {leaf!r:.60}. Use torch.as_tensor."


def _first_difference(spec: optree.PyTreeSpec, expected: optree.PyTreeSpec) -> tuple[str, str] | None:
    if spec == expected:
        return None
    if spec.type is not expected.type:
        return "", f"expected {_describe(expected)}, got {_describe(spec)}"
    keys, expected_keys = spec.entries(), expected.entries()
    if keys != expected_keys:
        return "", _describe_keys(keys, expected_keys) or f"expected {_describe(expected)}, got {_describe(spec)}"
    steps = [accessor.codify("") for accessor in expected.one_level().accessors()]  # type: ignore[union-attr]
    for step, child, expected_child in zip(steps, spec.children(), expected.children(), strict=True):
        deeper = _first_difference(child, expected_child)
        if deeper is not None:
            return step + deeper[0], deeper[1]
    return "", f"expected {expected}, got {spec}"


def _describe(spec: optree.PyTreeSpec) -> str:
    if spec.is_leaf():
        return "a leaf"
    if spec.type in (None, builtins.type(None)):
        return "None"
    return f"a {getattr(spec.type, '__name__', spec.type)} of {spec.num_children}"


def _describe_keys(keys: list[Any], expected: list[Any]) -> str:
    if all(isinstance(key, int) for key in [*keys, *expected]):
        return ""
    missing = [key for key in expected if key not in keys]
    extra = [key for key in keys if key not in expected]
    parts = [f"missing {missing}"] * bool(missing) + [f"unexpected {extra}"] * bool(extra)
    return "keys " + " and ".join(parts) if parts else ""
