"""Sections of docstrings (Args, Attributes, Returns, Raises, Source) -> fields, whose entries are lists.

An entry may name several arguments, over several lines: ``query, key, value: ...``. Napoleon takes that for a type.
"""

from __future__ import annotations

import re
from typing import Any

import signatures
from sphinx.application import Sphinx

_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Source|Reference):(.*)")
_LABELS = {"Args": "Arguments", "Reference": "Source"}
_LISTS = ("Args", "Attributes", "Raises")
_ENTRY = re.compile(r"((?:\w+,\s+)*\w+):(?:\s+(.*))?", re.DOTALL)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}


def _process(_: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    found: list[str] = []
    body = list(lines)
    while body:
        line = body.pop(0)
        section = _SECTION.fullmatch(line)
        if section is None:
            found.append(line)
            continue
        block: list[str] = []
        while body and (not body[0].strip() or body[0].startswith(" ")):
            block.append(body.pop(0))
        label, rest = section.groups()
        found += ["", f":{_LABELS.get(label, label)}:"]
        if label in _LISTS:
            found += [f"  {each}" for each in _entries(label, name, block)]
        else:
            found += [f"  {each}" for each in [rest.strip(), *_dedented(block)]]
        if body and body[0].strip():  # a field list ends with an empty line, unless another field follows
            found.append("")
    keys = signatures.keys(name) if what == "class" else {}
    if keys:
        found += ["", ":Keys:", *(f"  - **{key}** (``{kind}``)" for key, kind in keys.items()), ""]
    lines[:] = found


def _entries(label: str, name: str, block: list[str]) -> list[str]:
    found: list[str] = []
    groups: list[list[str]] = []
    for line in _dedented(block):
        if line and not line.startswith(" "):
            groups.append([])
        if groups:
            groups[-1].append(line.strip())
    for group in groups:
        match = _ENTRY.fullmatch("\n".join(group))
        if match is None:
            raise ValueError(f"{name}: an entry of {label} must begin with names and a colon. Got {group[0]!r}.")
        names = re.split(r",\s+", match[1])
        text = (match[2] or "").rstrip().splitlines()
        heads = [f"**{each}**" for each in names]
        if label == "Attributes" and name in signatures.RESULTS:
            types = [signatures.attribute_type(name, each) for each in names]
            last = (*types[1:], None)
            heads = [
                f"{head} (``{kind}``)" if kind and kind != after else head
                for head, kind, after in zip(heads, types, last, strict=True)
            ]
        found.append(f"- {', '.join(heads)}: {text[0] if text else ''}")
        found += [f"  {line}" for line in text[1:]]
    return found


def _dedented(block: list[str]) -> list[str]:
    """Without the indentation of its first line."""
    least = min((len(line) - len(line.lstrip()) for line in block if line.strip()), default=0)
    return [line[least:] for line in block]
