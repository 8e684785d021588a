"""Sphinx: `python docs/build.py` builds the site, with warnings as errors."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

DOCS = Path(__file__).parent
# The notebook is a page. Its source lies with the script that it is written from.
shutil.copyfile(DOCS.parent / "notebooks" / "ring_attention.ipynb", DOCS / "ring_attention.ipynb")

project = "ringjax"
author = "the ringjax authors"
copyright = f"2026, {author}"  # noqa: A001  Sphinx's name
release = version = importlib.metadata.version("ringjax")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off" if os.environ.get("RINGJAX_DOCS_NOTEBOOK") == "off" else "force"
nb_execution_timeout = 600
nb_execution_raise_on_error = True

nitpicky = True  # a link to what is not there is a warning
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_title = "ringjax"
html_theme_options = {
    "repository_branch": "main",
    "show_toc_level": 2,
    "navigation_with_keys": False,
}
