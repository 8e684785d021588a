"""The reference holds every public name and every command, and docstrings that say what each argument is.

Sphinx makes the pages of directives, which are read here without it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen
import pytest
import typer

import ringjax.inspect
from ringjax.cli import app
from ringjax.training import config

PAGES = Path(__file__).parents[1] / "docs" / "reference"
_DIRECTIVE = re.compile(
    r"^\.\. (?:autofunction|autoclass|autoexception):: (\S+)\n(?:   :members:((?:.+\n)(?:      .+\n)*))?", re.MULTILINE
)


def documented() -> dict[str, list[str]]:
    """Names on the pages, and their members that are shown with them."""
    found: dict[str, list[str]] = {}
    for page in PAGES.glob("*.md"):
        for name, members in _DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            assert name not in found, "two places for one name"
            found[name] = [member.strip() for member in members.split(",") if member.strip()]
    return found


def public() -> Iterator[str]:
    for name in ("ringjax", "ringjax.nnx", "ringjax.linen", "ringjax.models", "ringjax.training"):
        for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(name)))):
            if isinstance(node, ast.ImportFrom) and node.level and node.module:  # not modules
                yield from (f"{name}.{alias.name}" for alias in node.names if alias.asname == alias.name)
    yield from (f"ringjax.inspect.{name}" for name in ringjax.inspect.__all__)


def resolve(name: str) -> Any:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return functools.reduce(getattr, parts[end:], module)
    raise AssertionError(f"there is no {name}")


def entries() -> Iterator[str]:
    for name, members in documented().items():
        yield name
        yield from (f"{name}.{member}" for member in members)


def test_every_public_name_is_in_the_reference() -> None:
    names = set(public())
    assert {"ringjax.ring_attention", "ringjax.training.fit", "ringjax.inspect.inspect_ring"} < names
    assert names <= documented().keys()


@pytest.mark.parametrize("name", ["ringjax.nnx.Decoder", "ringjax.KVCache", "ringjax.models.Tokenizer"])
def test_every_method_is_in_the_reference(name: str) -> None:
    """Of classes that users call; others have methods for the inside as well."""
    own = {
        key
        for key, value in vars(resolve(name)).items()
        if key[0] != "_" and callable(getattr(value, "__func__", value))
    }
    assert own and own <= set(documented()[name])


@pytest.mark.parametrize("name", sorted(entries()))
def test_a_docstring_says_what_each_argument_is(name: str) -> None:
    thing = resolve(name)
    text = inspect.getdoc(thing) or ""
    assert text.strip(), "no docstring"
    if callable(thing):
        words = set(re.findall(r"\w+", text))
        assert not [argument for argument in arguments(thing) if argument not in words]


def arguments(thing: Any) -> list[str]:
    if typing.is_typeddict(thing) or getattr(thing, "_is_protocol", False):
        return []
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        ours = [field for field in dataclasses.fields(thing) if field.name in thing.__annotations__]
        of_flax = ("parent", "name") if issubclass(thing, flax.linen.Module) else ()
        return [field.name for field in ours if not field.name.startswith("_") and field.name not in of_flax]
    if inspect.isclass(thing) and issubclass(thing, Exception) and "__init__" not in vars(thing):
        return []
    call = thing.__init__ if inspect.isclass(thing) and "__init__" in vars(thing) else thing
    return [name for name in inspect.signature(call).parameters if name not in ("self", "cls", "args", "kwargs")]


def test_every_command_is_in_the_reference() -> None:
    def walk(command: Any, path: str = "") -> Iterator[str]:
        inner = getattr(command, "commands", {})
        yield from (name for word, each in inner.items() for name in walk(each, f"{path} {word}".strip()))
        if not inner:
            yield path

    page = (PAGES / "cli.md").read_text(encoding="utf-8")
    commands = set(walk(typer.main.get_command(app)))
    assert {"train", "bench ring"} < commands
    assert commands == set(re.findall(r"^\.\. command:: (.+)$", page, re.MULTILINE))
    assert commands == set(re.findall(r"^## ringjax (.+)$", page, re.MULTILINE))


def test_every_section_of_a_configuration_is_in_the_reference() -> None:
    page = (PAGES / "configuration.md").read_text(encoding="utf-8")
    fields = dataclasses.fields(config.Config)  # pyright: ignore[reportArgumentType]  pydantic's own decorator
    sections = {field.name for field in fields if dataclasses.is_dataclass(field.default)}
    assert sections | {"top"} == set(re.findall(r"^\.\. settings:: (.+)$", page, re.MULTILINE))
