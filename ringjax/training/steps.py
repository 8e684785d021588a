"""The steps of a run, one after another: what `ringjax train` and `fit` share."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable
from typing import Any

import jax

from . import metrics, program
from .checkpoints import Checkpoints
from .data import Batches
from .output import TrainingError

Record = dict[str, Any]
"""Of a step, as in metrics.jsonl."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """Programs on the devices of a mesh."""

    step: Any
    measure: Any | None  # None: nothing is held out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """What does not change from step to step.

    Attributes:
      functions: of the run.
      batches: what is learned from.
      held_out: documents that are measured on, or None.
      total: steps of the whole run.
      every: steps from one checkpoint, and measurement, to the next; the last step has both.
      checkpoints: where they go, or None.
      about: said about each of them.
    """

    functions: program.Functions
    batches: Batches
    held_out: Batches | None
    total: int
    every: int
    checkpoints: Checkpoints | None
    about: dict[str, Any]

    def compile(self) -> Compiled:
        """Raises: ConfigError, as Functions.compile_step."""
        step = self.functions.compile_step()
        return Compiled(step=step, measure=None if self.held_out is None else self.functions.compile_measure())

    def run(
        self,
        compiled: Compiled,
        state: program.TrainState,
        done: int,
        *,
        report: Callable[[Record], None],
        stopping: Callable[[], signal.Signals | None],
    ) -> tuple[program.TrainState, int, signal.Signals | None]:
        """From `done` steps to the last one, or to a signal.

        Args:
          compiled: of `compile`.
          state: after `done` steps; is used up.
          done: steps done before.
          report: takes the record of each step, before that step's checkpoint.
          stopping: is asked after each step; the same on all processes.

        Returns:
          The state, the number of steps done, whose checkpoint is on its way to disk, and the signal that ended it.

        Raises:
          TrainingError: the loss is not finite, or a checkpoint cannot be written.
        """
        sharding = self.functions.batch_sharding
        batch = self.batches.on_devices(done, sharding)
        saved, stopped = done, None
        while done < self.total and stopped is None:
            began = time.perf_counter()
            state, measured = compiled.step(state, batch)
            if done + 1 < self.total:
                batch = self.batches.on_devices(done + 1, sharding)  # while the devices compute
            record = self._record(done + 1, jax.device_get(measured), began)
            self._check_finite(record, saved)
            done += 1
            due = done % self.every == 0 or done == self.total
            if due:  # a stop by a signal does not wait for it
                record |= self._measured(compiled, state)
            report(record)
            if due:
                self._save(done, state)
                saved = done
            if done < self.total:
                stopped = stopping()
        if done != saved:
            self._save(done, state)
        return state, done, stopped

    def _save(self, done: int, state: program.TrainState) -> None:
        if self.checkpoints is not None:
            self.checkpoints.save(done, state, self.about)

    def _measured(self, compiled: Compiled, state: program.TrainState) -> Record:
        """Mean cross entropy of what is held out."""
        if self.held_out is None or compiled.measure is None:
            return {}
        began, total, targets = time.perf_counter(), 0.0, 0
        batches = self.held_out.once(self.functions.rows)
        for number in range(len(batches)):
            batch = batches.on_devices(number, self.functions.batch_sharding)
            loss, count = jax.device_get(compiled.measure(state.params, batch))
            total, targets = total + float(loss), targets + int(count)
        loss = total / max(targets, 1)
        if not math.isfinite(loss):
            raise TrainingError(f"step {int(state.step)}: the held-out loss must be finite. Got {loss}.")
        return {
            "eval_loss": loss,
            "eval_perplexity": math.exp(min(loss, 700.0)),  # beyond it lies no float64
            "eval_targets": targets,
            "eval_seconds": round(time.perf_counter() - began, 4),
        }

    def _record(self, step: int, measured: program.StepMetrics, began: float) -> Record:
        seconds = time.perf_counter() - began
        tokens = math.prod(self.functions.batch["tokens"].shape)
        memory, of = metrics.peak_memory()
        return {
            "step": step,
            "loss": float(measured.loss),
            "grad_norm": float(measured.grad_norm),
            "learning_rate": float(measured.learning_rate),
            "tokens": tokens,
            "targets": int(measured.targets),
            "tokens_per_second": round(tokens / seconds, 1),
            "step_seconds": round(seconds, 4),
            "peak_memory_bytes": memory,
            "peak_memory_of": of,
        }

    def _check_finite(self, record: Record, saved: int) -> None:
        if math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]):
            return
        kept = ""
        if self.checkpoints is not None:
            kept = f"The checkpoint of step {saved} is kept" if saved else "No checkpoint was written yet"
            kept += f" in {self.checkpoints.directory}. "
        raise TrainingError(
            f"step {record['step']}: loss and gradient norm must be finite. Got {record['loss']} and "
            f"{record['grad_norm']}. {kept}Try a lower optimizer.learning_rate, a longer optimizer.warmup_steps or "
            "another data.seed; resumed with 'force', the run takes changed settings."
        )
