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
from . import data, devices, export, metrics, packed, pretrained, processes, program, tensorboard
from .checkpoints import CheckpointError, Checkpoints
from .config import Config
from .loading import ConfigError, to_table
from .output import OutputError, TrainingError, reason_of
from .plot import plot_loss
from .progress import Reporter
from .resume import Resume, Start, find_start
from .signals import StopSignal
from .steps import Compiled, Record, Steps

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
    writer = tensorboard.find_writer(config.logging.tensorboard)
    subject = pretrained.resolve(config)  # what takes a moment to refuse comes before what takes minutes
    export.check(config, subject.decoder, subject.tokenizer)
    corpus = data.read(config.data, subject.tokenizer)
    pretrained.check_tokens(corpus, config, subject.decoder)
    processes.check_same(corpus.fingerprint, "the text that the processes read")
    about = {"config": to_table(config), "text": corpus.fingerprint}
    held_out = None
    if config.data.eval_fraction:
        corpus, held_out = data.hold_out(corpus, config.data.eval_fraction, config.data.seed)
    learned = _batches(corpus, config, subject)
    made = program.build(config, mesh, subject.decoder, shared_length=learned.shared_length)
    processes.prepare_output(output)
    with Checkpoints(output / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        start = find_start(checkpoints, made.state, about, resume)
        steps = Steps(
            functions=made,
            batches=learned,
            held_out=None if held_out is None else _batches(held_out, config, subject),
            total=config.optimizer.steps,
            every=config.checkpoint.every_steps,
            checkpoints=checkpoints,
            about=about,
        )
        run = _Run(
            config=config,
            subject=subject,
            steps=steps,
            checkpoints=checkpoints,
            output=output,
            writer=writer,
            command=command,
            tell=functools.partial(console.print, markup=False, highlight=False, soft_wrap=True),
        )
        for line in run.describe() + subject.notes + start.notes:
            run.tell(line)
        try:
            return run.go(start, console, leader)
        except OSError as error:
            raise TrainingError(
                f"output: must stay writable during the run. Got {reason_of(error)}. {checkpoints.kept()}"
            ) from error


def _batches(corpus: data.Corpus, config: Config, subject: pretrained.Subject) -> data.Batches:
    shards, decoder = config.mesh.sequence, subject.decoder
    if config.data.packing == "balanced":
        return packed.Packed(corpus, config.data, num_shards=shards, window=decoder.local_window_size)
    return data.Batches(corpus, config.data, layout=decoder.layout, num_shards=shards)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """The parts of a run that do not change."""

    config: Config
    subject: pretrained.Subject
    steps: Steps
    checkpoints: Checkpoints
    output: Path
    writer: Any  # TensorBoard's, or None
    command: str
    tell: Callable[[str], None]  # prints a line as it is

    def describe(self) -> list[str]:
        mesh, functions, held_out = self.config.mesh, self.steps.functions, self.steps.held_out
        corpus = self.steps.batches.corpus
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(functions.state.params))
        where = f"{jax.device_count()} {jax.devices()[0].device_kind} devices"
        if jax.process_count() > 1:
            where += f" in {jax.process_count()} processes"
        return [
            f"{count:,} parameters on {where}: data {mesh.data} x sequence {mesh.sequence} x tensor {mesh.tensor}",
            f"{_amount(corpus)}; a step takes {self.config.data.batch_size} x "
            f"{self.config.data.sequence_length:,} of them",
            *self.steps.batches.notes,
            *([f"held out: {_amount(held_out.corpus)}"] if held_out is not None else []),
            *([f"data: these files are empty: {corpus.empty}"] if corpus.empty else []),
        ]

    def go(self, start: Start, console: Console, leader: bool) -> Outcome:
        """From the restored or fresh state to the end."""
        total, done, stopped, state = self.config.optimizer.steps, start.done, None, start.state
        if done >= total:
            self.tell(f"all {total} steps were done before")
        else:
            # What can fail for a wrong configuration comes before the first file is touched.
            if state is None and self.config.model.init_from is not None:
                self.tell(f"reading {self.config.model.init_from}")
                state = pretrained.load_state(self.config, self.steps.functions)
            compiled = self._compile()
            if state is None:
                state = self.steps.functions.jit_init()()
            file = metrics.MetricsFile(self.output / "metrics.jsonl", done=done) if leader else None
            if file is not None:
                if file.note:
                    self.tell(file.note)
                with replacing(self.output / "config.json") as path:
                    path.write_text(json.dumps(self.steps.about["config"], indent=2) + "\n", encoding="utf-8")
            reporter = Reporter(console, total=total, done=done, every=self.config.logging.every_steps)
            board = None
            if leader and self.writer is not None:
                board = tensorboard.TensorBoard(self.writer, self.output / "tensorboard", done=done)

            def report(record: Record) -> None:
                for each in (file, board):
                    if each is not None:
                        each.write(record)
                reporter.step(record)

            with file or contextlib.nullcontext(), board or contextlib.nullcontext(), StopSignal() as stop, reporter:
                state, done, stopped = self.steps.run(
                    compiled, state, done, report=report, stopping=lambda: processes.any_signal(stop.received)
                )
        self.checkpoints.wait()
        exported = None
        if stopped is None and self.config.export.path is not None:
            exported = self._export(state, done)
        if leader:
            self._finish(done, stopped, exported)
        return Outcome(done, self.output, stopped)

    def _compile(self) -> Compiled:
        self.tell("compiling")
        began = time.perf_counter()
        compiled = self.steps.compile()
        self.tell(f"compiled in {time.perf_counter() - began:.1f} s")
        return compiled

    def _export(self, state: program.TrainState, done: int) -> Path:
        decoder = self.steps.functions.decode(state.params)
        try:
            return export.write(self.config, decoder, self.subject.tokenizer, step=done)
        except (OutputError, TrainingError) as error:
            raise TrainingError(f"{error} {self.checkpoints.kept()}") from error

    def _finish(self, done: int, stopped: signal.Signals | None, exported: Path | None) -> None:
        """Draws the loss and says how it went, where everything is, and what to type next."""
        output, total = self.output, self.config.optimizer.steps
        records = metrics.read(output / "metrics.jsonl")
        if records:
            title = f"{output.name}: loss on real text, context {self.config.data.sequence_length:,} tokens"
            plot_loss(records, output / "loss.png", title=title, unit=self.steps.batches.corpus.unit)
            last = [record["loss"] for record in records[-max(1, len(records) // 10) :]]  # one step is noisy
            self.tell(
                f"loss {records[0]['loss']:.4f} at step {records[0]['step']} -> {sum(last) / len(last):.4f} over the "
                f"last {len(last)} of {done} steps"
            )
        measured = [record for record in records if "eval_loss" in record]
        if measured:
            ends = measured[:1] + measured[1:][-1:]
            losses = " -> ".join(f"{record['eval_loss']:.4f} after step {record['step']}" for record in ends)
            self.tell(f"held-out loss {losses}, perplexity {ends[-1]['eval_perplexity']:.2f}")
        steps = ", ".join(str(step) for step in sorted(self.checkpoints.steps()))
        self.tell(f"picture      {output / 'loss.png'}")
        self.tell(f"every step   {output / 'metrics.jsonl'}")
        self.tell(f"settings     {output / 'config.json'}")
        self.tell(f"checkpoints  {self.checkpoints.directory}: after step {steps}")
        if exported is not None:
            self.tell(f"export       {exported}, for transformers, ringjax generate and ringjax eval")
        if stopped is not None:
            self.tell(
                f"stopped by {stopped.name} after step {done} of {total}, which is saved. The same command goes on:"
            )
            self.tell(f"  {self.command}")
        else:
            self.tell("to train on, type:")
            self.tell(f"  {self.command} --set optimizer.steps={2 * done}")


def _amount(corpus: data.Corpus) -> str:
    return f"{len(corpus.text):,} {corpus.unit}s of text in {len(corpus.lengths):,} documents"
