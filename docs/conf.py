"""The documentation: pages from docstrings, notebooks with their stored outputs, and tables from records."""

import importlib
import pkgutil
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

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
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


PACKAGES = [importlib.import_module(f"diffopt.{found.name}") for found in pkgutil.iter_modules(diffopt.__path__)]
HOMES = {
    name: f"{package.__name__}.{name}"
    for package in PACKAGES
    for name in package.__all__
    if "_" in name or name[0].isupper()  # shorter names, such as `step`, are names of arguments too
}


def link_bare_name(app, env, node, contnode):
    """Link a public name in the docstring of another package to where it is documented."""
    target = HOMES.get(node["reftarget"]) if node.get("refdomain") == "py" else None
    if target is None:
        return None
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, contnode)


def skip_fields(app, what, name, value, skip, options):
    """Leave out the fields of named tuples, which the docstring of the class describes."""
    return True if type(value).__name__ == "_tuplegetter" else None


def setup(app):
    app.connect("missing-reference", link_bare_name)
    app.connect("autodoc-skip-member", skip_fields)
    sys.path.append(str(HERE))
    from figures import draw_optimizers
    from tables import write_tables

    for notebook in (HERE.parent / "notebooks").glob("*.ipynb"):
        shutil.copy2(notebook, HERE / "notebooks")
    write_tables(HERE / "_generated", HERE.parent / "benchmarks" / "results")
    draw_optimizers(HERE / "_generated" / "optimizers.png")
