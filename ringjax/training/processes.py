"""What the processes of a run decide together. With a single process nothing is sent."""

from __future__ import annotations

import signal
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from .output import OutputError, TrainingError, prepare


def check_same(fingerprint: str, what: str) -> None:
    """Raises TrainingError unless all processes hold the same hexadecimal string."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    if (everyone != everyone[0]).any():
        raise TrainingError(f"{what} must be the same. Got a different fingerprint on process {jax.process_index()}.")


def largest(number: int) -> int:
    """The largest of the numbers that the processes give."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.array(number, np.int32))))


def any_signal(received: signal.Signals | None) -> signal.Signals | None:
    """The signal that some process has received: all must leave the loop at the same step."""
    number = largest(received or 0)
    return signal.Signals(number) if number else None


def raise_together(error: Exception | None, otherwise: Exception) -> None:
    """Raises `error` where there is one, and `otherwise` on the other processes: none may wait for one that left."""
    failed = largest(error is not None)
    if error is not None:
        raise error
    if failed:
        raise otherwise


def prepare_output(directory: Path, *, name: str = "output") -> None:
    """Process 0 tries where the run is to write; all raise OutputError where it cannot."""
    failure = None
    try:
        if jax.process_index() == 0:
            prepare(directory, name=name)
    except OutputError as error:
        failure = error
    raise_together(failure, OutputError(f"{name}: process 0 cannot write to {directory}."))
