"""Every Python block of README and docs runs and prints what it says; the generated tables; the list of pages."""

import contextlib
import functools
import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch

import diffopt

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))

import figures  # noqa: E402
import tables  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


CASES = [pytest.param(code, id=f"{page.name}-{n}") for page in PAGES for n, code in enumerate(blocks(page))]


def test_the_readme_shows_each_kind_of_gradient():
    shown = "\n".join(blocks(ROOT / "README.md"))
    assert len(blocks(ROOT / "README.md")) >= 2
    assert "diffopt.adam" in shown
    assert "custom_root" in shown


@pytest.mark.parametrize("code", CASES)
def test_block_runs_and_prints_what_it_says(code):
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "block", "exec"), {"__name__": "block"})
    assert expected, "a block must print a result, with the expected text in a comment on the line"
    assert printed.getvalue().splitlines() == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if target.startswith("_generated/"):
            assert f'"{Path(target).name}"' in (ROOT / "docs" / "conf.py").read_text(), target
        elif not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


def test_every_public_package_has_a_page():
    names = {module.name for module in pkgutil.iter_modules(diffopt.__path__)}
    shown = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")} - {"index"}
    assert names == shown
    index = (ROOT / "docs" / "api" / "index.md").read_text().splitlines()
    assert names <= set(index)


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(diffopt.__path__)])
def test_every_public_name_is_documented(name):
    package = importlib.import_module(f"diffopt.{name}")
    values = {name: getattr(package, name) for name in package.__all__}
    assert not [n for n, v in values.items() if (inspect.isroutine(v) or inspect.isclass(v)) and not v.__doc__]


def test_composition_table(tmp_path):
    advice = "compile one step, of at most 3 unknowns"
    rows = [
        {"name": "a", "cells": {"grad": ["right", "0"], "compile": ["raises", advice]}},
        {"name": "b", "cells": {"grad": ["right", "0"], "compile": ["raises", advice.replace("3", "4")]}},
        {"name": "c", "cells": {"another": ["right", "0"]}},
    ]
    for row in rows:
        (tmp_path / f"{row['name']}.json").write_text(json.dumps(row))
    table = tables.composition_table(tmp_path)
    assert "3 operators, 5 cells checked: 3 right, 2 raise" in table
    assert table.count("compile one step") == 1
    assert "| a | ·✓···· | ········ | ···· | ·········· | ······ | a··· | · |" in table
    assert "- other: `another`" in table


def test_composition_table_without_records_says_how_to_make_them(tmp_path):
    assert "make test" in tables.composition_table(tmp_path / "absent")


def test_a_wrong_cell_has_no_place_in_the_table(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"name": "a", "cells": {"grad": ["wrong", "1e3"]}}))
    with pytest.raises(ValueError, match="right or raise"):
        tables.composition_table(tmp_path)


def test_the_columns_of_the_composition_table_name_every_cell():
    from diffopt.testing import CELLS

    assert [cell for cells in tables.GROUPS.values() for cell in cells] == list(CELLS)


def test_benchmark_tables(tmp_path):
    rows = [
        {"case": "fast", "value": 1.25, "unit": "ratio", "bar": "<= 1.3"},
        {"case": "  peer", "value": 2000.0, "unit": "us", "bar": "none"},
        {"case": "slow", "value": 9.0, "unit": "x", "bar": ">= 10"},
    ]
    (tmp_path / "steps.json").write_text(json.dumps({"machine": {"cpu": "test", "gpu": None}, "rows": rows}))
    table = tables.benchmark_tables(tmp_path)
    assert "## steps\n\ncpu test.\n" in table
    assert "| fast | 1.25 ratio | <= 1.3 | yes |" in table
    assert "| — peer | 2e+03 us |  |  |" in table
    assert "| slow | 9 x | >= 10 | **no** |" in table


def test_benchmark_tables_without_results_say_how_to_make_them(tmp_path):
    assert "make bench" in tables.benchmark_tables(tmp_path)


def test_face_table_links_every_top_level_name():
    table = tables.face_table(diffopt)
    assert "| {py:func}`~diffopt.optimizers.adam` |" in table
    assert "| {py:class}`~diffopt.transforms.GradientTransformation` |" in table


def test_every_optimizer_has_a_section_with_its_equation_its_paper_and_its_state():
    sections = tables.optimizer_sections()
    names = [name for name in diffopt.optimizers.__all__ if f"### {name}\n" in sections]
    assert names == list(tables.list_optimizers())
    assert {"sgd", "adam", "adamw", "sam", "prodigy", "muon"} <= set(names)
    for section in sections.split("### ")[1:]:
        assert ".. math::" in section
        assert re.search(r"^:Paper:\n   \| .*\d{4}", section, flags=re.MULTILINE), section
        assert ":Differentiable in: ``" in section
        assert ":State: " in section
    adam = sections.split("### adam\n")[1].split("###")[0]
    assert r"\mu_t = b_1 \mu_{t-1}" in adam
    assert "``learning_rate``, ``b1``, ``b2``, ``eps``, ``eps_root``" in adam
    assert ":State: :py:class:`~diffopt.transforms.ScaleByAdamState` (count, mu, nu)" in adam


@pytest.mark.parametrize("name", ["adam", "sam", "muon"])
def test_the_paths_in_the_picture_of_the_optimizers_go_down(name):
    path, rate = figures.descend(tables.list_optimizers()[name])
    assert path.shape == (figures.STEPS + 1, 2)
    assert rate in figures.RATES
    assert figures.valley(path[-1]) < 0.05 * figures.valley(path[0])


def resolve(name):
    """The object of a dotted name, such as a submodule or what it holds."""
    return functools.reduce(getattr, name.split(".")[1:], importlib.import_module(name.split(".")[0]))


def test_every_name_in_the_migration_tables_exists():
    rows = re.findall(r"^\|(.*)\|$", (ROOT / "docs" / "coming_from.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 60
    ours = [name for row in rows for name in re.findall(r"`(diffopt[\w.]*)`", row)]
    assert len(ours) > 60
    for name in ours:
        resolve(name)
    theirs = [name for row in rows for name in re.findall(r"`(torch\.[\w.]+)", row)]
    assert torch.optim.AdamW in [resolve(name) for name in theirs]
