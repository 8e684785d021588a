"""Batches of whole documents, dealt so that devices work equally: what is in them, their losses, resume."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run
from flax import nnx
from in_process import Train
from in_process import train as train
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import ringjax
from ringjax.nnx import Decoder, DecoderConfig
from ringjax.training import Batches, Optimizer, fit, program
from ringjax.training.checkpoints import CheckpointError
from ringjax.training.config import Data
from ringjax.training.data import Corpus
from ringjax.training.loading import ConfigError, load
from ringjax.training.metrics import MetricsFile
from ringjax.training.packed import Packed

SHARDS, LENGTH = 4, 64
rng = np.random.default_rng(0)
SIZES = [1, 2, 150, 40, 64, *rng.integers(1, 30, 40).tolist()]  # 150 is longer than a sequence
# Of every document its number and the place in it.
DOCUMENTS = [[1000 * number + place for place in range(size)] for number, size in enumerate(SIZES)]


def make(batch_size: int = 2, **options: Any) -> Packed:
    given = {"sequence_length": LENGTH, "batch_size": batch_size, "num_shards": SHARDS, "packing": "balanced"} | options
    found = Batches.from_tokens(DOCUMENTS, **given)
    assert isinstance(found, Packed)
    return found


def present(row: dict[str, np.ndarray]) -> np.ndarray:
    """Places that are no padding: each of those has an id of its own, above those of documents."""
    ids = row["segment_ids"]
    counts = {int(n): int((ids == n).sum()) for n in np.unique(ids)}
    return np.array([row["tokens"][n] != 0 or row["loss_mask"][n] or counts[int(ids[n])] > 1 for n in range(LENGTH)])


def test_an_epoch_has_every_token_once_and_targets_follow() -> None:
    batches = make(1)
    count = len(batches.packing)
    assert count * LENGTH >= sum(SIZES)
    for epoch in (0, 1):
        found: list[int] = []
        targets = 0
        for step in range(epoch * count, (epoch + 1) * count):
            row = {name: x[0] for name, x in batches.on_host(step).items()}
            found += row["tokens"][present(row)].tolist()
            for token, target, counts in zip(row["tokens"], row["targets"], row["loss_mask"], strict=True):
                last = token % 1000 + 1 == SIZES[token // 1000]
                assert target == (token + 1 if counts else 0) and (not counts or not last)
            targets += int(row["loss_mask"].sum())
        wanted = sorted(token for document in DOCUMENTS for token in document if token)  # 0 is padding, too
        assert sorted(token for token in found if token) == wanted
        assert targets == sum(size - 1 for size in SIZES), "of cut documents too"


def test_documents_are_segments_whose_positions_are_places_in_them() -> None:
    batches = make(1)
    for step in range(len(batches.packing)):
        row = {name: x[0] for name, x in batches.on_host(step).items()}
        there = present(row)
        within = row["tokens"] % 1000 % LENGTH  # parts of a long document begin anew
        assert np.array_equal(row["positions"][there], within[there])
        for one in np.unique(row["segment_ids"][there]):
            assert len(np.unique(row["tokens"][row["segment_ids"] == one] // 1000)) == 1
        ringjax.check_segments(row["segment_ids"][None], num_shards=SHARDS, shared_length=batches.shared_length)
    assert 0 < batches.shared_length <= LENGTH // SHARDS  # type: ignore[operator]
    assert batches.packing.imbalance.max() < 1.5 and "16 keys travel" in batches.notes[0]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first, fresh = make(), make()
    later = [first.on_host(step) for step in range(9)]
    for name, x in fresh.on_host(8).items():
        assert np.array_equal(x, later[8][name])
    assert any(not np.array_equal(later[0]["tokens"], other["tokens"]) for other in later[1:])
    assert not np.array_equal(make(seed=1).on_host(0)["tokens"], later[0]["tokens"])


def test_devices_get_their_shards() -> None:
    mesh = Mesh(np.array(jax.devices()[:SHARDS]).reshape(1, SHARDS), ("data", "sequence"))
    batches = make()
    built = batches.on_devices(1, NamedSharding(mesh, PartitionSpec("data", "sequence")))
    assert built.keys() == {"tokens", "targets", "segment_ids", "loss_mask", "positions"}
    for name, whole in batches.on_host(1).items():
        assert np.array_equal(np.asarray(built[name]), whole) and built[name].dtype == whole.dtype


def test_held_out_documents_are_measured_once() -> None:
    batches = make(1).once(2)
    assert len(batches) == -(-len(make(1).packing) // 2)
    counted = sum(int(batches.on_host(number)["loss_mask"].sum()) for number in range(len(batches)))
    assert counted == sum(size - 1 for size in SIZES)


CONFIG = DecoderConfig(
    vocab_size=64, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16, loss_chunk=8,
    remat=False, layout="contiguous", axis_name="sequence", batch_axis_name="data", head_axis_name=None,
)  # fmt: skip


def test_the_loss_is_that_of_the_documents_one_by_one() -> None:
    documents = [rng.integers(0, 64, size) for size in (5, 50, 1, 23, 17, 9, 2, 30, 12)]
    mesh = jax.make_mesh((1, SHARDS), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    given = {"sequence_length": 96, "batch_size": 2, "num_shards": SHARDS, "packing": "balanced"}
    batches = Batches.from_tokens(documents, **given)
    made = program.assemble(
        CONFIG, Optimizer(steps=2, warmup_steps=1), mesh, batch_shape=(2, 96), seed=3,
        shared_length=batches.shared_length,
    )  # fmt: skip
    state = made.jit_init()()
    total, count = 0.0, 0
    step = made.jit_step()
    for number in range(len(batches.packing) // 2):  # type: ignore[attr-defined]
        batch = batches.on_devices(number, made.batch_sharding)
        with jax.numpy_dtype_promotion("standard"):  # Adam in Optax raises a float to an int32 count
            _, measured = step(jax.tree.map(jax.numpy.copy, state), batch)
        total, count = total + float(measured.loss) * float(measured.targets), count + int(measured.targets)
    alone = Decoder(dataclasses.replace(CONFIG, num_shards=1), rngs=nnx.Rngs(3))
    losses_of = jax.jit(lambda decoder, *tokens: decoder.token_losses(*tokens))
    want = 0.0
    for document in documents:
        # As long as the longest, in one program: attention is causal, and what follows changes nothing before it.
        row = np.zeros((1, max(map(len, documents))), document.dtype)
        row[0, : len(document)] = document
        want += float(losses_of(alone, row[:, :-1], row[:, 1:])[0, : len(document) - 1].sum())
    assert count == sum(len(document) - 1 for document in documents)
    np.testing.assert_allclose(total, want, rtol=2e-5)


# --- runs ------------------------------------------------------------------------------------------------------------

PACKED = ["data.packing=balanced", "ring.layout=contiguous", "optimizer.steps=3", "checkpoint.every_steps=2"]


def test_a_run_of_packed_documents_goes_on_and_keeps_its_devices(tmp_path: Path, train: Train) -> None:
    path = tiny_run.write_config(tmp_path)
    outcome, said = train(load(path, [*PACKED, "data.eval_fraction=0.1"]))
    assert outcome.step == 3 and "packed in " in said and "keys travel" in said and "held-out loss" in said
    with pytest.raises(CheckpointError, match=r"mesh.sequence = 2 \(was 4\)"):
        train(load(path, [*PACKED, "data.eval_fraction=0.1", "optimizer.steps=4", "mesh.sequence=2", "mesh.data=4",
                          "data.batch_size=4"]))  # fmt: skip
    outcome, said = train(load(path, [*PACKED, "data.eval_fraction=0.1", "optimizer.steps=4"]))
    assert outcome.step == 4 and "resuming after step 3" in said
    assert [record["step"] for record in tiny_run.metrics(outcome.output)] == [1, 2, 3, 4]


def test_a_run_that_was_stopped_has_the_bits_of_one_that_was_not(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between checkpoints, in the second epoch of packed sequences, whose order is another one."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.py").write_text(f"{number} " * (10 + 9 * number))
    small = [
        f"data.paths=[{json.dumps(str(text))}]", "model.num_layers=1", "data.batch_size=8", "optimizer.steps=5",
        "checkpoint.every_steps=4",
    ]  # fmt: skip
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole, said = train(load(tiny_run.write_config(tmp_path / "whole"), [*PACKED, *small]))
    (sequences,) = map(int, re.findall(r"packed in (\d+) sequences", said))
    assert 8 < sequences < 3 * 8
    write = MetricsFile.write

    def stopped(self: MetricsFile, record: Any) -> None:
        write(self, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    path = tiny_run.write_config(tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", stopped)
        outcome, _ = train(load(path, [*PACKED, *small]))
    assert (outcome.step, outcome.stopped_by) == (3, signal.SIGTERM)
    broken, said = train(load(path, [*PACKED, *small]))
    assert broken.step == 5 and "resuming after step 3" in said
    assert tiny_run.learned(broken.output) == tiny_run.learned(whole.output)


def test_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ring.layout: must be 'contiguous' when data.packing = 'balanced'.*'zigzag'"):
        load(tiny_run.write_config(tmp_path), ["data.packing=balanced"])


def test_fit_takes_packed_documents() -> None:
    mesh = jax.make_mesh((1, SHARDS), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    documents = [rng.integers(0, 64, size) for size in (5, 50, 1, 23, 17, 9, 2, 30, 12)]
    given: dict[str, Any] = {"sequence_length": 64, "batch_size": 1, "num_shards": SHARDS}
    batches = Batches.from_tokens(documents, packing="balanced", **given)
    with jax.numpy_dtype_promotion("standard"):
        _, history = fit(CONFIG, batches, mesh=mesh, steps=2, held_out=batches)
        assert [record["step"] for record in history] == [1, 2] and history[-1]["eval_loss"] > 0
        stream = Batches.from_tokens(documents, layout="contiguous", **given)
        with pytest.raises(ValueError, match="held_out must have the packing of batches, 'balanced'. Got 'stream'"):
            fit(CONFIG, batches, mesh=mesh, steps=2, held_out=stream)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "greedy"}, "packing must be 'stream' or 'balanced'. Got 'greedy'"),
        ({"packing": "balanced", "layout": "zigzag"}, "layout must be 'contiguous' or None with packing 'balanced'"),
        ({"packing": "balanced", "sequence_length": 66}, "sequence_length must be a multiple of num_shards, 4. Got 66"),
        ({"packing": "stream", "window": 8}, "window must be None with packing 'stream'"),
    ],
)
def test_arguments_of_from_tokens(options: dict[str, Any], message: str) -> None:
    given = {"sequence_length": 64, "batch_size": 1, "num_shards": SHARDS} | options
    with pytest.raises(ValueError, match=message):
        Batches.from_tokens(DOCUMENTS, **given)


def test_a_corpus_of_bytes() -> None:
    config = Data(sequence_length=64, batch_size=1, packing="balanced")
    batches = Packed(Corpus.of([b"abc", b"de" * 50]), config, num_shards=2)
    rows = [batches.on_host(step) for step in range(len(batches.packing))]
    assert sum(int(row["loss_mask"].sum()) for row in rows) == 2 + 99
