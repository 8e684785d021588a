"""Tables in documents that a command regenerates: the text between two marker lines."""

from collections.abc import Sequence
from pathlib import Path


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
