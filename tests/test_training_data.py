"""Batches of real text: packing, targets, ring order, determinism, shards."""

import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ringjax
from ringjax.training.config import Data
from ringjax.training.data import Batches, Corpus, DataError, read

LETTERS = [bytes([65 + i]) * n for i, n in enumerate((7, 30, 1, 12, 3, 25, 9))]  # a letter a document


def make(documents=LETTERS, *, length=16, batch=2, seed=0, layout="contiguous", shards=1):
    config = Data(sequence_length=length, batch_size=batch, seed=seed)
    return Batches(Corpus.of(documents), config, layout=layout, num_shards=shards)


def numbered(count, length):
    """Documents whose bytes tell where they are: byte j of document i is 16 i + j."""
    return [bytes(16 * i + j for j in range(length)) for i in range(count)]


def test_an_epoch_is_every_byte_once():
    corpus = numbered(4, 8)
    batches = make(corpus, length=16, batch=1)
    rows = [batches.on_host(step)["tokens"][0] for step in range(4)]
    for epoch in (rows[:2], rows[2:]):
        assert sorted(np.concatenate(epoch).tolist()) == sorted(b"".join(corpus))


def test_epochs_are_shuffled_differently():
    batches = make(numbered(12, 8), length=96, batch=1)
    assert not np.array_equal(batches.on_host(0)["tokens"], batches.on_host(1)["tokens"])


@pytest.mark.parametrize("step", range(5))
def test_target_is_the_next_byte_of_the_same_document(step):
    batch = make(numbered(9, 13), length=16, batch=3).on_host(step)
    within = batch["tokens"] % 16
    assert np.array_equal(batch["loss_mask"], within < 12)  # byte 12 is the last of its document
    assert np.array_equal(batch["targets"][batch["loss_mask"]], (batch["tokens"] + 1)[batch["loss_mask"]])
    assert not batch["targets"][~batch["loss_mask"]].any()


@pytest.mark.parametrize("step", range(5))
def test_segments_are_the_documents(step):
    batch = make(step and LETTERS or LETTERS[::-1]).on_host(step)
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        changes = np.diff(tokens) != 0
        assert segments[0] == 1
        assert np.array_equal(np.diff(segments), changes.astype(int))


def test_same_document_twice_in_a_row_is_two_segments():
    batch = make([b"ab"], length=6, batch=1).on_host(0)
    assert bytes(batch["tokens"][0].astype(np.uint8)) == b"ababab"
    assert batch["segment_ids"][0].tolist() == [1, 1, 2, 2, 3, 3]
    assert batch["loss_mask"][0].tolist() == [True, False] * 3


@pytest.mark.parametrize("total", [5, 16, 17])
def test_source_shorter_than_a_sequence_fills_it(total):
    batches = make([bytes(range(total))], length=17, batch=1)
    for step in range(3):
        batch = batches.on_host(step)
        assert batch["tokens"].shape == (1, 17)
        assert set(batch["tokens"][0].tolist()) == set(range(total))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", ringjax.Striped(stripe=2)])
def test_ring_order_is_to_ring_order(layout):
    natural, ring = make(), make(layout=layout, shards=4)
    for step in range(3):
        expected = ringjax.to_ring_order(natural.on_host(step), layout=layout, num_shards=4)
        found = ring.on_host(step)
        assert expected.keys() == found.keys()
        for name in expected:
            assert np.array_equal(expected[name], found[name]), name


def test_a_batch_depends_on_seed_and_step_alone():
    first = make()
    later = [first.on_host(step)["tokens"] for step in range(12)]
    fresh = make()
    assert np.array_equal(fresh.on_host(11)["tokens"], later[11])  # straight to step 11
    assert any(not np.array_equal(later[0], other) for other in later[1:])
    assert not np.array_equal(make(seed=1).on_host(0)["tokens"], later[0])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_devices_get_their_shards(layout):
    count = min(4, jax.device_count())
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(1, count), ("data", "sequence"))
    sharding = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    batches = make(layout=layout, shards=count)
    built = batches.on_devices(3, sharding)
    for name, whole in batches.on_host(3).items():
        assert built[name].sharding.is_equivalent_to(sharding, 2)
        assert np.array_equal(np.asarray(built[name]), whole), name
        assert built[name].dtype == whole.dtype


def test_only_addressable_shards_are_built(monkeypatch):
    """What is asked of the host is what the devices of this process hold, not the batch."""
    batches = make(length=64, batch=2)
    asked = []

    def note(step, rows, positions):
        asked.append((list(rows), len(positions)))
        return Batches.on_host(batches, step, rows, positions)

    monkeypatch.setattr(batches, "on_host", note)
    whole = batches.on_host(0, range(2), np.arange(64))
    asked.clear()

    def only_the_last_quarter(shape, sharding, callback):
        del sharding
        index = (slice(1, 2), slice(48, 64))
        return callback(index), callback(index)

    monkeypatch.setattr(jax, "make_array_from_callback", only_the_last_quarter)
    built = batches.on_devices(0, sharding=None)  # pyright: ignore[reportArgumentType]
    assert asked == [([1], 16)]  # once for the four arrays of both devices
    for name, (shard, _) in built.items():
        assert np.array_equal(shard, whole[name][1:2, 48:64])


def test_standard_library_is_the_default():
    corpus = read(Data())
    root = Path(sysconfig.get_paths()["stdlib"])
    assert len(corpus.lengths) > 100 and len(corpus.text) > 2_000_000
    assert (root / "argparse.py").read_bytes() in corpus.text.tobytes()
    assert corpus.fingerprint == read(Data()).fingerprint


def test_paths_directories_and_globs(tmp_path):
    for name, text in {"a.txt": "A", "b/c.txt": "C", "b/d.md": "D", "b/.hidden": "H", "e.txt": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def found(*paths):
        return read(Data(source="paths", paths=tuple(str(tmp_path / p) for p in paths))).text.tobytes()

    assert found("a.txt") == b"A"
    assert found("b") == b"CD"
    assert found("**/*.txt") == b"AC"
    assert found("b/d.md", "b") == b"DC"  # in the order given, each file once
    assert found("a.txt", "e.txt") == b"A"  # an empty file among others is no document


def test_missing_and_empty_sources_are_errors(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    for pattern in ("nothing.txt", "*.nothing"):
        with pytest.raises(DataError, match=r"data\.paths: each entry must match.*nothing"):
            read(Data(source="paths", paths=(str(tmp_path / pattern),)))
    with pytest.raises(DataError, match=r"Got nothing but empty files: .*empty\.txt"):
        read(Data(source="paths", paths=(str(tmp_path / "empty.txt"),)))
    with pytest.raises(DataError, match="at least one document"):
        Corpus.of([b"", b""])


def test_fingerprint_tells_documents_apart():
    prints = {Corpus.of(docs).fingerprint for docs in ([b"ab", b"c"], [b"a", b"bc"], [b"c", b"ab"], [b"ab", b"d"])}
    assert len(prints) == 4


def test_literal_path_with_glob_characters(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert read(Data(source="paths", paths=(str(tmp_path / "a[1].txt"),))).text.tobytes() == b"x"
