"""Resuming: a run that was killed, killed in a checkpoint and stopped gives the bits of one that was not."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import tiny_run
from in_process import train as train

from ringjax.training import loop
from ringjax.training.checkpoints import CheckpointError, Checkpoints
from ringjax.training.loading import from_table, load, to_table
from ringjax.training.metrics import MetricsFile, peak_memory, read
from ringjax.training.resume import Words, check_resume, find_start
from ringjax.training.signals import StopSignal

# Statements that make a run end at a chosen moment, from inside: no test waits for a clock.
KILL_IN_A_LINE = """
import os, signal
from ringjax.training import checkpoints, metrics
save = checkpoints.Checkpoints.save
def save_now(self, *arguments):  # in the background it might not be committed yet when the kill comes
    save(self, *arguments)
    self.wait()
checkpoints.Checkpoints.save = save_now
write = metrics.MetricsFile.write
def torn(self, record):
    if record["step"] < {step}:
        return write(self, record)
    self._file.write('{{"step": {step}, "lo')
    self._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
metrics.MetricsFile.write = torn
"""
# A checkpoint is committed by renaming its finished directory to the number of the step: die just before.
KILL_IN_A_CHECKPOINT = """
import os, signal, sys
def hook(event, arguments):
    if event == "os.rename" and os.path.basename(os.fspath(arguments[1])) == "{step}":
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
"""
STOP = """
import os, signal
from ringjax.training import metrics
write = metrics.MetricsFile.write
def stopped(self, record):
    write(self, record)
    if record["step"] == {step}:
        os.kill(os.getpid(), signal.SIGTERM)
metrics.MetricsFile.write = stopped
"""


IN_PARTS = ["data.batch_size=4", "optimizer.accumulate=2", "optimizer.steps=8"]


@pytest.mark.slow
def test_interrupted_run_has_the_bits_of_an_uninterrupted_one(tmp_path, train):
    """What is killed is a process of its own; what ends by itself is not, and has the same bits."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    uninterrupted, _ = train(load(tiny_run.write_config(whole), IN_PARTS))
    assert uninterrupted.step == 8
    config, output = tiny_run.write_config(broken), broken / "out"
    kept = output / "checkpoints"
    command = ("train", config, *(part for key in IN_PARTS for part in ("--set", key)))

    status, said = tiny_run.run(*command, driver=KILL_IN_A_LINE.format(step=5))
    assert status == -signal.SIGKILL, said
    assert (output / "metrics.jsonl").read_text().endswith('"lo')

    status, said = tiny_run.run(*command, driver=KILL_IN_A_CHECKPOINT.format(step=6))
    assert status == -signal.SIGKILL, said
    assert "resuming after step 3" in said
    assert (kept / "3").is_dir() and not (kept / "6").exists()
    assert [path for path in kept.iterdir() if path.name.startswith("6.")], "the checkpoint it was writing"

    status, said = tiny_run.run(*command, driver=STOP.format(step=7))
    assert status == 128 + signal.SIGTERM, said
    assert "resuming after step 3" in said
    assert "stopped by SIGTERM after step 7 of 8, which is saved. The same command goes on" in said
    assert sorted(path.name for path in kept.iterdir()) == ["6", "7"]  # two are kept, the torn one is gone

    outcome, said = train(load(config, IN_PARTS))
    assert outcome.step == 8 and "resuming after step 7" in said
    assert tiny_run.learned(broken / "out") == tiny_run.learned(whole / "out")
    assert [record["step"] for record in tiny_run.metrics(output)] == list(range(1, 9))
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------ in this process


def test_a_finished_run_can_be_lengthened_but_not_altered(tmp_path, train):
    path = tiny_run.write_config(tmp_path)
    outcome, said = train(load(path, ["optimizer.steps=3"]))
    assert (outcome.step, outcome.stopped_by) == (3, None)
    assert "step 3/3  loss" in said

    outcome, said = train(load(path, ["optimizer.steps=3"]))
    assert outcome.step == 3 and "all 3 steps were done before" in said

    with pytest.raises(CheckpointError, match=r"optimizer\.b1 = 0\.5 \(was 0\.9\)"):
        train(load(path, ["optimizer.b1=0.5"]))

    outcome, said = train(load(path, ["optimizer.steps=4", "mesh.sequence=8", "mesh.data=1"]))
    assert outcome.step == 4
    assert "changed since then: mesh.data = 1 (was 2); mesh.sequence = 8 (was 4); optimizer.steps = 4 (was 3)" in said
    assert [record["step"] for record in tiny_run.metrics(outcome.output)] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path, train):
    path = tiny_run.write_config(tmp_path)
    table = ["optimizer.steps=3", "checkpoint.every_steps=1"]
    train(load(path, table))
    with pytest.raises(
        loop.TrainingError, match=r"step [45]: loss and gradient norm must be finite.*checkpoint of ste"
    ):
        train(load(path, ["optimizer.steps=6", "optimizer.learning_rate=1e38", *table[1:]]), resume="force")
    records = tiny_run.metrics(tmp_path / "out")
    assert all(math.isfinite(record["loss"]) for record in records)
    with Checkpoints(tmp_path / "out" / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.steps()[0] == records[-1]["step"] and records[-1]["step"] >= 3


# ------------------------------------------------------------------------------------------ parts


class Kept:
    """Stands for a directory of checkpoints that holds one."""

    directory = Path("out/checkpoints")

    def __init__(self, table, text="0123"):
        self._about = {"config": to_table(from_table(table)), "text": text}

    def steps(self):
        return [7]

    def about(self, step):
        del step
        return self._about


def about(table, text="0123"):
    return {"config": to_table(from_table(table)), "text": text}


def test_resume_with_the_same_configuration():
    (note,) = check_resume(Kept({}), 7, about({}), "auto")  # pyright: ignore[reportArgumentType]
    assert note.startswith("resuming after step 7")


@pytest.mark.parametrize("table", [{"model": {"num_layers": 3}}, {"data": {"seed": 1}}, {"seed": 2}])
def test_what_is_computed_must_not_change(table):
    (section, value), *_ = table.items()
    key = section if not isinstance(value, dict) else f"{section}.{next(iter(value))}"
    with pytest.raises(CheckpointError, match=rf"{key} = \d \(was \d\).*--resume force"):
        check_resume(Kept({}), 7, about(table), "auto")  # pyright: ignore[reportArgumentType]
    notes = check_resume(Kept({}), 7, about(table), "force")  # pyright: ignore[reportArgumentType]
    assert key in notes[1]


def test_other_text_and_never_are_refused():
    with pytest.raises(CheckpointError, match="the text itself"):
        check_resume(Kept({}), 7, about({}, text="4567"), "auto")  # pyright: ignore[reportArgumentType]
    with pytest.raises(CheckpointError, match="must hold no checkpoint"):
        find_start(Kept({}), None, about({}), "never")  # pyright: ignore[reportArgumentType]
    of_fit = Words(output="directory", resume="resume='{}'")
    with pytest.raises(CheckpointError, match="^directory: .* Give another directory, or resume='force' to continue"):
        check_resume(Kept({}), 7, about({}, text="4567"), "auto", of_fit)  # pyright: ignore[reportArgumentType]


def test_where_and_how_fast_may_change():
    table = {"output": "x", "optimizer": {"steps": 50}, "mesh": {"sequence": 2}, "checkpoint": {"keep": 5}}
    notes = check_resume(Kept({}), 7, about(table), "auto")  # pyright: ignore[reportArgumentType]
    assert "mesh.sequence = 2 (was 1)" in notes[1] and "output" not in notes[1]


@pytest.mark.parametrize("tail", ["", '{"step": 4, "loss', '{"step": 4}', "\0\0\0\n", "[]\n", "3\n"])
def test_metrics_lose_what_the_kill_tore_and_what_will_be_done_again(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": step / 7}) + "\n" for step in (1, 2, 3)) + tail)
    with MetricsFile(path, done=2) as file:
        file.write({"step": 3, "loss": 0.5})
    assert read(path) == [{"step": 1, "loss": 1 / 7}, {"step": 2, "loss": 2 / 7}, {"step": 3, "loss": 0.5}]


def test_metrics_of_a_fresh_run_start_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with MetricsFile(path, done=0):
        pass
    assert read(path) == [] and read(tmp_path / "absent") == []


def test_metrics_hold_no_nan(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl", done=0) as file, pytest.raises(ValueError, match="not JSON compliant"):
        file.write({"step": 1, "loss": math.nan})


def test_peak_memory_says_of_what():
    memory, of = peak_memory()
    assert memory is not None and memory > 50 * 2**20
    assert of == "process"  # the tests run on CPU devices


def test_signals_are_noted_once_and_handlers_come_back(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert "saving after this step" in capfd.readouterr().err


def test_a_second_interrupt_is_python_s_own():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), StopSignal():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
