"""What a bench leaves in files: figures as JSON, and the table between two marker lines of a document."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..usage import UsageError


def check_files(json_file: Path | None, docs: Path | None, begin: str, end: str) -> None:
    """Raises UsageError for files that could not be written: before minutes of work, not after."""
    if json_file is not None and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise UsageError(f"--json must be a file in a directory that exists. Got {json_file}.")
    if docs is not None:
        try:
            around(docs, begin, end)
        except ValueError as error:
            raise UsageError(f"--write-docs: {error}") from None


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def around(path: Path, begin: str, end: str) -> tuple[str, str]:
    """The text of a file before and after its table."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"path must be a file with the lines {begin!r} and {end!r}, once each. Got {path}.")
    return text.split(begin)[0], text.split(end)[1]


def replace(path: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Puts new lines between the two markers."""
    head, tail = around(path, begin, end)
    path.write_text("\n".join([head + begin, "", *lines, "", end + tail]), encoding="utf-8")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """A table whose first ``num_left`` columns are text, the others figures."""
    rule = "|" + "---|" * num_left + "--:|" * (len(columns) - num_left)
    return ["| " + " | ".join(columns) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]
