"""`make_dot`: the graph of a meta-computation by the names of its parameters, states and losses, for Graphviz."""

import functools
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from diffopt import tree
from diffopt.visual.graph import Place, condense, place_of, trace

__all__ = ["make_dot", "to_svg"]


class _Name(NamedTuple):
    group: str
    text: str
    tensor: Tensor


def make_dot(value: Any, named: Mapping[str, Any], *, operations: bool = False) -> str:
    r"""Write the graph of what a value was computed from, in terms of tensors that have names.

    Nodes are the value, the named tensors that have a gradient, and leaves that require grad. An edge :math:`a \to b`
    says that :math:`b` was computed from :math:`a` by operations on the way of which nothing has a name. Each entry of
    ``named`` is a box around its tensors: give it one for each inner step, and the picture shows how the steps hang
    together, as by the states of a `MetaOptimizer` or by `watch`.

    What the value does not depend on is dashed. Losses of inner steps are: the step takes their gradient, not their
    value. Parameters that are dashed have been cut off.

    Args:
        value: A tensor with a graph, or a tree of tensors of which at least one has.
        named: From labels to tensors, to trees of tensors (parameters, states, what `extract_state` takes out), or to
            modules, whose parameters are meant. A tensor with two names shows both, in the first one's box.
        operations: Whether to show every operation of autograd too, those of inner backward passes included.

    Returns:
        The source of the graph in the DOT language, for `to_svg`, the command ``dot`` or any viewer.

    Raises:
        TypeError: If something is not a tensor, a module or a tree of tensors, or a label no string.
        ValueError: If value does not depend on anything that requires grad.

    Example:
        >>> import torch
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> loss = w.square().sin()
        >>> (slope,) = torch.autograd.grad(loss, w, create_graph=True)
        >>> make_dot(w - 0.1 * slope, {"start": w, "loss": loss}).splitlines()[3]
        '  n0 [label="start", shape=ellipse, fillcolor="#bcd7ea"]'

    References:
        Gansner and North (2000), An open graph visualization system and its applications to software engineering.
    """
    names = [*_names_of(named), *_tensors_of("", value, "value")]
    labels: dict[Place, list[_Name]] = {}
    for name in names:
        place = place_of(name.tensor)
        if place is not None:
            labels.setdefault(place, []).append(name)
    ends = {place for place, found in labels.items() if not found[-1].group}
    if not ends:
        raise ValueError(
            "`value` has no graph: compute it from tensors that require grad, in grad mode, not under compile."
        )
    search = trace if operations else functools.partial(condense, kept=labels.__contains__)
    reached, graph = set(search(ends).places), search(labels)
    ids = {place: f"n{i}" for i, place in enumerate(dict.fromkeys([*labels, *graph.places]))}
    nodes = {place: f"{ids[place]} [{_look(place, labels, reached, ends)}]" for place in ids}
    lines = ["digraph {", "  rankdir=LR", '  node [fontname="Helvetica", fontsize=10, style=filled, fillcolor=white]']
    lines += _boxes(nodes, labels)
    faint = " [style=dashed, color=gray60]"
    lines += [f"  {ids[a]} -> {ids[b]}{'' if b in reached else faint}" for a, b in graph.edges]
    return "\n".join([*lines, "}"])


def to_svg(dot: str) -> str:
    """Draw a graph as SVG, by the command ``dot`` of Graphviz.

    Args:
        dot: The source, from `make_dot`.

    Returns:
        The SVG, a text: write it to a file, or show it in a notebook by ``IPython.display.SVG``.

    Raises:
        TypeError: If the source is no text.
        RuntimeError: If Graphviz is not installed, or refuses the source.

    Example:
        >>> to_svg("digraph { a -> b }")[:5] if shutil.which("dot") else "<?xml"
        '<?xml'
    """
    if not isinstance(dot, str):
        raise TypeError(f"`dot` must be the source of a graph, from `make_dot`; got {type(dot).__name__}.")
    command = shutil.which("dot")
    if command is None:
        raise RuntimeError(
            "`to_svg` needs Graphviz's command `dot`: install it by `apt install graphviz`, `brew install graphviz` or "
            "`conda install graphviz` (pip's package of that name does not bring it); or give the text of `make_dot` "
            "to any viewer of DOT."
        )
    done = subprocess.run([command, "-Tsvg"], input=dot, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Graphviz could not draw the graph; it says: {done.stderr.strip()}")
    return done.stdout


def _names_of(named: Mapping[str, Any]) -> Iterator[_Name]:
    if not isinstance(named, Mapping):
        raise TypeError(f"`named` must be a dict from labels to trees of tensors; got {type(named).__name__}.")
    for label, held in named.items():
        if not isinstance(label, str):
            raise TypeError(f"a label in `named` must be a string; got {type(label).__name__}: {label!r:.60}.")
        if not label:
            raise ValueError('a label in `named` must not be empty; name it, as in {"start": params}.')
        yield from _tensors_of(label, held, label)


def _tensors_of(group: str, held: Any, label: str) -> Iterator[_Name]:
    """The tensors in one entry, by their paths; of one alone, the label."""
    held = dict(held.named_parameters()) if isinstance(held, nn.Module) else held
    for path, leaf in zip(tree.paths(held), tree.leaves(held), strict=True):
        if isinstance(leaf, nn.Module):
            members = _tensors_of(group, leaf, label)
            yield from (member._replace(text=f"{path} {member.text}") for member in members)
        elif isinstance(leaf, Tensor):
            yield _Name(group, _readable(path) or label, leaf)
        else:
            raise TypeError(
                f"`{label}{path}` must be a tensor, a module or a tree of tensors; got {type(leaf).__name__}."
            )


def _readable(path: str) -> str:
    """`['params']['w']` as `params.w`."""
    return path.replace("']['", ".").replace("['", ".").replace("']", "").strip(".")


def _look(place: Place, labels: dict[Place, list[_Name]], reached: set[Place], final: set[Place]) -> str:
    found = labels.get(place, [])
    leaf = getattr(place.function, "variable", None)
    tensor = found[0].tensor if found else leaf
    if tensor is None:
        operation = place.function.name().removesuffix("0")
        return f"label={_quote(operation)}, shape=plaintext, fontsize=8, fontcolor=gray40"
    shape = tuple(tensor.shape)
    texts = dict.fromkeys(f"{n.group}: {n.text}" if i and n.group else n.text for i, n in enumerate(found))
    label = "\n".join([*texts, str(shape)] if shape or not texts else texts)
    outline = "box" if shape else "ellipse"
    if place not in reached:
        return f'label={_quote(label)}, shape={outline}, style=dashed, tooltip="the value does not depend on this"'
    color = "#f6c28b" if place in final else "#bcd7ea" if leaf is not None else "white"
    return f'label={_quote(label)}, shape={outline}, fillcolor="{color}"'


def _boxes(nodes: dict[Place, str], labels: dict[Place, list[_Name]]) -> Iterator[str]:
    """The nodes, those of one entry of the names in a box; what stands alone in its box has none."""
    groups: dict[str, list[Place]] = {}
    for place in nodes:
        found = labels.get(place)
        groups.setdefault(found[0].group if found else "", []).append(place)
    for i, (group, places) in enumerate(groups.items()):
        if not group or [labels[p][0].text for p in places] == [group]:
            yield from (f"  {nodes[place]}" for place in places)
            continue
        yield f"  subgraph cluster_{i} {{"
        yield f'    label={_quote(group)}; fontname="Helvetica"; fontsize=11; color=gray70; style=rounded'
        yield from (f"    {nodes[place]}" for place in places)
        yield "  }"


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
