"""Damaged checkpoints, histories, outputs and texts: one plain sentence, exit code 2, nothing lost or compiled."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from in_process import train as train

from ringjax.training import data, loop, metrics, program
from ringjax.training.checkpoints import CheckpointError
from ringjax.training.loading import load
from ringjax.training.output import ASIDE, OutputError, TrainingError

STEPS = ["optimizer.steps=4", "checkpoint.every_steps=2"]
MORE = ["optimizer.steps=5", "checkpoint.every_steps=2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("finished")
    status, said = tiny_run.run("train", tiny_run.write_config(folder), *(x for key in STEPS for x in ("--set", key)))
    assert status == 0, said
    return folder / "out"


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """The configuration of a copy of that run."""
    shutil.copytree(finished, tmp_path / "out")
    return tiny_run.write_config(tmp_path)


def truncate_data(state: Path) -> None:
    """Halves every file of values. Which of them a read needs depends on the order of the writes."""
    files = [path for path in state.rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    for path in files:
        truncate(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Any] = {
    "files of state truncated": lambda step: truncate_data(step / "state"),
    "about removed": lambda step: shutil.rmtree(step / "about"),
    "about/metadata truncated": lambda step: truncate(step / "about" / "metadata"),
    "_METADATA truncated": lambda step: truncate(step / "state" / "_METADATA"),
    "_METADATA absent": lambda step: (step / "state" / "_METADATA").unlink(),
    "state removed": lambda step: shutil.rmtree(step / "state"),
}


def no_compiler(monkeypatch):
    def compiled(self):
        raise AssertionError("compiled before the damage was found")

    monkeypatch.setattr(program.Functions, "compile_step", compiled)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_intact_one_too(copy, train, monkeypatch, damage: str):
    checkpoints = copy.parent / "out" / "checkpoints"
    DAMAGES[damage](checkpoints / "4")
    no_compiler(monkeypatch)
    with pytest.raises(CheckpointError) as refused:
        train(load(copy, MORE))
    (sentence,) = str(refused.value).splitlines()
    assert f"{checkpoints / '4'} is damaged" in sentence
    assert "The checkpoint of step 2 is intact" in sentence and "--resume intact" in sentence
    assert (checkpoints / "4").is_dir()


def test_the_newest_intact_checkpoint_is_used_when_asked_for_and_the_damaged_one_is_kept(copy, train):
    output = copy.parent / "out"
    truncate_data(output / "checkpoints" / "4" / "state")
    outcome, said = train(load(copy, MORE), resume="intact")
    assert outcome.step == 5
    assert "WARNING: the checkpoint of step 4 is damaged" in said and "resuming after step 2" in said
    assert (output / ASIDE / "4").is_dir()
    assert [record["step"] for record in tiny_run.metrics(output)] == [1, 2, 3, 4, 5]


def test_without_an_intact_checkpoint_nothing_is_promised(copy, train):
    for step in ("2", "4"):
        shutil.rmtree(copy.parent / "out" / "checkpoints" / step / "about")
    for resume in ("auto", "intact"):
        with pytest.raises(CheckpointError, match="No checkpoint is intact"):
            train(load(copy, MORE), resume=resume)


def test_the_command_ends_with_one_sentence(copy):
    truncate_data(copy.parent / "out" / "checkpoints" / "4" / "state")
    status, said = tiny_run.run("train", copy, *(x for key in MORE for x in ("--set", key)))
    assert status == 2
    assert "Traceback" not in said and "Exception ignored" not in said and said.count("error: ") == 1, said


def test_what_a_killed_save_leaves_behind_is_no_checkpoint(copy, train):
    checkpoints = copy.parent / "out" / "checkpoints"
    shutil.copytree(checkpoints / "4", checkpoints / "6.orbax-checkpoint-tmp-1")
    truncate_data(checkpoints / "6.orbax-checkpoint-tmp-1" / "state")
    outcome, said = train(load(copy, MORE))
    assert outcome.step == 5 and "resuming after step 4" in said


def test_a_damaged_history_is_kept_aside_and_said(copy, train):
    output = copy.parent / "out"
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text(lines[0] + lines[1][:7])
    outcome, said = train(load(copy, MORE))
    assert outcome.step == 5
    assert "metrics.jsonl" in said
    kept = list((output / ASIDE).glob("metrics.jsonl*"))
    assert len(kept) == 1 and kept[0].read_text() == lines[0] + lines[1][:7]
    assert [record["step"] for record in metrics.read(output / "metrics.jsonl")] == [1, 5]


def test_an_output_that_is_a_file(tmp_path, train):
    path = tiny_run.write_config(tmp_path)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="output: must be a directory.*which is a file"):
        train(load(path, STEPS))
    assert (tmp_path / "out").read_text() == "mine"


def test_a_disk_that_is_full_from_the_start(tmp_path, train, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(OutputError, match="with room. Got .*No space left on device"):
        train(load(tiny_run.write_config(tmp_path), STEPS))


def test_a_disk_that_fills_up_during_the_run(copy, train, monkeypatch):
    output = copy.parent / "out"

    def full(self, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics.MetricsFile, "write", full)
    with pytest.raises(TrainingError, match="No space left on device.*The checkpoint of step 4 is intact") as ended:
        train(load(copy, MORE))
    assert len(str(ended.value).splitlines()) == 1
    monkeypatch.undo()
    assert sorted(path.name for path in (output / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "4"]


def test_a_checkpoint_that_cannot_be_written(copy, train, monkeypatch):
    checkpoints = copy.parent / "out" / "checkpoints"
    rename = os.rename

    def full(source, target, **options):
        if Path(target).name == "5":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(source, target, **options)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(TrainingError, match="checkpoint of step 5: could not be written.*step 4 is intact"):
        train(load(copy, MORE))
    assert not [path for path in checkpoints.iterdir() if "orbax-checkpoint-tmp" in path.name]
    monkeypatch.setattr(os, "rename", rename)
    outcome, said = train(load(copy, MORE))
    assert outcome.step == 5 and "resuming after step 4" in said


@pytest.mark.parametrize("text", ["", None], ids=["empty", "missing"])
def test_a_text_that_is_not_there_is_named(tmp_path, train, text: str | None):
    file = tmp_path / "mine.txt"
    if text is not None:
        file.write_text(text)
    config = load(tiny_run.write_config(tmp_path), [f'data.paths=["{file}"]'])
    with pytest.raises(data.DataError, match="mine.txt"):
        train(config)


def test_refusals_are_what_the_command_line_expects():
    assert {OutputError, CheckpointError, data.DataError} <= set(loop.REFUSALS)
