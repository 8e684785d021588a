"""metrics.jsonl: one JSON object per step, in order, whatever killed the run; and the peak of memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from ..files import replacing
from .output import set_aside


class MetricsFile:
    """Appends to metrics.jsonl; use it in a `with` statement.

    Args:
      path: the file.
      done: steps that the restored checkpoint has done. Lines of later steps, which the run is about to do again,
        are dropped, and so is a last line that the kill tore.

    Attributes:
      note: what there is to tell about a history that is damaged or of another run; the file as it was is kept aside.
    """

    def __init__(self, path: Path, *, done: int) -> None:
        records, broken = _parse(path)
        kept = [record for record in records if record["step"] <= done]
        last = kept[-1]["step"] if kept else 0
        self.note: str | None = None
        with replacing(path) as replacement:
            replacement.write_text("".join(_line(record) for record in kept), encoding="utf-8")
            if last < done or broken or (records and not done):
                self.note = _note(path, kept, last, done)
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
    """The records of a file, which may be absent; lines that are none are left out."""
    return _parse(path)[0]


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records, and the number of other lines before the last one, which a kill may have torn."""
    records: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    broken: list[int] = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None or (records and record["step"] <= records[-1]["step"]):
            broken.append(number)
        else:
            records.append(record)
    return records, sum(number < len(lines) for number in broken)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # covers broken UTF-8 as well
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole else None


def _note(path: Path, kept: list[dict[str, Any]], last: int, done: int) -> str:
    """Sets the file aside, where there is one, and says so."""
    before = f" The file as it was is now {set_aside(path, path.parent)}." if path.exists() else ""
    if not done:
        return f"{path} was of a run without a checkpoint; it starts anew.{before}"
    lacks = f"; it lacks the end, steps {last + 1} to {done}" if last < done else ""
    return f"WARNING: {path} is damaged{lacks}. {len(kept)} records of {done} steps were kept.{before}"


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
