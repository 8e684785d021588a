"""metrics.jsonl: one JSON object a step, in order, each step once, whatever killed the run; and the peak of memory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import jax


class MetricsFile:
    """Appends to metrics.jsonl; use it in a `with` statement.

    Args:
      path: the file.
      done: steps that the restored checkpoint has done. Lines of later steps, which the run is about to do again,
        are dropped, and so is a last line that the kill tore.
    """

    def __init__(self, path: Path, *, done: int) -> None:
        kept = [record for record in read(path) if record["step"] <= done]
        replacement = path.with_suffix(".jsonl.tmp")
        replacement.write_text("".join(_line(record) for record in kept), encoding="utf-8")
        os.replace(replacement, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Hands the line to the operating system, so that it survives the end of this process."""
        self._file.write(_line(record))
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, which may be absent. Stops before a torn line: nothing behind it can be trusted."""
    records: list[dict[str, Any]] = []
    if not path.exists():
        return records
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:  # covers broken UTF-8 as well
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
    return records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def peak_memory() -> tuple[int | None, str]:
    """Peak bytes used since the process started, and of what.

    On an accelerator: the fullest device of this process, as its allocator counts. On a CPU the devices share the
    process's memory: its peak resident set, program and data included. None where the platform does not tell.
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks), "device"
    try:
        import resource
    except ImportError:  # Windows
        return None, "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"
