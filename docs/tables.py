"""Tables made at build time: the composition matrix of the last test run, the benchmarks, the top-level names."""

import inspect
import json
import re
import string
from pathlib import Path
from types import ModuleType

import diffopt

__all__ = ["benchmark_tables", "composition_table", "face_table", "write_tables"]

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


def write_tables(generated: Path, results: Path) -> None:
    """Write both where the pages include them, touching a file only if it changes."""
    generated.mkdir(exist_ok=True)
    tables = {
        "composition.md": composition_table(generated / "composition"),
        "benchmarks.md": benchmark_tables(results),
        "face.md": face_table(diffopt),
    }
    for name, text in tables.items():
        path = generated / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
