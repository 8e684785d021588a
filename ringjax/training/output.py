"""The directory of a run: can it be written to, and where damaged files are kept."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

ASIDE = "set_aside"  # below the output: what was damaged or in the way, as it was
_PROBE_BYTES = 2**16  # more than a full disk takes
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class OutputError(ValueError):
    """The output cannot hold a run."""


class TrainingError(RuntimeError):
    """The run cannot go on; what it had reached is kept."""


def prepare(output: Path, *, name: str = "output") -> None:
    """Makes the directory of a run and writes to it once.

    Args:
      output: the directory.
      name: of the key or argument that says where it is.

    Raises:
      OutputError: it is no directory, is read-only, or its disk is full.
    """
    for directory in (output, output / "checkpoints"):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as probe:
                probe.write(bytes(_PROBE_BYTES))
        except OSError as error:
            reason = "which is a file" if directory.is_file() else reason_of(error)
            raise OutputError(
                f"{name}: must be a directory that can be written to, on a disk with room. Got {directory}: {reason}. "
                f"Mend that, or give another {name}."
            ) from error


def set_aside(path: Path, output: Path) -> Path:
    """Moves a file or directory out of the way, under a name that is free, and says where it is now."""
    target, number = output / ASIDE / path.name, 1
    target.parent.mkdir(exist_ok=True)
    while target.exists():
        number += 1
        target = output / ASIDE / f"{path.name}.{number}"
    return path.rename(target)


def reason_of(error: BaseException) -> str:
    """Why something failed, on one line: Orbax and TensorStore append whole specifications."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    for number in _DISK:
        if os.strerror(number) in str(error):
            return os.strerror(number)
    first = str(error).strip().split("\n")[0].split(". See ")[0].rstrip(".")
    if len(first) > 160:
        first = first[:157] + "..."
    return first or type(error).__name__
