"""How a command ends on an error: `error: ...` on stderr, without a traceback."""

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

import typer

from ..usage import UsageError


def fail(error: Exception, code: int = 2) -> NoReturn:
    """Prints each line of an error and ends the command, without a traceback: the user's input is wrong, not ours."""
    for line in str(error).splitlines():
        typer.echo(f"error: {line}", err=True)
    sys.exit(code)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Where a command may refuse its flags: exit status 2."""
    try:
        yield
    except UsageError as error:
        fail(error)
