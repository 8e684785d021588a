"""`ringjax inspect`: arguments in, report out."""

import json
import re
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..usage import UsageError
from . import inspect_ring
from .compile import InspectError
from .hlo import HloError


def main(*, as_json: bool, picture: Path | None, **given: Any) -> int:
    """`ringjax inspect`.

    Args:
      as_json: print the report as JSON.
      picture: a PNG to draw.
      given: arguments of :func:`ringjax.inspect.inspect_ring`.

    Returns:
      The exit status: 0, or 1 where the compiler refused.

    Raises:
      UsageError: for wrong arguments and a missing compiler.
    """
    if picture is not None and not picture.absolute().parent.is_dir():
        raise UsageError(f"--picture must be a file in a directory that exists. Got {str(picture)!r}.")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)  # or the compiler, a process of its own, would go on alone
    try:
        report = inspect_ring(**given)
    except HloError as error:
        return _fail(error, 1)
    except (ValueError, NotImplementedError) as error:
        raise UsageError(with_flags(str(error), given)) from None
    except InspectError as error:
        if error.code == 2:
            raise UsageError(with_flags(str(error), given)) from None
        return _fail(error, error.code)
    except KeyboardInterrupt:
        return _fail("interrupted; the compiler was stopped", 130)
    if as_json:
        sys.stdout.write(json.dumps(report.to_json(), indent=1) + "\n")
    else:
        from .text import lines

        sys.stdout.write("\n".join(lines(report)) + "\n")
    if picture is not None:
        from .picture import draw

        draw(report, picture)
        sys.stderr.write(f"wrote {picture}\n")
    return 0


def parse_window(text: str | None) -> int | tuple[int | None, int | None] | None:
    """What "W" or "L,R" stands for; "none" is no bound."""
    if text is None:
        return None
    try:
        parts = [None if part.strip() == "none" else int(part) for part in text.split(",")]
        fits = all(part is None or part >= 0 for part in parts)
    except ValueError:
        parts, fits = [], False
    if fits and len(parts) == 1 and parts[0] is not None:
        return parts[0]
    if fits and len(parts) == 2:
        return parts[0], parts[1]
    raise UsageError(f"--window must be W, or L,R: numbers of at least 0, or 'none' for L or R. Got {text!r}.")


def parse_shared(text: str | None) -> int | tuple[int, ...] | None:
    """What "G" or "G1,G2" stands for."""
    if text is None:
        return None
    sizes = _parse_sizes("shared-length", text, "G1,G2,...", least=0)
    return sizes[0] if len(sizes) == 1 else sizes


def parse_sweep(text: str | None) -> tuple[int, ...]:
    """The rings of "C1,C2"."""
    return () if text is None else _parse_sizes("sweep", text)


def parse_axes(text: str | None) -> tuple[int, ...] | None:
    """The sizes of "C1,C2"."""
    return None if text is None else _parse_sizes("axes", text)


def _parse_sizes(name: str, text: str, form: str = "C1,C2,...", *, least: int = 1) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (-1,)
    if min(sizes) < least:
        raise UsageError(f"--{name} must be {form}: numbers of at least {least}. Got {text!r}.")
    return sizes


def parse_strategy(text: str) -> str | tuple[str, ...]:
    """One word, or one for each axis."""
    words = [part.strip() for part in text.split(",")]
    return words[0] if len(words) == 1 else tuple(words)


def with_flags(message: str, arguments: Iterable[str]) -> str:
    """A message of the library, whose arguments are named as the command names them."""
    named = {name: "--" + name.replace("_", "-") for name in arguments} | {"is_causal": "--causal"}
    # A name of one word is meant where it must be something, as in "ring must be at most 8": elsewhere it is English.
    pattern = "|".join(name if "_" in name else rf"{name}(?= must )" for name in named)
    return re.sub(rf"(?<![\w'\"./-])(?:{pattern})(?![\w'\"/])", lambda found: named[found[0]], message)


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _fail(error: object, code: int) -> int:
    sys.stderr.write(f"error: {error}\n")
    return code
