"""TOML file, or the name of one that ships, and `--set` overrides -> `Config`.

Errors name the key, what is required, what was given.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic

from ..files import shipped
from .config import BESIDE_INIT_FROM, Config, conflicts

_ADAPTER = pydantic.TypeAdapter(Config)
_REQUIRED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "tuple_type": "an array",
    "dataclass_type": "a table",
    "dataclass_exact_type": "a table",
}


class ConfigError(ValueError):
    """The configuration is wrong; the text has one line a mistake."""


def find(config: str | Path) -> Path:
    """The file: that of a path, or of the name of a configuration that ships. A file of that name comes first.

    Raises:
      ConfigError: for a single word that is neither.
    """
    path = Path(config)
    if path.suffix or len(path.parts) != 1 or path.is_file():
        return path
    names = shipped()
    if path.name not in names:
        ships = f"a name in {next(iter(names.values())).parent}: {', '.join(names)}"
        raise ConfigError(f"config: must be a TOML file, or {ships}. Got {str(config)!r}.")
    return names[path.name]


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a configuration.

    Args:
      path: a TOML file, or the name of a configuration that ships, as "stdlib_tiny".
      overrides: "section.key=value" each; the value is TOML, or a plain string where it is no TOML.

    Returns:
      The checked configuration. `output` defaults to runs/<name of the file>.

    Raises:
      ConfigError: with every mistake that was found.
    """
    path = find(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        nearby = sorted(str(p) for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        hint = f" Configurations there: {', '.join(nearby)}." if nearby else ""
        if path.stem in shipped():
            hint += f" {path.stem} ships with ringjax: give its name alone."
        reason = error.strerror or error
        raise ConfigError(f"config: must be a readable TOML file. Got {path} ({reason}).{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: must be TOML. Got {path}, where {error}.") from None
    for override in overrides:
        _apply(table, override)
    table.setdefault("output", f"runs/{path.stem}")
    return from_table(table)


def from_table(table: Mapping[str, Any]) -> Config:
    """Checks nested dicts of plain TOML values. Raises: ConfigError."""
    problems = [f"{key}: must be {what}. Got {given}." for key, what, given in _not_json(table, "")]
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        # JSON, not Python objects: strict typing then still takes an array for a tuple and a table for a dataclass.
        config = _ADAPTER.validate_json(json.dumps(table))
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_line(item) for item in error.errors(include_url=False))) from None
    problems = [*_told_twice(table, config), *conflicts(config)]
    if problems:
        raise ConfigError("\n".join(problems))
    return config


def to_table(config: Config) -> dict[str, Any]:
    """The inverse of `from_table`, with every default spelled out. Arrays come out as lists, absent keys as None.

    With `model.init_from` the keys that describe the architecture are left out: they say nothing of that model.
    """
    table = json.loads(_ADAPTER.dump_json(config))
    if config.model.init_from is not None:
        table["model"] = {key: table["model"][key] for key in BESIDE_INIT_FROM}
    return table


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _told_twice(table: Mapping[str, Any], config: Config) -> Iterator[str]:
    """Keys of an architecture beside a pretrained model, which has its own."""
    if config.model.init_from is None:
        return
    for key, value in table["model"].items():
        if key not in BESIDE_INIT_FROM:
            yield (
                f"model.{key}: must be absent with model.init_from = {config.model.init_from!r}, whose files describe "
                f"the architecture. Got {_given(value)}."
            )


def known_keys(cls: Any = Config, prefix: str = "") -> list[str]:
    """Every key that a configuration may have, sections included: "model", "model.num_layers", ..."""
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        keys.append(name)
        if dataclasses.is_dataclass(field.default):
            keys += known_keys(type(field.default), f"{name}.")
    return keys


def nearest_key(key: str) -> str:
    """The valid key that an unknown one was most likely meant to be: the same name elsewhere, or a close spelling."""
    keys = known_keys()
    leaf = key.rpartition(".")[2]

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        name = candidate.rpartition(".")[2]
        last = difflib.SequenceMatcher(None, leaf, name).ratio()
        initials = "".join(word[0] for word in name.split("_"))  # lr for learning_rate
        return whole + last + (len(leaf) > 1 and leaf == initials)

    return max(keys, key=likeness)


def _apply(table: dict[str, Any], override: str) -> None:
    """Writes one "a.b=value" into the nested dicts."""
    key, equals, text = override.partition("=")
    key, text = key.strip(), text.strip()
    if not equals or not key:
        raise ConfigError(f"--set: must read section.key=value, as in optimizer.steps=10. Got {override!r}.")
    *sections, name = key.split(".")
    for depth, section in enumerate(sections):
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set: {'.'.join(sections[: depth + 1])} is no section. Got {override!r}.")
    try:
        table[name] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[name] = text  # so that output=runs/other needs no quotes inside the shell's


def _not_json(value: Any, key: str) -> Iterator[tuple[str, str, str]]:
    """TOML values that no key takes and that JSON cannot carry."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _not_json(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _not_json(inner, key)
    elif isinstance(value, datetime.date | datetime.time):
        yield key, "a string, a number, true or false, or an array (no key takes a date or time)", str(value)
    elif isinstance(value, float) and not math.isfinite(value):
        yield key, "a finite number", str(value)


def _line(item: Any) -> str:
    """One mistake, as pydantic reports it, in the house's words."""
    key = ".".join(str(part) for part in item["loc"])
    given = _given(item["input"])
    if item["type"] == "unexpected_keyword_argument":
        near = nearest_key(key)
        what = "section" if isinstance(item["input"], dict) else "key"
        return f"{key}: unknown {what}; the nearest valid key is {near}. Got {given}."
    required = _REQUIRED.get(item["type"])
    if required is None:  # bounds and choices: "Input should be greater than 0"
        required = item["msg"].removeprefix("Input should be ")
    return f"{key}: must be {required}. Got {given}."


def _given(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    text = json.dumps(value)
    return f"{text} ({type(value).__name__})" if isinstance(value, str | list) else text
