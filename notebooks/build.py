"""Keeps the notebook and its script together: `check` compares them, `write` executes and writes.

The script is the source. The notebook is written without execution counts, times and texts; only pictures stay, and the
tags by which the site folds what only draws.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat

SCRIPT = Path(__file__).with_name("ring_attention.py")
NOTEBOOK = SCRIPT.with_suffix(".ipynb")


def from_script() -> Any:
    """The script as a notebook, with cell names that do not change from one write to the next."""
    notebook = jupytext.read(SCRIPT, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {name: value for name, value in cell["metadata"].items() if name == "tags"}
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def execute(notebook: Any) -> None:
    """Runs every cell in place; an exception of a cell is raised here."""
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(SCRIPT.parent)}}).execute()


def keep_pictures(notebook: Any) -> None:
    """Drops all that differs from run to run."""
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
    for cell in notebook.cells:
        cell["metadata"] = {name: value for name, value in cell["metadata"].items() if name == "tags"}
        if cell.cell_type == "code":
            cell["execution_count"] = None
            pictures = [out.data["image/png"] for out in cell.outputs if "image/png" in out.get("data", {})]
            cell["outputs"] = [nbformat.v4.new_output("display_data", {"image/png": p}) for p in pictures]


def check() -> str:
    """What is wrong with the pair, or an empty string."""
    script = [(cell.cell_type, cell.source) for cell in from_script().cells]
    pair = [(cell.cell_type, cell.source) for cell in nbformat.read(NOTEBOOK, as_version=4).cells]
    if script == pair:
        return ""
    return f"{NOTEBOOK.name} and {SCRIPT.name} differ: run `python notebooks/build.py write`"


def main(command: str) -> str | int:
    """Returns what `sys.exit` takes: a message if something is wrong, else 0."""
    if command == "check":
        return check() or 0
    if command != "write":
        return f"usage: build.py check | write. Got {command!r}."
    notebook = from_script()
    execute(notebook)
    keep_pictures(notebook)
    nbformat.write(notebook, NOTEBOOK)
    return 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
