"""`ringjax train`: start JAX, restore, compile, step, log, save, stop. All processes decide the same here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from ..files import replacing
from . import data, devices, metrics, processes, program
from .checkpoints import CheckpointError, Checkpoints
from .config import Config
from .loading import ConfigError, to_table
from .output import OutputError, TrainingError, prepare, reason_of
from .plot import plot_loss
from .progress import Reporter
from .resume import Resume, Start, find_start
from .signals import StopSignal

# What `train` raises before the first step, about its input.
REFUSALS = (ConfigError, data.DataError, OutputError, CheckpointError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int  # steps done, those before a resume included
    output: Path
    stopped_by: signal.Signals | None  # None: all steps are done


def train(
    config: Config,
    *,
    resume: Resume = "auto",
    console: Console | None = None,
    command: str = "ringjax train CONFIGURATION",
) -> Outcome:
    """Runs a configuration to its last step, or to a signal.

    Args:
      config: the checked configuration.
      resume: "auto" continues from the newest checkpoint in `config.output` if its configuration agrees; "force"
        continues even if it does not; "intact" passes over checkpoints that are damaged, and sets them aside; "never"
        refuses to touch an output that has a checkpoint.
      console: where progress goes; process 0 alone speaks.
      command: what the user typed, for the last lines, which say what to type next.

    Raises:
      ConfigError, DataError, OutputError, CheckpointError: before anything is compiled, but what only the compiler
        refuses.
      TrainingError: the loss is not finite, the processes do not see the same text, or the output cannot be written.
    """
    mesh = devices.start(config)
    leader = jax.process_index() == 0
    console = (console or Console()) if leader else Console(quiet=True)
    output = Path(config.output)
    corpus = data.read(config.data)
    processes.check_same(corpus.fingerprint, "the text that the processes read")
    about = {"config": to_table(config), "text": corpus.fingerprint}
    made = program.build(config, mesh)
    _prepare(output, leader)
    with Checkpoints(output / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        start = find_start(checkpoints, made.state, about, resume)
        run = _Run(
            config=config,
            functions=made,
            corpus=corpus,
            checkpoints=checkpoints,
            output=output,
            about=about,
            command=command,
            tell=functools.partial(console.print, markup=False, highlight=False, soft_wrap=True),
        )
        for line in run.describe() + start.notes:
            run.tell(line)
        try:
            return run.go(start, console, leader)
        except OSError as error:
            raise TrainingError(
                f"output: must stay writable during the run. Got {reason_of(error)}. {checkpoints.kept()}"
            ) from error


@dataclasses.dataclass(frozen=True)
class _Run:
    """The parts of a run that do not change."""

    config: Config
    functions: program.Functions
    corpus: data.Corpus
    checkpoints: Checkpoints
    output: Path
    about: dict[str, Any]
    command: str
    tell: Callable[[str], None]  # prints a line as it is

    def describe(self) -> list[str]:
        mesh = self.config.mesh
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.functions.state.params))
        where = f"{jax.device_count()} {jax.devices()[0].device_kind} devices"
        if jax.process_count() > 1:
            where += f" in {jax.process_count()} processes"
        return [
            f"{count:,} parameters on {where}: data {mesh.data} x sequence {mesh.sequence} x tensor {mesh.tensor}",
            f"{len(self.corpus.text):,} bytes of text in {len(self.corpus.lengths):,} documents; a step takes "
            f"{self.config.data.batch_size} x {self.config.data.sequence_length:,} of them",
            *([f"data: these files are empty: {self.corpus.empty}"] if self.corpus.empty else []),
            *(
                f"compiled with {name}={value}, so that permutes hide behind kernels; XLA_FLAGS may name another value"
                for name, value in self.functions.compiler_options.items()
            ),
        ]

    def go(self, start: Start, console: Console, leader: bool) -> Outcome:
        """From the restored or fresh state to the end."""
        total, done, stopped = self.config.optimizer.steps, start.done, None
        if done >= total:
            self.tell(f"all {total} steps were done before")
        else:
            # What can fail for a wrong configuration comes before the first file is touched.
            step = self._compile()
            state = self.functions.jit_init()() if start.state is None else start.state
            file = metrics.MetricsFile(self.output / "metrics.jsonl", done=done) if leader else None
            if file is not None:
                if file.note:
                    self.tell(file.note)
                with replacing(self.output / "config.json") as path:
                    path.write_text(json.dumps(self.about["config"], indent=2) + "\n", encoding="utf-8")
            reporter = Reporter(console, total=total, done=done, every=self.config.logging.every_steps)
            with file or contextlib.nullcontext(), StopSignal() as stop, reporter:
                done, stopped = self._steps(step, state, done, stop, reporter, file)
        self.checkpoints.wait()
        if leader:
            self._finish(done, stopped)
        return Outcome(done, self.output, stopped)

    def _compile(self) -> Any:
        self.tell("compiling")
        began = time.perf_counter()
        step = self.functions.compile_step()
        self.tell(f"compiled in {time.perf_counter() - began:.1f} s")
        return step

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
        sharding = self.functions.batch_sharding
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
                stopped = processes.any_signal(stop.received)
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

    def _finish(self, done: int, stopped: signal.Signals | None) -> None:
        """Draws the loss and says how it went, where everything is, and what to type next."""
        output, total = self.output, self.config.optimizer.steps
        records = metrics.read(output / "metrics.jsonl")
        if records:
            title = f"{output.name}: loss on real text, context {self.config.data.sequence_length:,} tokens"
            plot_loss(records, output / "loss.png", title=title)
            last = [record["loss"] for record in records[-max(1, len(records) // 10) :]]  # one step is noisy
            self.tell(
                f"loss {records[0]['loss']:.4f} at step {records[0]['step']} -> {sum(last) / len(last):.4f} over the "
                f"last {len(last)} of {done} steps"
            )
        steps = ", ".join(str(step) for step in sorted(self.checkpoints.steps()))
        self.tell(f"picture      {output / 'loss.png'}")
        self.tell(f"every step   {output / 'metrics.jsonl'}")
        self.tell(f"settings     {output / 'config.json'}")
        self.tell(f"checkpoints  {self.checkpoints.directory}: after step {steps}")
        if stopped is not None:
            self.tell(
                f"stopped by {stopped.name} after step {done} of {total}, which is saved. The same command goes on:"
            )
            self.tell(f"  {self.command}")
        else:
            self.tell("to train on, type:")
            self.tell(f"  {self.command} --set optimizer.steps={2 * done}")


def _prepare(output: Path, leader: bool) -> None:
    """Process 0 tries the output; all raise OutputError where it cannot be written to."""
    failure = None
    try:
        if leader:
            prepare(output)
    except OutputError as error:
        failure = error
    processes.raise_together(failure, OutputError(f"output: process 0 cannot write to {output}."))
