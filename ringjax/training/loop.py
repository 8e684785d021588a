"""`ringjax train`: start JAX, restore, step, log, save, stop. Every decision here is the same on all processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from . import data, devices, metrics, program
from .checkpoints import CheckpointError, Checkpoints
from .config import Config
from .loading import ConfigError, to_table
from .plot import plot_loss
from .progress import Reporter
from .resume import Resume, check_resume
from .signals import StopSignal


class TrainingError(RuntimeError):
    """The run cannot go on; what it had reached is kept."""


# What `train` raises before the first step, about its input.
REFUSALS = (ConfigError, data.DataError, CheckpointError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int  # steps done, those before a resume included
    output: Path
    stopped_by: signal.Signals | None  # None: all steps are done


def train(config: Config, *, resume: Resume = "auto", console: Console | None = None) -> Outcome:
    """Runs a configuration to its last step, or to a signal.

    Args:
      config: the checked configuration.
      resume: "auto" continues from the newest checkpoint in `config.output` if its configuration agrees; "force"
        continues even if it does not; "never" refuses to touch an output that has a checkpoint.
      console: where progress goes; process 0 alone speaks.

    Raises:
      ConfigError, DataError, CheckpointError: before the first step.
      TrainingError: the loss is not finite, or the processes do not see the same text.
    """
    mesh = devices.start(config)
    leader = jax.process_index() == 0
    console = (console or Console()) if leader else Console(quiet=True)
    output = Path(config.output)
    corpus = data.read(config.data)
    _agree(corpus.fingerprint, "the text that the processes read")
    about = {"config": to_table(config), "text": corpus.fingerprint}
    made = program.build(config, mesh)
    with Checkpoints(output / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        done = checkpoints.latest() or 0
        notes = check_resume(checkpoints, done, about, resume) if done else []
        run = _Run(config, made, corpus, checkpoints, output, about)
        for line in run.describe() + notes:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return run.go(done, console, leader)


@dataclasses.dataclass(frozen=True)
class _Run:
    """The parts of a run that do not change."""

    config: Config
    program: program.Program
    corpus: data.Corpus
    checkpoints: Checkpoints
    output: Path
    about: dict[str, Any]

    def describe(self) -> list[str]:
        mesh = self.config.mesh
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.program.state.params))
        where = f"{jax.device_count()} {jax.devices()[0].device_kind} devices"
        if jax.process_count() > 1:
            where += f" in {jax.process_count()} processes"
        return [
            f"{count:,} parameters on {where}: data {mesh.data} x sequence {mesh.sequence} x tensor {mesh.tensor}",
            f"{len(self.corpus.text):,} bytes of text in {len(self.corpus.lengths):,} documents; a step takes "
            f"{self.config.data.batch_size} x {self.config.data.sequence_length:,} of them",
            *(
                f"compiled with {name}={value}, so that permutes hide behind kernels; XLA_FLAGS may name another value"
                for name, value in self.program.compiler_options.items()
            ),
        ]

    def go(self, done: int, console: Console, leader: bool) -> Outcome:
        """From the restored or fresh state to the end."""
        total, stopped = self.config.optimizer.steps, None
        if done >= total:
            console.print(f"all {total} steps were done before; a larger optimizer.steps goes on", markup=False)
        else:
            # What can fail for a wrong configuration comes before the first file is touched.
            step = self._compile(console)
            state = self._first_state(done)
            file = metrics.MetricsFile(self.output / "metrics.jsonl", done=done) if leader else None
            if leader:
                _write_atomically(self.output / "config.json", json.dumps(self.about["config"], indent=2) + "\n")
            reporter = Reporter(console, total=total, done=done, every=self.config.logging.every_steps)
            with file or contextlib.nullcontext(), StopSignal() as stop, reporter:
                done, stopped = self._steps(step, state, done, stop, reporter, file)
        self.checkpoints.wait()
        self._finish(done, stopped, console, leader)
        return Outcome(done, self.output, stopped)

    def _compile(self, console: Console) -> Any:
        console.print("compiling", markup=False)
        began = time.perf_counter()
        step = self.program.compile_step()
        console.print(f"compiled in {time.perf_counter() - began:.1f} s", markup=False, highlight=False)
        return step

    def _first_state(self, done: int) -> program.TrainState:
        if not done:
            return self.program.jit_init()()
        return self.checkpoints.restore(done, self.program.state)

    def _steps(
        self,
        step: Any,
        state: program.TrainState,
        done: int,
        stop: StopSignal,
        reporter: Reporter,
        file: metrics.MetricsFile | None,
    ) -> tuple[int, signal.Signals | None]:
        """Returns the number of steps done, whose checkpoint is on its way to disk, and the signal that ended it."""
        total, every = self.config.optimizer.steps, self.config.checkpoint.every_steps
        batches = data.Batches(self.corpus, self.config.data, layout=self._layout, num_shards=self.config.mesh.sequence)
        sharding = self.program.batch_sharding
        batch = batches.on_devices(done, sharding)
        saved, stopped = done, None
        while done < total and stopped is None:
            began = time.perf_counter()
            state, measured = step(state, batch)
            if done + 1 < total:
                batch = batches.on_devices(done + 1, sharding)  # while the devices compute
            record = self._record(done + 1, jax.device_get(measured), began)
            self._check_finite(record, saved)
            done += 1
            if file is not None:
                file.write(record)
            reporter.step(record)
            if done % every == 0:
                self.checkpoints.save(done, state, self.about)
                saved = done
            if done < total:
                stopped = _on_any_process(stop.received)
        if done != saved:
            self.checkpoints.save(done, state, self.about)
        return done, stopped

    @property
    def _layout(self) -> Any:
        return program.decoder_config(self.config).layout

    def _record(self, step: int, measured: program.StepMetrics, began: float) -> dict[str, Any]:
        seconds = time.perf_counter() - began
        tokens = self.config.data.batch_size * self.config.data.sequence_length
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

    def _check_finite(self, record: dict[str, Any], saved: int) -> None:
        if math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]):
            return
        kept = f"The checkpoint of step {saved} is kept" if saved else "No checkpoint was written yet"
        raise TrainingError(
            f"step {record['step']}: loss and gradient norm must be finite. Got {record['loss']} and "
            f"{record['grad_norm']}. {kept} in {self.checkpoints.directory}. Try a lower optimizer.learning_rate, "
            "a longer optimizer.warmup_steps or another data.seed (--resume force continues with changed keys)."
        )

    def _finish(self, done: int, stopped: signal.Signals | None, console: Console, leader: bool) -> None:
        records = metrics.read(self.output / "metrics.jsonl") if leader else []
        if records:
            title = f"{self.output.name}: loss on real text, context {self.config.data.sequence_length:,} tokens"
            plot_loss(records, self.output / "loss.png", title=title)
            last = [record["loss"] for record in records[-max(1, len(records) // 10) :]]  # one step is noisy
            console.print(
                f"loss {records[0]['loss']:.4f} at step {records[0]['step']} -> {sum(last) / len(last):.4f} over the "
                f"last {len(last)} of {done} steps; {self.output}/: metrics.jsonl, loss.png, checkpoints/",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        if stopped is not None:
            console.print(
                f"stopped by {stopped.name} after step {done} of {self.config.optimizer.steps}, which is saved. "
                "Give the same command again to go on.",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def _agree(fingerprint: str, what: str) -> None:
    """Raises TrainingError unless all processes hold the same hexadecimal string."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    if (everyone != everyone[0]).any():
        raise TrainingError(f"{what} must be the same. Got a different fingerprint on process {jax.process_index()}.")


def _on_any_process(received: signal.Signals | None) -> signal.Signals | None:
    """The signal that some process has received: all must leave the loop at the same step."""
    if jax.process_count() == 1:
        return received
    number = int(np.max(multihost_utils.process_allgather(np.array(received or 0, np.int32))))
    return signal.Signals(number) if number else None


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
