"""Builds the site into docs/_build/html, with warnings as errors: `python docs/build.py`, from anywhere."""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.cmd.build import main

DOCS = Path(__file__).parent

if __name__ == "__main__":
    arguments = ["-b", "html", "-W", "--keep-going", "-q", *sys.argv[1:], str(DOCS), str(DOCS / "_build" / "html")]
    sys.exit(main(arguments))
