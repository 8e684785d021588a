"""Records of metrics.jsonl for TensorBoard too, by whichever writer is installed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Any

from .loading import ConfigError

_WRITERS = ("tensorboardX", "torch.utils.tensorboard")


def find_writer(wanted: bool | None) -> Any:
    """The class SummaryWriter, or None.

    Args:
      wanted: `logging.tensorboard`; None: where there is a writer.

    Raises:
      ConfigError: it is wanted and there is none.
    """
    if wanted is False:
        return None
    reasons = []
    for name in _WRITERS:
        try:
            if importlib.util.find_spec(name.partition(".")[0]) is not None:
                return importlib.import_module(name).SummaryWriter
        except (ImportError, AttributeError) as error:  # torch without tensorboard
            reasons.append(f"{name}: {error}")
    if wanted:
        got = f" Got {'; '.join(reasons)}." if reasons else " Got none."
        raise ConfigError(f"logging.tensorboard: must have a writer: pip install tensorboardX.{got}")
    return None


class TensorBoard:
    """Scalars by step; use it in a `with` statement.

    Args:
      writer: of `find_writer`.
      directory: of the event files.
      done: steps done before; what an earlier process wrote of later ones is dropped.
    """

    def __init__(self, writer: Any, directory: Path, *, done: int) -> None:
        self._writer = writer(str(directory), purge_step=done + 1)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, record: dict[str, Any]) -> None:
        """Every number of a record but its step, under its own name."""
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, record["step"])
