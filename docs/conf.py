"""Pages by Sphinx: `python -m sphinx -W docs docs/_build`; with DOCS_OFFLINE=1 no other site is asked."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent

project = "linattn"
author = "linattn developers"
copyright = f"2026, {author}"
release = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
version = release

extensions = [
    "numpydoc",
    "pytest_doctestplus.sphinx.doctestplus",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "measured/*.rst"]  # the measured tables are included where they belong
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # numpydoc's sections say it with shapes
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

intersphinx_mapping = (
    {}
    if os.environ.get("DOCS_OFFLINE")
    else {
        "numpy": ("https://numpy.org/doc/stable/", None),
        "python": ("https://docs.python.org/3/", None),
    }
)

html_theme = "pydata_sphinx_theme"
html_title = f"linattn {release}"
html_static_path = ["_static"]
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_show_sourcelink = False
html_sidebars = {"**": []}
if (HERE / "_static" / "tex-svg.js").exists():  # MathJax 3 from disk, where somebody put it
    mathjax_path = "tex-svg.js"


def formulas_stay_as_written(app, what, name, obj, options, lines):
    """Docstrings are written for a terminal: an indented block is a formula, a bar is an absolute value."""
    out, previous, literal = [], "", False
    for line in lines:
        indented = line.startswith("    ")
        if literal and line.strip() and not indented:
            literal = False
        if indented and not literal and not out[-1:][0].strip() and previous and not previous.startswith((" ", "..")):
            out += ["::", ""]
            literal = True
        out.append(line if literal or ">>>" in line else line.replace("|", "\\|"))
        previous = line if line.strip() else previous
    lines[:] = out


def setup(app):
    """Before numpydoc reads the sections."""
    app.connect("autodoc-process-docstring", formulas_stay_as_written, priority=100)
