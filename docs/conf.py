"""Pages by Sphinx: `python -m sphinx -W docs docs/_build`; with DOCS_OFFLINE=1 no other site is asked."""

from __future__ import annotations

import os
import sys
import tomllib
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))

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
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "measured/*.rst", "gallery/GALLERY_HEADER.rst"]  # tables are included where they belong
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

sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "gallery",
    "within_subsection_order": "FileNameSortKey",
    "reset_modules": ("matplotlib", "house_style.dress"),
    "remove_config_comments": True,
    "run_stale_examples": True,  # a program may be old and what it draws new
    "show_signature": False,
    "download_all_examples": False,
    "write_computation_times": False,
    "thumbnail_size": (560, 280),
    "min_reported_time": 3600,  # how long a machine took says nothing about the program
    "log_level": {"backreference_missing": "debug"},
}

html_theme = "pydata_sphinx_theme"
html_title = f"linattn {release}"
html_short_title = "linattn"
html_favicon = "_static/mark.svg"
html_static_path = ["_static"]
html_css_files = ["linattn.css"]
html_theme_options = {
    "logo": {"image_light": "_static/mark.svg", "image_dark": "_static/mark.svg", "text": f"linattn {release}"},
    "show_prev_next": False,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 7,
    "show_nav_level": 1,
    "collapse_navigation": False,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": [], "search": []},
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_show_sourcelink = False
html_domain_indices = False
html_context = {"default_mode": "auto"}
html_sidebars = {"index": [], "choose": [], "api/index": [], "search": [], "**": ["sidebar-nav-bs"]}

# Formulas are set by MathJax 3 from these pages themselves: no other site is asked.
mathjax = Path(import_module("sphinx-mathjax-offline").__file__).parent / "static" / "mathjax" / "tex-svg.js"
html_static_path.append(str(mathjax))
mathjax_path = mathjax.name
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "local"}}


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
