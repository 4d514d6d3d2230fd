"""Files that hold a state exactly, and that a kill at any moment leaves whole.

A file is written beside its place, forced to the disk, and renamed onto it: there is always the old one or the new.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.typing import Tree

__all__ = ["load", "save"]

_FORMAT = "diffopt state 1"


def save(path: str | os.PathLike, state: Tree, extra: Any = None) -> None:
    """Write a state to a file, or leave the file that is there as it is.

    Args:
        path: The file; its folder must exist.
        state: A tree of tensors, such as a `GraphState`.
        extra: What else to keep: dicts, lists and tuples of tensors, numbers, strings, bools and None.

    Raises:
        TypeError: If a leaf of the state is not a tensor, or `extra` holds something else.
        FileNotFoundError: If there is no such folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/state.pt", {"w": torch.ones(2)}, extra=3)
        ...     load(f"{folder}/state.pt", {"w": torch.zeros(2)})
        ({'w': tensor([1., 1.])}, 3)
    """
    tree.check_tensors(state, name="state")
    _check_plain(extra, "extra")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of {path} does not exist: make it first")
    content = {
        "format": _FORMAT,
        "paths": tree.paths(state),
        "leaves": [_own(leaf) for leaf in tree.leaves(state)],
        "extra": extra,
    }
    beside = path.with_name(f".{path.name}.new")
    with beside.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    _sync_folder(path.parent)


def load(path: str | os.PathLike, like: Tree) -> tuple[Tree, Any]:
    """Read a state that `save` wrote. Nothing in the file is executed.

    Args:
        path: The file.
        like: A state of the same structure, shapes and dtypes; the tensors are put on its devices.

    Returns:
        The state, and what else was kept.

    Raises:
        ValueError: If the file holds no state, or one of another structure; the message names the difference.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/state.pt", {"w": torch.ones(2)})
        ...     load(f"{folder}/state.pt", {"w": torch.zeros(3)})
        Traceback (most recent call last):
        ...
        ValueError: ...state.pt holds ['w'] of shape (2,) and torch.float32, where this program has (3,) and ...
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises what its parts do: of zip files, pickles, structs
        raise ValueError(f"{path} holds no state that `save` wrote, or is damaged") from error
    if not isinstance(content, Mapping) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no state that `save` wrote")
    wanted, spec = tree.flatten(like)
    names = tree.paths(like)
    if content["paths"] != names:
        odd = sorted(set(content["paths"]) ^ set(names)) or names
        raise ValueError(f"{path} holds the state of another program: they differ in {', '.join(odd[:5])}")
    for name, found, want in zip(names, content["leaves"], wanted, strict=True):
        if (found.shape, found.dtype) != (want.shape, want.dtype):
            raise ValueError(
                f"{path} holds {name} of shape {tuple(found.shape)} and {found.dtype}, where this program has "
                f"{tuple(want.shape)} and {want.dtype}"
            )
    leaves = [found.to(want.device) for found, want in zip(content["leaves"], wanted, strict=True)]
    return tree.unflatten(spec, leaves), content["extra"]


def _own(leaf: Tensor) -> Tensor:
    """The tensor without its graph, and without the rest of the storage that it is a view of."""
    leaf = leaf.detach()
    return leaf if leaf.untyped_storage().nbytes() == leaf.nbytes else leaf.clone()


def _check_plain(value: Any, name: str) -> None:
    if type(value) is dict:
        for key, entry in value.items():
            _check_plain(entry, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for place, entry in enumerate(value):
            _check_plain(entry, f"{name}[{place}]")
    elif not isinstance(value, Tensor | str | bytes | int | float | None):
        raise TypeError(
            f"{name} must be made of tensors, numbers, strings, dicts lists and tuples; got {type(value).__name__}"
        )


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself last; some systems cannot open a folder, and there the file system sees to it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
