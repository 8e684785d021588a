"""Checkpoints of a run: written in the background, committed by a rename, restored onto any mesh.

A checkpoint that was being written when the process died is not committed; it is ignored and cleaned up. One that is
committed and cannot be read is damaged: it is never deleted, and never continued from.
"""

from __future__ import annotations

import functools
import gc
import logging
import shutil
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from .output import TrainingError, reason_of, set_aside
from .processes import raise_together

State = TypeVar("State")


class CheckpointError(ValueError):
    """A checkpoint is there but cannot be continued from."""


class DamagedError(CheckpointError):
    """A part of a checkpoint is absent or cannot be read."""


class SaveError(TrainingError):
    """A checkpoint could not be written."""


@functools.cache
def _drop_late_reads() -> None:
    """Keeps reads that end too late from printing a traceback each.

    Orbax leaves its event loop at the first error of a read. The other reads go on in TensorStore's threads, find the
    loop closed when they end, and Python reports that for each of them, with nobody to catch it.
    """
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            report(unraisable)

    sys.unraisablehook = hook


class Checkpoints:
    """The directory of a run's checkpoints; use it in a `with` statement, which waits for the last write.

    Args:
      directory: is created where it does not exist. All processes must see the same one.
      keep: how many of the newest checkpoints stay.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory = directory.absolute()
        # Orbax logs with a traceback each error that it raises, and asyncio each that nobody waited for; we raise the
        # first again in a sentence.
        self._logs = {log: log.level for log in map(logging.getLogger, ("absl", "asyncio"))}
        for log in self._logs:
            log.setLevel(logging.CRITICAL)
        _drop_late_reads()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        # The manager's own `restore` ends in a barrier: a process that cannot read would leave the others waiting.
        me = jax.process_index()
        self._reader = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(state=ocp.StandardCheckpointHandler(), about=ocp.JsonCheckpointHandler()),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"reader{me}"
            ),
        )
        self._writing = 0  # the step of the last checkpoint that was begun
        self._failed = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._manager.close()
        except Exception as late:  # the write that failed is reported once
            if not self._failed:
                raise self._failure(late) from late
        finally:
            self._reader.close()
            for log, level in self._logs.items():
                log.setLevel(level)

    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Starts to write. The arrays of `state` may be donated as soon as this returns.

        Args:
          step: number of steps done.
          state: a pytree of arrays.
          about: JSON; what `about` returns later.

        Raises:
          SaveError: this checkpoint or the one before could not be written.
        """
        self.wait()
        self._writing = step
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        try:
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            raise self._failure(error) from error

    def wait(self) -> None:
        """Returns when the last checkpoint is committed. Raises: SaveError."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax raises what its threads met: OSError, ValueError and bare Exception
            raise self._failure(error) from error

    def about(self, step: int) -> dict[str, Any]:
        """What was said about the checkpoint when it was saved. Raises: DamagedError."""
        return self._read(step, "about", lambda: self._restore(step, about=ocp.args.JsonRestore()))

    def restore(self, step: int, target: State) -> State:
        """Reads a checkpoint.

        Args:
          step: one of `steps()`.
          target: the pytree with a sharded `jax.ShapeDtypeStruct` for each array.

        Raises:
          CheckpointError: it holds arrays of other names or shapes.
          DamagedError: it cannot be read.
        """
        held = self._read(step, "state/_METADATA", lambda: self._held_shapes(step))
        wanted = _shapes(target)
        differing = [path for path in sorted(held.keys() | wanted.keys()) if held.get(path) != wanted.get(path)]
        if differing:
            path = differing[0]
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)}: must hold the arrays of this configuration. Got "
                f"{len(differing)} that differ, as {'.'.join(path)} of shape {held.get(path, 'absent')} (needed: "
                f"{wanted.get(path, 'absent')}). Give another output, or the configuration that it was saved with."
            )
        return self._read(step, "state", lambda: self._restore(step, state=ocp.args.StandardRestore(target)))

    def set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of the way and returns where it is now. All processes must call it."""
        moved = Path()
        if jax.process_index() == 0:
            moved = set_aside(self.directory / str(step), self.directory.parent)
        raise_together(None, CheckpointError(""))  # the others wait until it is moved
        self._manager.reload()
        return moved

    def _restore(self, step: int, **item: Any) -> Any:
        (name,) = item
        return self._reader.restore(self.directory / str(step), args=ocp.args.Composite(**item))[name]

    def _held_shapes(self, step: int) -> dict[tuple[str, ...], tuple[int, ...]]:
        held = self._reader.metadata(self.directory / str(step)).item_metadata
        tree = None if held is None else held["state"]
        if tree is None:
            raise FileNotFoundError("absent")
        return _shapes(tree.tree)

    def _read(self, step: int, part: str, read: Any) -> Any:
        """Calls `read` on all processes. Where one of them fails, all raise DamagedError."""
        failure, value = None, None
        try:
            value = read()
        except Exception as error:  # TensorStore's errors arrive as bare Exception
            failure = DamagedError(f"its {part} cannot be read: {reason_of(error)}")
            failure.__cause__ = error.with_traceback(None)  # its frames hold the tasks that were left
            gc.collect()  # those tasks complain while asyncio's log is off
        raise_together(failure, DamagedError(f"its {part} cannot be read by another process"))
        return value

    def _failure(self, error: Exception) -> SaveError:
        """What to say after a write that failed. Its remains are removed: they take room on a disk that may be full."""
        self._failed = True
        if jax.process_index() == 0:
            for remains in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(remains, ignore_errors=True)
        return SaveError(
            f"checkpoint of step {self._writing}: could not be written to {self.directory}: {reason_of(error)}. "
            f"{self.kept()}"
        )

    def kept(self) -> str:
        """What the directory holds, and how to go on from it once a write has failed."""
        committed = [int(path.name) for path in self.directory.iterdir() if path.name.isdigit() and path.is_dir()]
        if not committed:
            return "No checkpoint was written before. Mend that, then the same command starts again."
        return (
            f"The checkpoint of step {max(committed)} is intact. Mend that, then the same command goes on from there."
        )


def _shapes(tree: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {tuple(map(str, path)): tuple(leaf.shape) for path, leaf in ocp.tree.to_flat_dict(tree).items()}
