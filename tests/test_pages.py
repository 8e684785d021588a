"""Every page of the site, the README and CONTRIBUTING: its Python runs, its commands parse, its names exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jax
import pytest
import typer
from test_models_gguf import smol_that_reads
from test_reference import resolve

from ringjax.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# The changelog's names are of their time; the README's examples have a file of their own, tests/test_readme.py.
PAGES = [page for page in PAGES if page.name != "CHANGELOG.md" and "_build" not in page.parts]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def of(language: str) -> list[Any]:
    return [pytest.param(page, id=page.as_posix()) for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", [param for param in of("python") if param.id != "README.md"])
def test_examples_run_one_after_another(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a directory with the two files that examples name: a tiny model of the same form, and a text."""
    smol_that_reads(tmp_path / "SmolLM2-135M-Instruct.gguf")
    (tmp_path / "book.txt").write_text("the lighthouse stood at the end of a long road, " * 60, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(page, "python"))
    assert "assert " in code, "an example checks itself"
    with jax.numpy_dtype_promotion("standard"):  # as users have it
        exec(compile(code, page.as_posix(), "exec"), {"__name__": "example"})


def commands(page: Path) -> list[list[str]]:
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    parts = (part.strip() for line in lines for part in line.split("&&"))
    return [shlex.split(part, comments=True) for part in parts if part and not part.startswith("#")]


@pytest.mark.parametrize("page", of("bash"))
def test_commands_parse(page: Path) -> None:
    """Of ringjax with every flag; of pip with the extras that there are."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for command in commands(page):
        while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
            command = command[1:]
        if command[:1] == ["ringjax"]:
            parse(command[1:])
        for extra in re.findall(r"(?:ringjax|\.)\[([\w,]+)\]", " ".join(command)):
            assert set(extra.split(",")) <= set(extras), command


def parse(arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    context = None
    while arguments and arguments[0] in getattr(command, "commands", ()):
        context = command.context_class(command, parent=context, info_name=command.name)
        command, arguments = command.commands[arguments[0]], arguments[1:]
    assert context is not None, arguments
    command.make_context(command.name, list(arguments), parent=context, resilient_parsing="--help" in arguments)


@pytest.mark.parametrize("page", [pytest.param(page, id=page.as_posix()) for page in PAGES])
def test_names_exist(page: Path) -> None:
    """What a page calls ``ringjax.something`` is there."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in sorted(set(re.findall(r"\bringjax\.([a-zA-Z_]\w*(?:\.[a-zA-Z_]\w*)*)", text))):
        resolve(f"ringjax.{name}")
