"""``.. command:: train``: usage, help and options of a command, from the Typer app itself.

``.. settings:: model``: the keys of a section of the configuration of ``ringjax train``, from its dataclass: type and
default as they are checked, and the comment behind each field.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import typing
from typing import Any

import typer
from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.application import Sphinx

from ringjax.cli import app as ringjax_app
from ringjax.training import config


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command", Command)
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True}


class _Generated(Directive):
    required_arguments = 1
    final_argument_whitespace = True

    def lines(self) -> list[str]:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        node = nodes.container()
        source = f"{type(self).__name__}: {self.arguments[0]}"
        self.state.nested_parse(StringList(self.lines(), source=source), self.content_offset, node)
        return node.children


# --- commands --------------------------------------------------------------------------------------------------------


class Command(_Generated):
    def lines(self) -> list[str]:
        name = self.arguments[0]
        command: Any = typer.main.get_command(ringjax_app)
        context = command.context_class(command, info_name="ringjax")
        for word in name.split():
            command = command.commands[word]
            context = command.context_class(command, parent=context, info_name=word)
        usage = command.get_usage(context).removeprefix("Usage: ")
        found = [".. code-block:: text", "", f"  {' '.join(usage.split())}", ""]
        found += [*_prose(inspect.cleandoc(command.help or "")), ""]
        found += [f".. program:: {context.command_path}", ""]
        panels: dict[str, list[Any]] = {}
        for parameter in command.params:
            if "--help" not in parameter.opts:
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or "", []).append(parameter)
        for panel, parameters in panels.items():
            found += [f"**{panel}**", ""] if panel else []
            for parameter in parameters:
                found += _option(parameter, context)
        found += [*_prose(inspect.cleandoc(command.epilog or "")), ""]
        return found


def _option(parameter: Any, context: Any) -> list[str]:
    """What --help says of it, the default apart."""
    head, text = parameter.get_help_record(context)
    text, _, notes = text.partition("  [")
    notes = [f"{note[:1].upper()}{note[1:]}." for note in notes.rstrip("]").split("; ") if note]
    notes = [re.sub(r"^(Default): (.*)\.$", r"\1: ``\2``.", note) for note in notes]
    return [f".. option:: {head}", "", f"   {' '.join([_escaped(text), *notes]).strip()}", ""]


def _prose(text: str) -> list[str]:
    """Markdown of a help text, of which paragraphs and code in backticks are used."""
    return [_escaped(line) for line in text.splitlines()]


def _escaped(text: str) -> str:
    return re.sub(r"([*|_])(?=\W|$)|(?<=\s)([*|_])", lambda match: "\\" + match[0], text)


# --- keys of a configuration -----------------------------------------------------------------------------------------


class Settings(_Generated):
    def lines(self) -> list[str]:
        section = self.arguments[0]
        cls = config.Config if section == "top" else config.Config.__dataclass_fields__[section].type
        cls = getattr(config, cls) if isinstance(cls, str) else cls
        hints = typing.get_type_hints(cls, include_extras=True)
        prefix = "" if section == "top" else f"{section}."
        about = "" if section == "top" else inspect.cleandoc(cls.__doc__ or "").partition("Attributes:")[0]
        found = [*_prose(about), ""]
        for name, comment in _comments(cls).items():
            if section == "top" and hasattr(hints[name], "__dataclass_fields__"):
                continue  # a section of its own
            default = cls.__dataclass_fields__[name].default
            kind, given = _type(hints[name]), "optional" if default is None else f"default ``{_toml(default)}``"
            found += [f".. confval:: {prefix}{name}", ""]
            found += [f"   {kind[:1].upper()}{kind[1:]}; {given}. {_sentence(comment)}".rstrip(), ""]
        return found


def _comments(cls: type) -> dict[str, str]:
    """What stands behind a field, or on the lines before it."""
    source = inspect.getsource(cls).splitlines()
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            line = source[node.lineno - 1]
            before, at = [], node.lineno - 2
            while source[at].strip().startswith("#"):
                before.insert(0, source[at].strip().lstrip("# "))
                at -= 1
            behind = line.rpartition("  # ")[2] if "  # " in line else ""
            found[ast.unparse(node.target)] = " ".join([*before, behind]).strip()
    return found


def _sentence(text: str) -> str:
    text = re.sub(r'(?<!`)(\[?"[^"]*"\]?)', r"``\1``", text)
    text = text[:1].upper() + text[1:]
    return _escaped(text + ("" if not text or text.endswith(".") else "."))


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


_WORDS = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): None}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _type(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = [
            f"{words} {getattr(bound, short):g}"
            for field in inner[1:]
            for bound in field.metadata
            for short, words in _BOUNDS.items()
            if hasattr(bound, short)
        ]
        return f"{_type(inner[0])}, {' and '.join(bounds)}"
    if origin is typing.Literal:
        return " or ".join(f'``"{each}"``' for each in inner)
    if origin is tuple:
        return "list of strings"
    if inner:
        return " or ".join(_type(each) for each in inner if each is not type(None))
    return _WORDS[hint] or ""
