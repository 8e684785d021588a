"""Checkpoints of a run: written in the background, committed by a rename, restored onto any mesh.

A checkpoint that was being written when the process died is not committed; it is ignored and cleaned up.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

State = TypeVar("State")


class CheckpointError(ValueError):
    """A checkpoint is there but cannot be continued from."""


class Checkpoints:
    """The directory of a run's checkpoints; use it in a `with` statement, which waits for the last write.

    Args:
      directory: is created where it does not exist. All processes must see the same one.
      keep: how many of the newest checkpoints stay.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        self.directory = directory.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest committed checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Starts to write. The arrays of `state` may be donated as soon as this returns.

        Args:
          step: number of steps done.
          state: a pytree of arrays.
          about: JSON; what `about` returns later.
        """
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        self._manager.save(step, args=arguments, force=True)

    def wait(self) -> None:
        """Returns when the last checkpoint is committed."""
        self._manager.wait_until_finished()

    def about(self, step: int) -> dict[str, Any]:
        """What was said about the checkpoint when it was saved."""
        return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]

    def restore(self, step: int, target: State) -> State:
        """Reads a checkpoint.

        Args:
          step: as returned by `latest`.
          target: the pytree with a sharded `jax.ShapeDtypeStruct` for each array.

        Raises:
          CheckpointError: it cannot be read into `target`.
        """
        try:
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            restored = self._manager.restore(step, args=arguments)["state"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)}: must hold the state of this configuration. Got: {error}"
            ) from error
        # A leaf that the checkpoint lacks must not come back as a placeholder.
        missing = [
            jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(restored) if not _is_array(leaf)
        ]
        if missing:
            raise CheckpointError(f"checkpoint {self.directory / str(step)}: lacks {', '.join(missing)}.")
        return restored


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array)
