"""Tiles that `ringjax tune` found on this machine, in a file of the user's: they take the place of the built-in ones.

The file is that of the environment variable RINGJAX_TILES (set and empty: none), else ringjax/tiles.json in the user's
configuration directory. It is read once a process, when a kernel is first traced; a later process sees what has
changed. All processes of one job should see the same table. Whatever is wrong with the file, a run goes on with the
built-in tiles and one warning says what. Knows neither JAX nor the kernels: tiles say themselves what cannot be.
"""

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

# To be raised when a kernel changes so much that tiles found for the old one mean little.
FORMAT = 1
VARIABLE = "RINGJAX_TILES"


class Tiles(Protocol):
    """A kernel's own dataclass of tile sizes."""

    def refusal(self, size: int) -> str | None:
        """What keeps the kernel from running with these tiles for heads of this native size; None: nothing."""
        ...


T = TypeVar("T", bound=Tiles)


@dataclasses.dataclass(frozen=True)
class Key:
    """What tiles are looked up by."""

    device_kind: str  # as JAX names it
    implementation: str
    kernel: str  # which one of the implementation, and how it is called: "dq", or "forward, carry, masked"
    dtype: str  # "half" or "float32"
    head_size: int  # the next one of 64, 128 and 256

    def __str__(self) -> str:
        return " / ".join(str(part) for part in dataclasses.astuple(self))


def dtype_class(dtype: Any) -> str:
    """16-bit dtypes take the same tiles."""
    return "float32" if str(dtype) == "float32" else "half"


def path() -> Path | None:
    """The user's file, whether there is one or not; None: none is to be read."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(os.path.expanduser(named)) if named else None
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.config")) / "ringjax" / "tiles.json"


class LookUp(Protocol):
    """How a kernel comes by its tiles where the configuration fixes none: ``chosen``, or what `ringjax tune` tries."""

    def __call__(self, built_in: T, key: Key) -> T:
        """Tiles of the type of ``built_in``."""
        ...


def chosen(built_in: T, key: Key) -> T:
    """The user's tiles, otherwise ``built_in``, a dataclass of the same type."""
    file = path()
    return built_in if file is None else _found(file, VARIABLE in os.environ, key, built_in)


def file_with_tiles(device_kind: str, implementation: str, dtype: Any) -> Path | None:
    """The user's file if it has an entry for any kernel of this implementation, whatever the head size; else None."""
    file = path()
    if file is None:
        return None
    known = (key.split(" / ") for key in _entries(file, VARIABLE in os.environ))
    wanted = [device_kind, implementation, dtype_class(dtype)]
    return file if any([*key[:2], *key[3:4]] == wanted for key in known) else None


def forget() -> None:
    """The file is read again at the next lookup. What JAX has traced stays as it is, see jax.clear_caches."""
    _entries.cache_clear()
    _found.cache_clear()


@functools.cache
def _found(file: Path, named: bool, key: Key, built_in: Any) -> Any:
    entry = _entries(file, named).get(str(key))
    if entry is None:
        return built_in
    try:
        return parse(entry, key, built_in)
    except ValueError as error:
        _warn(file, f"tiles for {str(key)!r}: {error}")
        return built_in


@functools.cache
def _entries(file: Path, named: bool) -> Mapping[str, Any]:
    try:
        if named and not file.exists():
            raise ValueError(f"{VARIABLE} must name a file, or be empty: no table. There is no such file.")
        return read(file)
    except (ValueError, OSError) as error:
        _warn(file, str(error))
        return {}


def _warn(file: Path, what: str) -> None:
    warnings.warn(f"{file}: {what} The built-in tiles are used.", stacklevel=2)


# ----------------------------------------------------------------------------------------------------- the file


def read(file: Path) -> dict[str, Any]:
    """All entries by key; none if there is no file. Raises ValueError for what is not a table, and OSError."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be JSON, as `ringjax tune` writes it. Got {error}.") from None
    if not isinstance(table, dict) or "format" not in table:
        raise ValueError("must be a table of `ringjax tune`, an object with a format. Got other JSON.")
    if table["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT}; `ringjax tune --table` another file. Got {table['format']!r}.")
    if not isinstance(table.get("tiles"), dict):
        raise ValueError(f"tiles must be an object. Got {type(table.get('tiles')).__name__}.")
    return table["tiles"]


def merge(file: Path, changes: Mapping[Key, Any]) -> None:
    """Replaces or adds entries of the file and drops those that are None; others stay. Writes all of it or nothing."""
    entries = read(file)
    before = dict(entries)
    for key, entry in changes.items():
        entries.pop(str(key), None)
        if entry is not None:
            entries[str(key)] = entry
    file = file.resolve()  # a link stays a link
    if entries == before and file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(unfinished, "w", encoding="utf-8") as out:
            json.dump({"format": FORMAT, "tiles": dict(sorted(entries.items()))}, out, indent=1)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    forget()


def parse(entry: Any, key: Key, like: T) -> T:
    """Tiles of an entry, of the type of ``like``. Raises ValueError for what the kernel does not know."""
    values = entry.get("tiles") if isinstance(entry, dict) else None
    if not isinstance(values, dict):
        raise ValueError("must be an object with tiles.")
    fields = {field.name: field for field in dataclasses.fields(like)}  # pyright: ignore[reportArgumentType]
    for name in [*values, *fields]:
        if name not in fields:
            raise ValueError(f"{name} is not known to this version of ringjax.")
        if name not in values and fields[name].default is dataclasses.MISSING:
            raise ValueError(f"{name} is missing.")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in given.items():
        if _shape(value) != _shape(getattr(like, name)):
            raise ValueError(f"{name} must be of the type of {getattr(like, name)!r}. Got {value!r}.")
    tiles = type(like)(**given)
    refusal = tiles.refusal(key.head_size)
    if refusal is not None:
        raise ValueError(refusal)
    return tiles


def _shape(value: Any) -> Any:
    """The type, of a tuple those of its elements: True is not 1."""
    return tuple(map(_shape, value)) if isinstance(value, tuple) else type(value)
