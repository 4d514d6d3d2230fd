"""Every notebook runs from top to bottom, silently, and is stored with the pictures that its page shows."""

import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EVERY_RUN = {"gradients_without_gradients", "implicit_differentiation", "learning_rate", "vmap_over_tasks"}
sys.path.append(str(FOLDER))

import run_notebooks  # noqa: E402


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2


def test_the_notebooks_of_every_run_exist():
    assert {path.stem for path in NOTEBOOKS} > EVERY_RUN


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[] if p.stem in EVERY_RUN else pytest.mark.slow, id=p.stem) for p in NOTEBOOKS],
)
def test_notebook_runs(path):
    notebook = run_notebooks.execute(path)
    said = [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    assert not said, "a notebook must not warn"
    assert pictures(notebook) >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_notebook_is_small_and_shows_a_picture(path):
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 200_000
    assert pictures(notebook) >= 1
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert "What to try next" in notebook.cells[-1].source
