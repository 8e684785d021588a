"""Files -> documents: bytes, or token ids through a tokenizer. Every file that is not what it must be is named."""

from __future__ import annotations

import dataclasses
import glob
import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ringjax.models import Tokenizer

from .config import Data

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_INT32 = np.iinfo(np.int32)
Document = bytes | np.ndarray  # or int32 [tokens]


class DataError(ValueError):
    """There is no text where the configuration says there is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """What the files hold.

    Attributes:
      documents: in the order of the files, none of them empty.
      empty: names of files, and lines, without text; nothing of the standard library, which has empty files on purpose.
    """

    documents: list[Document]
    empty: str = ""


def read_documents(config: Data, tokenizer: Tokenizer | None) -> Documents:
    """Reads what `config` names.

    A file is a document; of "jsonl" each line that is not blank. A tokenizer adds the tokens that it puts around a
    text, and its first end token behind it, unless that stands there. Ids of "tokens" are taken as they are.

    Args:
      config: `[data]`.
      tokenizer: of "text" and "jsonl"; with it the standard library is text too.

    Raises:
      DataError: naming the file, and the line.
    """
    if config.source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(p for p in root.rglob("*.py") if not _NOT_LIBRARY & {*p.relative_to(root).parts})
        if not files:
            raise DataError(
                f"data.source: 'stdlib' needs the .py files of the standard library in {root}. Got none; "
                "set data.source = 'paths' and data.paths."
            )
    else:
        files = list(_find(config.paths))
    kept: list[Document] = []
    empty: list[str] = []
    for file in files:
        for name, content in _contents(file, config, text=tokenizer is not None):
            if not len(content):
                empty.append(name)
            elif isinstance(content, str):
                assert tokenizer is not None
                kept.append(encode(content, tokenizer))
            else:
                kept.append(content)
    if not kept:
        raise DataError(f"data: needs text. Got nothing but empty files: {_some(empty or list(map(str, files)))}.")
    return Documents(documents=kept, empty="" if config.source == "stdlib" else _some(empty))


def encode(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """A document's ids, int32 [tokens]."""
    ids = tokenizer.encode(text)
    if tokenizer.eos_ids and (not ids or ids[-1] != tokenizer.eos_ids[0]):
        ids.append(tokenizer.eos_ids[0])
    return np.asarray(ids, np.int32)


def as_ids(value: Any) -> np.ndarray:
    """int32 [tokens] of a document of ids. Raises: ValueError, saying what is required and what was given."""
    array = np.asarray(value)
    if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or not array.size):
        raise ValueError(f"must be integers of one dimension. Got {array.dtype} {array.shape}.")
    if array.size and (array.min() < 0 or array.max() > _INT32.max):
        raise ValueError(f"must be ids in [0, 2^31). Got {array.min()} to {array.max()}.")
    return array.astype(np.int32)


def _contents(file: Path, config: Data, *, text: bool) -> Iterator[tuple[str, str | Document]]:
    """(name, document) of a file."""
    if config.source == "tokens":
        yield str(file), _ids_of(file)
        return
    data = _bytes_of(file)
    if config.source == "paths" or not text:
        yield str(file), data
    elif config.source == "jsonl":
        yield from _lines_of(file, data, config.text_key)
    else:
        yield str(file), _decoded(str(file), data)


def _lines_of(file: Path, data: bytes, key: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        required = f"data.paths: each line of a jsonl file must be an object whose {key!r} is a string. Got {where}"
        try:
            value = json.loads(_decoded(where, line))
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{required}, where there is no JSON: {error}.") from None
        if not isinstance(value, dict):
            raise DataError(f"{required}, which is {type(value).__name__}.")
        if key not in value:
            raise DataError(f"{required}, with the keys {sorted(value)}; data.text_key names another.")
        if not isinstance(value[key], str):
            raise DataError(f"{required}, where it is {type(value[key]).__name__}.")
        yield where, value[key]
    if not data.strip():
        yield str(file), ""


def _ids_of(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
    except OSError as error:
        raise DataError(f"data: must be readable. Got {file} ({error.strerror or error}).") from None
    except (ValueError, EOFError, SyntaxError) as error:  # objects, another kind of file, one that ends too early
        raise DataError(
            f"data.paths: each file of source 'tokens' must be a .npy of integers. Got {file}: {error}"
        ) from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"data.paths: each file of source 'tokens' must be a .npy, not several. Got {file}.")
    try:
        return as_ids(array)
    except ValueError as error:
        raise DataError(f"data.paths: {file} {error}") from None


def _decoded(where: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"data.paths: text must be UTF-8. Got {where}, where byte {error.start} ({data[error.start]:#04x}) is not."
        ) from None
    return text


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"data: must be readable. Got {file} ({error.strerror}).") from None


def _some(names: Sequence[str]) -> str:
    """Some of the names, no more than a line takes."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _find(patterns: Sequence[str]) -> Iterator[Path]:
    """Files of the patterns, in their order, each file once; a directory stands for all visible files below it."""
    seen: set[Path] = set()
    for pattern in patterns:
        try:
            files = _matches(pattern)
        except (OSError, RuntimeError) as error:  # a directory that may not be entered; no home of that name
            raise DataError(f"data.paths: each entry must be readable. Got {pattern!r} ({error}).") from None
        if not files:
            raise DataError(f"data.paths: each entry must match at least one file. Got {pattern!r} in {Path.cwd()}.")
        yield from (file for file in files if file.resolve() not in seen)
        seen.update(file.resolve() for file in files)


def _matches(pattern: str) -> list[Path]:
    expanded = Path(pattern).expanduser()
    hits = [expanded] if expanded.exists() else [Path(p) for p in glob.glob(str(expanded), recursive=True)]
    return sorted({file for hit in hits for file in ([hit] if hit.is_file() else _visible_files(hit))})


def _visible_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            yield path
