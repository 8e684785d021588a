"""Compilers run in child processes: they abort on what they cannot do, and read their settings when they are loaded."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# What lets libtpu compile where there is no TPU, and several processes do so at once.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_STDERR_LOG_LEVEL": "3",
    # Where there is a GPU after all, the program is compiled as on a machine without, and takes none of its memory.
    "CUDA_VISIBLE_DEVICES": "",
}
_NOISE = re.compile(
    r"^(WARNING|ERROR)?:? ?(Logging before|Failed to find host|=== Source|learning/|\s*$)|worker hostname"
)


@contextlib.contextmanager
def started(
    module: str,
    *arguments: str,
    log: IO[str],
    stdout: IO[str] | int,
    libtpu_args: str = "",
    environment: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    """``python -m module arguments``, which does not outlive the context.

    Args:
      module: of this package, or of any other on the path.
      arguments: of its command line.
      log: where its errors go.
      stdout: where its output goes, or ``subprocess.PIPE``.
      libtpu_args: appended to LIBTPU_INIT_ARGS.
      environment: variables besides ENVIRONMENT, which they replace.
    """
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    variables = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "LIBTPU_INIT_ARGS": " ".join(part for part in (os.environ.get("LIBTPU_INIT_ARGS", ""), libtpu_args) if part),
        **(environment or {}),
    }
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": stdout, "stderr": log, "text": True}
    # A session of its own, so that all of it can be ended and Ctrl-C reaches it through us alone.
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, env=variables, start_new_session=True, **options) as child:
        try:
            yield child
        finally:
            kill(child)
            child.wait()  # Popen's own exit waits a quarter of a second at most after Ctrl-C


def kill(child: subprocess.Popen[str]) -> None:
    """Ends a child with all that it started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def how_it_ended(status: int, said: str) -> str:
    """A child without a result, in one line: its status, and the end of its log."""
    return f"the compiler ended with {_status(status)} and no result. {_last_lines(said)}"


def _status(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def _last_lines(said: str, count: int = 3) -> str:
    """The last lines of a log that say something."""
    lines = [line.strip() for line in said.splitlines() if not _NOISE.search(line)]
    # An abort is followed by its stack: what matters stands before that.
    stack = next((i for i, line in enumerate(lines) if line.startswith(("*** ", "@ ", "Fatal Python"))), len(lines))
    kept = lines[max(0, stack - count) : stack] or lines[-count:]
    return "Its last words: " + " / ".join(line[:300] for line in kept) if kept else "It said nothing."
