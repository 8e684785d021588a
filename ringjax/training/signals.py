"""SIGINT and SIGTERM -> a flag that the training loop looks at between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any


class StopSignal:
    """While entered, the first SIGINT or SIGTERM sets `received`; a second one acts as it would without us."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame  # Unused.
        self.received = signal.Signals(number)
        self._restore()
        # os.write: a handler may interrupt a print, which must not be entered twice.
        os.write(2, f"\n{self.received.name}: saving after this step; once more to quit at once\n".encode())

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            # None: set from C, as jax.distributed does for SIGTERM; Python cannot put such a handler back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
