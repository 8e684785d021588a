"""Training on from a pretrained model: the command, the same from Python, parts of a batch, masters, exports."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from flax import nnx
from in_process import Train, trainer
from in_process import train as train
from jax.sharding import AxisType
from test_models_gguf import BYTES, SMOL, smol

from ringjax import models
from ringjax.nnx import Decoder, DecoderConfig
from ringjax.training import (
    Batches,
    Optimizer,
    TrainingError,
    data,
    export,
    fit,
    loop,
    pretrained,
    program,
    tensorboard,
)
from ringjax.training import config as configuration
from ringjax.training.checkpoints import CheckpointError, Checkpoints
from ringjax.training.loading import ConfigError, from_table
from ringjax.training.output import OutputError
from ringjax.training.resume import check_resume

TEXT = "the cat that the dog saw ate the other cat and then the dog sat there and thought of the cat " * 9
TINY: dict[str, Any] = dict(
    num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16, remat=False
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = {"model": "gpt2", "merges": ["t h"], "tokens": [*BYTES[:100], "th", "Ġ", "<end>"]}
    keys: dict[str, Any] = {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    return smol(path, **keys, **{"tokenizer.ggml.eos_token_id": 102})


def table(folder: Path, pretrained: Path, /, **sections: dict[str, Any]) -> dict[str, Any]:
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    base: dict[str, dict[str, Any]] = {
        "model": {"init_from": str(pretrained), "loss_chunk": 16},
        "data": {
            "source": "text", "paths": [str(folder / "text.txt")], "sequence_length": 64, "batch_size": 4,
            "eval_fraction": 0.2,
        },
        "mesh": {"data": 2, "sequence": 2},
        "optimizer": {"steps": 4, "warmup_steps": 1, "learning_rate": 3e-3, "accumulate": 2},
        "checkpoint": {"every_steps": 2},
        "logging": {"tensorboard": False},
    }  # fmt: skip
    return {"output": str(folder / "out")} | {key: value | sections.get(key, {}) for key, value in base.items()} | {
        key: value for key, value in sections.items() if key not in base
    }  # fmt: skip


WRITER = """
import json, pathlib
class SummaryWriter:
    def __init__(self, folder, purge_step):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        self.file = open(pathlib.Path(folder) / "events", "a")
        print(json.dumps(["purge", purge_step]), file=self.file)
    def add_scalar(self, name, value, step):
        print(json.dumps([name, value, step]), file=self.file)
    def close(self):
        self.file.close()
"""


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run of four steps: read, learned, measured, exported."""

    config: configuration.Config
    said: str

    @property
    def output(self) -> Path:
        return Path(self.config.output)

    @property
    def records(self) -> list[dict[str, Any]]:
        return tiny_run.metrics(self.output)


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tensorboardX.py").write_text(WRITER)
    sections: dict[str, Any] = {"export": {"path": str(folder / "export")}, "logging": {"tensorboard": True}}
    config = from_table(table(folder, model, **sections))
    with pytest.MonkeyPatch.context() as patch, trainer() as train:
        patch.syspath_prepend(folder)
        outcome, said = train(config)
    assert (outcome.step, outcome.stopped_by) == (4, None)
    return Finished(config, said)


@pytest.mark.slow
def test_the_command_trains_a_pretrained_model_on(model: Path, finished: Finished):
    config, records, place = finished.config, finished.records, Path(str(finished.config.export.path))
    corpus, held = data.hold_out(data.read(config.data, models.tokenizer(model)), 0.2, 0)
    assert held.text[-1] == 102 and not (corpus.text == 102).any()  # one document, which ends at its end alone

    # It starts from the weights in the file: the first loss is theirs.
    first = data.Batches(corpus, config.data, layout="contiguous", num_shards=1).on_host(0)
    loss, count = measured(models.load(model, layout="contiguous"), first)
    assert records[0]["loss"] == pytest.approx(loss, rel=1e-5) and records[0]["targets"] == count
    assert records[-1]["loss"] < records[0]["loss"] - 0.1

    # What is held out is measured with each checkpoint, by the decoder that the export has.
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4]
    settings = configuration.Data(sequence_length=64)
    batches = data.Batches(held, settings, layout="contiguous", num_shards=1).once(4)
    assert len(batches) == 1
    loss, count = measured(models.load(place, layout="contiguous"), batches.on_host(0))
    assert records[-1]["eval_targets"] == count == len(held.text) - 1
    assert records[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert records[-1]["eval_perplexity"] == pytest.approx(np.exp(records[-1]["eval_loss"]))
    assert f"held-out loss {records[-1]['eval_loss']:.4f}" in finished.said
    assert "tokens of text in 1 documents" in finished.said
    assert (finished.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert models.tokenizer(place).encode("the") == models.tokenizer(model).encode("the")
    assert "num_layers" not in json.loads((finished.output / "config.json").read_text())["model"]

    events = [json.loads(line) for line in (finished.output / "tensorboard" / "events").read_text().splitlines()]
    assert events[0] == ["purge", 1]
    assert ["loss", records[2]["loss"], 3] in events and ["eval_loss", records[3]["eval_loss"], 4] in events


@jax.jit
def token_losses(decoder: Decoder, batch: dict[str, Any]) -> Any:
    return decoder.token_losses(batch["tokens"], batch["targets"], segment_ids=batch["segment_ids"])


def measured(decoder: Decoder, batch: dict[str, np.ndarray]) -> tuple[float, int]:
    """Mean cross entropy of the tokens with a target, and how many there are."""
    each = np.asarray(token_losses(decoder, batch))[batch["loss_mask"]].astype(np.float64)
    return float(each.mean()), each.size


@pytest.mark.slow
def test_killed_and_resumed_on_another_mesh_with_other_parts(
    model: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Train
):
    """The losses of the run that was not interrupted, from the checkpoint's parameters, not from the file's."""
    write = loop.metrics.MetricsFile.write

    def killed(self: Any, record: dict[str, Any]) -> None:
        write(self, record)
        if record["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.metrics.MetricsFile, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        train(from_table(table(tmp_path, model)), resume="never")
    monkeypatch.undo()
    with Checkpoints(tmp_path / "out" / "checkpoints", keep=2) as checkpoints:
        changed = json.loads(json.dumps(checkpoints.about(2)).replace("m.gguf", "other"))
        with pytest.raises(CheckpointError, match=r'model\.init_from = ".*other" \(was ".*m\.gguf"\)'):
            check_resume(checkpoints, 2, changed, "auto")
    again = table(tmp_path, model, mesh={"data": 1, "sequence": 4}, optimizer={"accumulate": 4})
    outcome, said = train(from_table(again))
    assert "resuming after step 2" in said and "optimizer.accumulate = 4 (was 2)" in said
    found, whole = tiny_run.metrics(outcome.output), finished.records
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in found], [r[name] for r in whole], rtol=2e-5)


def test_parts_of_a_batch_give_the_step_of_the_whole():
    """Loss and gradients, where the parts have very different numbers of targets."""
    mesh = jax.make_mesh((2, 1), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2])
    settings = DecoderConfig(vocab_size=32, **TINY, axis_name="sequence", batch_axis_name="data", loss_chunk=8)
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, 32, (2, 4, 16), np.int32)
    mask = np.arange(16)[None] < np.array([1, 14, 0, 3])[:, None]
    host = {"tokens": tokens, "targets": targets, "segment_ids": np.ones_like(tokens), "loss_mask": mask}
    found = []
    for parts in (1, 2):
        made = program.assemble(settings, Optimizer(accumulate=parts), mesh, batch_shape=(4, 16), seed=1)
        batch = jax.device_put(host, made.batch_sharding)
        with jax.numpy_dtype_promotion("standard"):
            state, metrics = made.jit_step()(made.jit_init()(), batch)
        assert float(metrics.targets) == mask.sum()
        # Before the first step Adam's moment is 0: after it, a tenth of the clipped gradient.
        found.append((float(metrics.loss), float(metrics.grad_norm), jax.device_get(state.opt_state[1][0].mu)))
    (loss, norm, moments), (loss_in_parts, norm_in_parts, moments_in_parts) = found
    assert loss_in_parts == pytest.approx(loss, rel=1e-6) and norm_in_parts == pytest.approx(norm, rel=1e-5)
    assert norm > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7, rtol=2e-5), moments, moments_in_parts)


def scales(decoder: Decoder) -> np.ndarray:
    return np.asarray(decoder.norm.arrays()["scale"].astype(np.float32))


def tokens_of(length: int, vocabulary: int = 32) -> np.ndarray:
    return np.random.default_rng(2).integers(0, vocabulary, length)


def test_small_updates_of_bfloat16_parameters_are_not_lost():
    """60 updates of about 2e-4 each: none of them alone moves a bfloat16 of 1."""
    settings = DecoderConfig(vocab_size=32, **TINY, param_dtype="bfloat16", layout="contiguous")
    batches = Batches.from_tokens([tokens_of(99)], sequence_length=32, batch_size=1, layout="contiguous")
    moved = {}
    for masters in (True, False):
        optimizer = Optimizer(steps=60, warmup_steps=0, learning_rate=2e-4, final_fraction=1.0, float32_masters=masters)
        with jax.numpy_dtype_promotion("standard"):
            decoder, history = fit(settings, batches, optimizer=optimizer)
        assert {x.dtype.name for x in jax.tree.leaves(nnx.state(decoder))} == {"bfloat16"}
        assert np.isfinite(history[-1]["loss"])
        moved[masters] = np.abs(scales(decoder) - 1).max()
    assert moved[False] == 0, "or this test says nothing of masters"
    assert moved[True] > 5e-3


# ------------------------------------------------------------------------------------------------------ from Python


@pytest.fixture(scope="module")
def batches() -> Batches:
    return Batches.from_tokens([tokens_of(70), tokens_of(50)], sequence_length=32, batch_size=2, num_shards=2)


def ring(shards: int) -> jax.sharding.Mesh:
    """As users make it: with Explicit axes."""
    return jax.make_mesh((shards,), ("sp",), devices=jax.devices()[:shards])


def test_fit_trains_a_decoder_and_leaves_the_given_one(batches: Batches, tmp_path: Path):
    settings = DecoderConfig(vocab_size=32, **TINY)
    decoder = Decoder(settings, mesh=ring(2), rngs=nnx.Rngs(0))
    before = jax.device_get(nnx.to_pure_dict(nnx.state(decoder)))
    heard: list[Any] = []
    options: dict[str, Any] = dict(held_out=batches, every=3, optimizer=Optimizer(learning_rate=1e-2, warmup_steps=1))
    with jax.numpy_dtype_promotion("standard"):
        trained, history = fit(decoder, batches, steps=6, callback=heard.append, **options)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(nnx.to_pure_dict(nnx.state(decoder))))
    assert heard == history and [record["step"] for record in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["loss"] < history[0]["loss"]
    assert [record["step"] for record in history if "eval_loss" in record] == [3, 6]
    of_step_0 = batches.on_host(0)
    keys = {"segment_ids": of_step_0["segment_ids"], "loss_mask": of_step_0["loss_mask"]}
    run = jax.jit(lambda d, tokens, targets, **keys: d.loss(tokens, targets, **keys)[0])
    with jax.set_mesh(decoder.mesh):
        loss = [float(run(d, of_step_0["tokens"], of_step_0["targets"], **keys)) for d in (decoder, trained)]
    assert loss[0] == pytest.approx(history[0]["loss"], rel=1e-6) and loss[1] < loss[0]

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 4:
            raise InterruptedError

    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(InterruptedError):
            fit(decoder, batches, steps=6, directory=tmp_path / "run", callback=stop, **options)
        with jax.set_mesh(decoder.mesh):
            again, resumed = fit(decoder, batches, steps=6, directory=tmp_path / "run", **options)
    assert [r["loss"] for r in resumed] == [r["loss"] for r in history]  # to the last bit, and each step once
    jax.tree.map(np.testing.assert_array_equal, *(nnx.to_pure_dict(nnx.state(d)) for d in (trained, again)))
    with pytest.raises(CheckpointError, match=r"optimizer\.b1 = 0\.5 \(was 0\.9\)"):
        changed = dataclasses.replace(options["optimizer"], b1=0.5)
        fit(decoder, batches, steps=6, directory=tmp_path / "run", **options | {"optimizer": changed})


CONFIG = DecoderConfig(vocab_size=32, **TINY)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": 3}, "model must be a Decoder or a DecoderConfig. Got int"),
        ({"batches": [1]}, "batches must be of Batches.from_tokens. Got list"),
        ({"held_out": [1]}, "held_out must be of Batches.from_tokens. Got list"),
        ({"steps": 0}, "steps must be an integer of at least 1, or None. Got 0"),
        ({"optimizer": {}}, "optimizer must be an Optimizer or None. Got dict"),
        ({"steps": 10, "optimizer": Optimizer()}, "warmup_steps must be less than the number of steps, 10. Got 10"),
        ({"every": 0}, "every must be an integer of at least 1. Got 0"),
        ({"keep": True}, "keep must be an integer of at least 1. Got True"),
        ({"resume": "yes"}, "resume must be .* Got 'yes'"),
        ({"mesh": None}, "batches must be dealt for num_shards = 1, as the decoder. Got 2"),
        ({"mesh": 4}, "batches must be dealt for num_shards = 4, as the decoder. Got 2"),
        ({"model": dataclasses.replace(CONFIG, layout="striped")}, "the decoder's layout, 'striped'. Got 'zigzag'"),
        ({"model": dataclasses.replace(CONFIG, vocab_size=31)}, "below the decoder's vocab_size, 31. Got 31"),
        ({"model": dataclasses.replace(CONFIG, axis_name="ring")}, r"mesh must have the axes .*\('ring',\)"),
        ({"steps": 20, "optimizer": Optimizer(accumulate=4)}, "optimizer.accumulate times .*, 4. Got 2"),
    ],
)
def test_fit_refuses(batches: Batches, change: dict[str, Any], says: str):
    arguments: dict[str, Any] = {"model": CONFIG, "batches": batches, "mesh": 2} | change
    if arguments["mesh"] is not None:
        arguments["mesh"] = ring(arguments["mesh"])
    with pytest.raises(ValueError, match=says):
        fit(arguments.pop("model"), arguments.pop("batches"), **arguments)


# ----------------------------------------------------------------------------------------- what is refused beforehand


def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(self: Any) -> None:
        raise AssertionError("compiled before it was refused")

    monkeypatch.setattr(program.Functions, "compile_step", compiled)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"model": {"init_from": "absent"}}, "model.init_from: must be a directory or a GGUF file. Got absent"),
        ({"model": {"init_from": "empty"}}, "model.init_from: empty must hold config.json. Got none"),
        ({"model": {"init_from": "torn"}}, "model.init_from: .*torn"),
        ({"data": {"tokenizer": "absent"}}, "data.tokenizer: must be a Hugging Face directory or a GGUF .* Got absent"),
        ({"data": {"tokenizer": "empty"}}, "data.tokenizer: empty must hold tokenizer.json"),
        (
            {"data": {"tokenizer": "large"}},
            "data.tokenizer: must fit the vocabulary of .*, 128 ids. Got large with 200",
        ),
        ({"mesh": {"data": 1, "tensor": 4}}, "mesh.tensor: must divide num_kv_heads = 2 of model.init_from"),
        ({"data": {"source": "tokens", "paths": ["ids.npy"]}}, "ids below the vocabulary of .*, 128. Got 128"),
        ({"logging": {"tensorboard": True}}, "logging.tensorboard: .*: pip install tensorboardX. Got none"),
        ({"export": {"path": "mine"}}, "export.path: must be an empty directory or none.* Got mine, which holds some"),
        ({"export": {"path": "ids.npy"}}, "export.path: .* Got ids.npy, which holds something"),
        ({"export": {"path": "ids.npy/x"}}, "export.path: must lie in a directory that can be written to"),
    ],
)
def test_refused_before_anything_is_compiled(
    model: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], says: str
):
    monkeypatch.chdir(tmp_path)
    no_compiler(monkeypatch)
    monkeypatch.setattr(tensorboard, "_WRITERS", ("no_such_writer",))
    for name in ("empty", "mine", "large"):
        Path(name).mkdir()
    Path("mine/notes.txt").write_text("mine")
    Path("torn").write_bytes(model.read_bytes()[:1000])
    np.save("ids.npy", np.array([1, 128]))
    many = {"model": {"type": "WordLevel", "vocab": {str(i): i for i in range(200)}, "unk_token": "0"}}
    Path("large/tokenizer.json").write_text(json.dumps(many))
    with pytest.raises(loop.REFUSALS, match=says) as refused:
        train(from_table(table(tmp_path, model, **sections)))
    assert len(str(refused.value).splitlines()) == 1
    assert Path("mine/notes.txt").read_text() == "mine"


def test_a_fresh_model_has_the_vocabulary_of_the_tokenizer(model: Path):
    def vocabulary(**keys: Any) -> int:
        return pretrained.resolve(from_table({"data": {"tokenizer": str(model)}, "model": keys})).decoder.vocab_size

    assert vocabulary() == 128 and vocabulary(vocab_size=256) == 256
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer: must fit model\.vocab_size, 100 ids. Got .*m\.gguf with 128"
    ):
        vocabulary(vocab_size=100)
    assert pretrained.resolve(from_table({})).decoder.vocab_size == 256


def test_a_decoder_without_a_family_is_not_exported(tmp_path: Path):
    config = from_table({"model": {"logits_soft_cap": 5.0}, "export": {"path": str(tmp_path / "x")}})
    with pytest.raises(ConfigError, match=r"export\.path: the decoder must be one of llama"):
        export.check(config, pretrained.resolve(config).decoder, None)


def test_an_export_replaces_an_earlier_one_of_the_same_run_alone(model: Path, tmp_path: Path, monkeypatch: Any):
    target = tmp_path / "export"
    config = from_table({"output": "one", "export": {"path": str(target)}})
    decoder = models.load(model, layout="contiguous")
    export.write(config, decoder, models.tokenizer(model), step=1)
    export.check(config, SMOL, None)
    export.write(config, decoder, models.tokenizer(model), step=2)
    assert json.loads((target / export.MARK).read_text())["step"] == 2
    other = dataclasses.replace(config, output="two")
    with pytest.raises(OutputError, match="an earlier export of output = 'two'. Got .*export, which holds something"):
        export.check(other, SMOL, None)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ringjax.models.saving.write_safetensors", full)
    with pytest.raises(TrainingError, match=r"export\.path: could not be written to .*No space left on device"):
        export.write(config, decoder, None, step=3)
    monkeypatch.undo()
    assert json.loads((target / export.MARK).read_text())["step"] == 2 and len(list(tmp_path.iterdir())) == 1

    rename = export.os.rename
    moved: list[str] = []

    def torn(source: Path, place: Path) -> None:
        if source.name == "whole" and place == target:
            raise OSError(5, "Input/output error")
        moved.append(place.name)
        rename(source, place)

    monkeypatch.setattr(export.os, "rename", torn)
    with pytest.raises(TrainingError, match="Input/output error"):
        export.write(config, decoder, None, step=4)
    assert moved[-2:] == ["before", "export"], "out of the way, and back"
    assert json.loads((target / export.MARK).read_text())["step"] == 2 and len(list(tmp_path.iterdir())) == 1
    (target / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="which holds something"):
        export.check(config, SMOL, None)


def test_checkpoints_of_before_a_key_was_there_go_on():
    options = {"optimizer": {"steps": 3, "b1": 0.9, "accumulate": 1}, "decoder": {"num_layers": 2, "scan_layers": True}}
    new = {"config": json.loads(json.dumps(options)), "text": "0"}
    old = {"config": {"optimizer": {"steps": 3, "b1": 0.9}, "decoder": {"num_layers": 2}}, "text": "0"}

    class Kept:
        directory = Path("out")

        def about(self, step: int) -> dict[str, Any]:
            del step
            return old

    (note,) = check_resume(Kept(), 2, new, "auto")
    assert re.match("resuming after step 2", note)
    new["config"]["decoder"]["scan_layers"] = False
    with pytest.raises(CheckpointError, match=r"decoder\.scan_layers = false \(was true\)"):
        check_resume(Kept(), 2, new, "auto")
