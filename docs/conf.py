"""Sphinx: `python docs/build.py` builds the site, with warnings as errors."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "extensions"))
# The notebook is a page. Its source lies with the script that it is written from.
shutil.copyfile(DOCS.parent / "notebooks" / "ring_attention.ipynb", DOCS / "ring_attention.ipynb")

project = "ringjax"
author = "the ringjax authors"
copyright = f"2026, {author}"  # noqa: A001  Sphinx's name
release = version = importlib.metadata.version("ringjax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "signatures",
    "docstrings",
    "commands",
]
exclude_patterns = ["_build"]
default_role = "code"  # `this` in a docstring

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off" if os.environ.get("RINGJAX_DOCS_NOTEBOOK") == "off" else "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True

nitpicky = True  # a link to what is not there is a warning
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80  # beyond it, an argument a line
toc_object_entries_show_parents = "hide"

# Names of other libraries are no links: their inventories would have to be fetched, and the site builds offline.
LIBRARIES = {"jax", "jaxlib", "jaxtyping", "numpy", "flax", "optax", "os", "pathlib", "typing", "collections"}

html_theme = "sphinx_book_theme"
html_title = "ringjax"
html_static_path = ["static"]
html_css_files = ["reference.css"]
html_theme_options = {
    "repository_branch": "main",
    "show_toc_level": 2,
    "navigation_with_keys": False,
}


def setup(app: Any) -> None:
    app.connect("missing-reference", lambda app, env, node, content: _of_a_library(node, content))


def _of_a_library(node: Any, content: Any) -> Any:
    """The name as it stands, without a link and without a warning."""
    known = node.get("refdomain") == "py" and node["reftarget"].split(".")[0] in LIBRARIES
    return content if known else None
