"""The documentation: pages from docstrings, notebooks with their stored outputs, and tables from records."""

import shutil
import sys
from pathlib import Path

import diffopt

HERE = Path(__file__).parent

project = "diffopt"
author = "The diffopt developers"
copyright = f"2026, {author}"
release = version = diffopt.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]
exclude_patterns = ["_build", "_generated", "jupyter_execute"]
templates_path: list[str] = []
default_role = "py:obj"  # single backticks in docstrings become links where they name something

autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {"Tree": "Tree", "Numeric": "Numeric", "Schedule": "Schedule", "Shape": "Shape"}
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebooks; the pages show the outputs stored in them

html_theme = "furo"
html_title = f"diffopt {release}"
html_static_path = ["_static"]


def setup(app):
    sys.path.append(str(HERE))
    from tables import write_tables

    for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
        shutil.copy2(notebook, HERE / "notebooks")
    write_tables(HERE / "_generated", HERE.parent / "benchmarks" / "results")
