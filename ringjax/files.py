"""How a file is replaced, whole or not at all; and which files ship with the package."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to. It takes the place of `path` when the block ends, and is removed when the block fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# In a wheel inside the package, in a checkout beside it.
_PACKAGE = Path(__file__).parent
_CONFIGS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def shipped() -> dict[str, Path]:
    """The configurations that ship with ringjax: name -> file."""
    folder = next(folder for folder in _CONFIGS if folder.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}
