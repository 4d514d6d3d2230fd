"""Made at build time: the composition matrix of the last test run, the benchmarks, names, and every optimizer."""

import inspect
import json
import re
import string
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import diffopt
from diffopt.transforms import EmptyState, GradientTransformation, MaskedNode
from diffopt.typing import Numeric

__all__ = [
    "benchmark_tables",
    "build_optimizer",
    "composition_table",
    "face_table",
    "list_optimizers",
    "optimizer_sections",
    "write_tables",
]

GROUPS = {
    "value and first derivative": ("forward", "grad", "vjp", "jvp", "jacrev", "jacfwd"),
    "second and third": (
        "hessian",
        "jacrev(jacrev)",
        "jacfwd(jacfwd)",
        "jacrev(jacfwd)",
        "jvp(grad)",
        "grad(grad)",
        "grad(grad(grad))",
        "jvp(jvp(jvp))",
    ),
    "vmap": ("vmap", "vmap(in_dims=1)", "vmap, shared", "vmap(vmap)"),
    "vmap and derivatives": (
        "vmap(grad)",
        "vmap(jacfwd)",
        "grad(vmap)",
        "grad(vmap), shared",
        "jvp(vmap)",
        "vmap(hessian)",
        "hessian(vmap)",
        "vmap(jvp(grad))",
        "grad(vmap(grad))",
        "grad(vmap(vmap))",
    ),
    "plain autograd": (
        "backward, thrice",
        "backward(vmap), thrice",
        "dual_level",
        "dual_level(vmap)",
        "gradcheck",
        "gradgradcheck",
    ),
    "compile": ("compile", "compile(grad)", "compile(grad(grad))", "compile(vmap(grad))"),
}
"""The columns of the composition table, and the cells in each."""

RIGHT, ABSENT = "✓", "·"


def composition_table(records: Path) -> str:
    """The matrix as Markdown, from the records `{"name", "cells": {cell: [status, detail]}}` of a test run."""
    rows = sorted((json.loads(path.read_text()) for path in records.glob("*.json")), key=lambda row: row["name"])
    if not rows:
        return "No record of a test run was found. Run `make test`, then `make docs`, and the table appears here.\n"
    groups = _groups(rows)
    notes: dict[str, tuple[str, str]] = {}  # the advice without its numbers: a letter, and the advice
    lines = ["| operator | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for row in rows:
        columns = ["".join(_symbol(row["cells"].get(cell), notes) for cell in cells) for cells in groups.values()]
        lines.append(f"| {row['name']} | " + " | ".join(columns) + " |")
    statuses = [status for row in rows for status, _ in row["cells"].values()]
    right, raising = statuses.count("right"), statuses.count("raises")
    text = [f"{len(rows)} operators, {len(statuses)} cells checked: {right} right, {raising} raise, and none is wrong."]
    text += ["", *lines, "", f"{RIGHT} right; {ABSENT} not checked; a letter: raises, with the advice below.", ""]
    text += [f"- **{letter}**: “{advice}”" for letter, advice in notes.values()]
    text += ["", "The marks of a column stand for these cells, in this order:", ""]
    text += [f"- {name}: " + ", ".join(f"`{cell}`" for cell in cells) for name, cells in groups.items()]
    return "\n".join(text) + "\n"


def _groups(rows: list[dict]) -> dict[str, tuple[str, ...]]:
    """`GROUPS`, and a last column for the cells that they do not name."""
    named = {cell for cells in GROUPS.values() for cell in cells}
    other = tuple(dict.fromkeys(cell for row in rows for cell in row["cells"] if cell not in named))
    return {**GROUPS, "other": other} if other else GROUPS


def _symbol(cell: list[str] | None, notes: dict[str, tuple[str, str]]) -> str:
    if cell is None:
        return ABSENT
    status, detail = cell
    if status == "right":
        return RIGHT
    if status != "raises":
        raise ValueError(f"a record must hold cells that are right or raise; got {status!r}")
    advice = detail.strip().strip("\"'")
    key = re.sub(r"\d+", "n", advice)
    notes.setdefault(key, (string.ascii_letters[len(notes)], advice))
    return notes[key][0]


def benchmark_tables(results: Path) -> str:
    """The benchmark results as Markdown, a section a file of `{"machine", "rows": [{case, value, unit, bar}]}`."""
    files = sorted(results.glob("*.json"))
    if not files:
        return "No results were found. Run `make bench`, then `make docs`, and the tables appear here.\n"
    text = []
    for path in files:
        record = json.loads(path.read_text())
        machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items() if value is not None)
        text += [f"## {path.stem}", "", machine + ".", "", "| case | value | bar | met |", "|---|---:|---|---|"]
        for row in record["rows"]:
            case = row["case"].strip() if row["case"] == row["case"].lstrip() else f"— {row['case'].strip()}"
            value, bar = f"{row['value']:.3g} {row['unit']}", row["bar"]
            text.append(f"| {case} | {value} | {'' if bar == 'none' else bar} | {_met(row['value'], bar)} |")
        text.append("")
    return "\n".join(text)


def _met(value: float, bar: str) -> str:
    found = re.fullmatch(r"(<=|>=) *([0-9.]+)", bar)
    if not found:
        return ""
    limit = float(found[2])
    return "yes" if (value <= limit if found[1] == "<=" else value >= limit) else "**no**"


def face_table(package: ModuleType) -> str:
    """The names of a package that its subpackages define, each with its link and its first sentence."""
    values = {name: getattr(package, name) for name in package.__all__}
    homes = [value for value in values.values() if inspect.ismodule(value)]
    lines = ["| name | |", "|---|---|"]
    for name, value in values.items():
        if inspect.ismodule(value):
            continue
        home = next(h for h in homes if getattr(h, name, None) is value and name in h.__all__)
        role = "class" if inspect.isclass(value) else "func"
        summary = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ").split(": :math:")[0]
        summary = re.sub(r":math:`(.*?)`", r"$\1$", summary)
        lines.append(f"| {{py:{role}}}`~{home.__name__}.{name}` | {summary.rstrip('.')} |")
    return "\n".join(lines) + "\n"


def list_optimizers() -> dict[str, Callable[..., GradientTransformation]]:
    """The public functions of `diffopt.optimizers` that give a transformation, by name."""
    values = {name: getattr(diffopt.optimizers, name) for name in diffopt.optimizers.__all__}
    return {name: value for name, value in values.items() if _returns_transformation(value)}


def _returns_transformation(value: Any) -> bool:
    return inspect.isfunction(value) and inspect.signature(value).return_annotation is GradientTransformation


def build_optimizer(
    function: Callable[..., GradientTransformation], learning_rate: Numeric, **options: Any
) -> GradientTransformation:
    """An optimizer with its defaults and a learning rate; one that wraps another gets `sgd`."""
    arguments = inspect.signature(function).parameters
    if "optimizer" in arguments:
        return function(diffopt.sgd(learning_rate), **options)
    return function(learning_rate=learning_rate, **options)


def optimizer_sections() -> str:
    """A section an optimizer as Markdown: from its docstring, its signature and the state of a small tree."""
    return "\n".join(_optimizer_section(name, function) for name, function in list_optimizers().items())


def _optimizer_section(name: str, function: Callable[..., GradientTransformation]) -> str:
    head, sections = _split_docstring(inspect.getdoc(function) or "")
    numeric = [arg for arg, value in inspect.signature(function).parameters.items() if _takes_tensor(value.annotation)]
    text = [f"### {name}", "", "```{eval-rst}", head.strip(), ""]
    parts = re.findall(r"`(scale_by_\w+|orthogonalize)`", head + sections.get("Args", ""))
    for part in dict.fromkeys(parts):
        rule = re.search(r"\.\. math::.*?(?=\n\S|\Z)", _docstring_of(part), flags=re.DOTALL)
        if rule:
            text += [f":py:func:`~{_home(part)}.{part}` is", "", rule[0].rstrip(), ""]
    papers = "\n".join(line.strip() for line in sections["References"].strip().splitlines())
    papers = [f"   | {paper}" for paper in re.sub(r"\n(?!.*?, \")", " ", papers).splitlines()]
    text += [":API: " + f":py:func:`~diffopt.optimizers.{name}`"]
    text += [":Differentiable in: " + ", ".join(f"``{n}``" for n in numeric)]
    text += [":State: " + _describe_states(function)]
    text += [":Paper:", *papers, "```", ""]
    return "\n".join(text)


def _split_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """What comes before the first section of a docstring, and the sections by name."""
    head, *rest = re.split(r"^(Args|Returns|Raises|Example|References):\n", doc, flags=re.MULTILINE)
    return head, dict(zip(rest[::2], rest[1::2], strict=True))


def _home(name: str) -> str:
    return "diffopt.transforms" if name in diffopt.transforms.__all__ else "diffopt.optimizers"


def _docstring_of(name: str) -> str:
    home = diffopt.transforms if name in diffopt.transforms.__all__ else diffopt.optimizers
    return inspect.getdoc(getattr(home, name)) or ""


def _takes_tensor(annotation: Any) -> bool:
    return torch.Tensor in typing.get_args(annotation)


def _describe_states(function: Callable[..., GradientTransformation]) -> str:
    params = {"matrix": torch.ones(2, 2), "vector": torch.ones(2)}
    momentum = inspect.signature(function).parameters.get("momentum")
    text = _join_states(build_optimizer(function, 0.1).init(params))
    if momentum is not None and momentum.default is None:
        text += "; with momentum: " + _join_states(build_optimizer(function, 0.1, momentum=0.9).init(params))
    return text


def _join_states(state: Any) -> str:
    found = dict.fromkeys(_named_tuples(state))
    links = [f":py:class:`~{_home(kind.__name__)}.{kind.__name__}` ({', '.join(kind._fields)})" for kind in found]
    return ", ".join(links) or "none"


def _named_tuples(state: Any) -> Iterator[type]:
    """The classes of the named tuples in a state, outermost first."""
    if isinstance(state, (EmptyState, MaskedNode)):
        return
    if hasattr(state, "_fields"):
        yield type(state)
    if isinstance(state, (tuple, list, dict)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _named_tuples(value)


def write_tables(generated: Path, results: Path) -> None:
    """Write them where the pages include them, touching a file only if it changes."""
    generated.mkdir(exist_ok=True)
    tables = {
        "composition.md": composition_table(generated / "composition"),
        "benchmarks.md": benchmark_tables(results),
        "face.md": face_table(diffopt),
        "optimizers.md": optimizer_sections(),
    }
    for name, text in tables.items():
        path = generated / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
