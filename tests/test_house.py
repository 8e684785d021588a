"""Rules of the house that a machine can check: sizes, names of machines, promises of the documents."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import rounds

ROOT = Path(__file__).parents[1]
# Suffixes of text files in the repository.
KEPT = {".cff", ".ipynb", ".md", ".py", ".toml", ".txt", ".yaml", ".yml", ""}
SKIPPED = {
    ".git",
    ".venv",
    "_build",
    "build",
    "dist",
    "runs",
    "__pycache__",
    ".hypothesis",
    ".pytest_cache",
    ".ruff_cache",
}


def text_files() -> list[Path]:
    """Text files of the repository, without what tools leave behind."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        ignored = any(part in SKIPPED or part.startswith("venv") or part.endswith(".egg-info") for part in parts)
        if path.is_file() and path.suffix in KEPT and not ignored:
            found.append(path)
    return found


FILES = text_files()
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]


def test_the_rounds_name_what_there_is():
    for entry in (*rounds.BREADTH, *rounds.ONCE):
        file, _, test = entry.partition("::")
        text = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
        assert not test or f"def {test.partition('[')[0]}(" in text, entry
    assert rounds.listed("tests/test_a.py::test_b[c]", ("test_a::test_b",))
    assert not rounds.listed("tests/test_a.py::test_b[c]", ("test_a::test_b[d]", "test_ab", "test_a::test"))


def test_the_walk_finds_the_repository():
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {"README.md", "pyproject.toml", ".ci/run", "ringjax/attention.py", "tests/oracle.py"} <= names


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".py"], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_python_files_are_short_and_say_what_they_are_for(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    if path.parent.name != "notebooks" and text.strip():
        assert text.startswith(('"""', 'r"""')), "a module opens with a docstring"


def test_no_package_index_and_no_home_directory_is_named():
    # Written in pieces, so that this file passes its own test.
    forbidden = ["files.python" + "hosted.org", "pypi" + ".org", "index" + "-url", "/root" + "/", "/home" + "/"]
    found = [(p.name, word) for p in FILES for word in forbidden if word in p.read_text(encoding="utf-8")]
    assert found == []


def test_no_lock_file():
    assert not [p.name for p in ROOT.iterdir() if re.search(r"lock|requirements.*\.txt", p.name)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_named_in_documents_exist(document: Path):
    text = document.read_text(encoding="utf-8")
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    missing = [name for name in linked if not (document.parent / name).exists()]
    # Runs write under runs/, which no clone has; a name with < or * is a pattern.
    quoted = re.findall(r"`(?:[^`\n]*\s)?((?:configs|docs|ringjax|tests|notebooks)/[\w./-]+)", text)
    missing += [name for name in quoted if not (ROOT / name.rstrip(".")).exists()]
    assert missing == []


def test_readme_holds_the_two_commands():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -e . && ringjax train configs/stdlib_tiny.toml" in readme
    assert 'pip install -e ".[test]" && pytest' in readme


def test_ci_runs_the_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for line in ('pip" install -e ".[test]"', '        pytest "$@"\n', "\ninstall python first\ntest_in first first\n"):
        assert line in script


def test_the_command_line_is_where_pyproject_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["ringjax"].partition(":")
    source = (ROOT / Path(*module.split(".")) / "__init__.py").read_text(encoding="utf-8")
    assert re.search(rf"^(def {function}\(|{function} = )", source, re.MULTILINE)


def test_notebook_is_small_and_keeps_pictures_only():
    path = ROOT / "notebooks" / "ring_attention.ipynb"
    assert path.stat().st_size < 600_000
    outputs = [out for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] for out in cell.get("outputs", [])]
    assert outputs, "the pictures that teach are committed"
    assert all("image/png" in out.get("data", {}) for out in outputs)
