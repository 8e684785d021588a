"""Packed documents in plans: what a promise spares, and what is refused."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import ringjax
from ringjax.cli import app
from ringjax.inspect.documents import deal
from ringjax.inspect.program import Program
from ringjax.inspect.work import pairs
from ringjax.packing.balance import by_block, imbalance, works_as_they_come
from ringjax.packing.pairs import Bounds
from ringjax.pairs import attended_pairs
from ringjax.planner import costs, words
from ringjax.planner.documents import Spread
from ringjax.planner.lengths import document_lengths

GIVEN: dict[str, Any] = {"model": "8,2,64,4", "seq_len": 65_536, "devices": "h100:8"}


def best(plan: ringjax.Plan, *named: str) -> Any:
    return next(c for c in plan.candidates if c.way.words == named)


# --- promises --------------------------------------------------------------------------------------------------------


@functools.cache
def most(total: int, longest: int, left: int | None, right: int | None) -> int:
    """Of all ways to divide so many tokens into documents, the most pairs."""
    if total == 0:
        return 0
    return max(
        attended_pairs(first, left, right) + most(total - first, longest, left, right)
        for first in range(1, min(total, longest) + 1)
    )


@pytest.mark.parametrize(("left", "right"), [(None, 0), (None, None), (2, 0), (3, 1)])
def test_as_many_pairs_as_documents_that_keep_the_promise_can_have(left: int | None, right: int | None) -> None:
    for total, longest in itertools.product((0, 1, 7, 12), (1, 3, 5, 12, 40)):
        assert costs.document_pairs(total, longest, left, right) == most(total, longest, left, right)
    for shared, longest in itertools.product((0, 1, 3, 5), (2, 5, 40)):
        ways = [3 * most(5 - g, longest, left, right) + most(3 * g, longest, left, right) for g in range(shared + 1)]
        assert costs.shared_pairs(5, 3, shared, longest, left, right) == max(ways)


def test_a_promise_saves_bytes_hops_and_products() -> None:
    """Shards of 8,192: by hand, of the block before its last tile of keys and their ids; no other hop."""
    whole, short = ringjax.plan(**GIVEN), ringjax.plan(**GIVEN, max_segment_length=129)
    ring = best(short, "ring")
    key = 2 * 2 * 64  # items of key and value
    assert ring.cost.wire_bytes["ring"] == 128 * (2 * (key * 2 + 4) + key * 4)
    assert ring.cost.compute_seconds < best(whole, "ring").cost.compute_seconds / 100
    assert ring.cost.overhead_seconds < best(whole, "ring").cost.overhead_seconds / 3
    assert short.choice.way.words == ("ring",) and short.choice.cost.wire_bytes["all_gather"] == 0


@pytest.mark.parametrize("shared", [0, 1024, 8192])
def test_only_what_is_shared_travels(shared: int) -> None:
    plan = ringjax.plan(**GIVEN, shared_length=shared)
    ring = best(plan, "ring")
    key = 2 * 2 * 64
    # Seven hops, there and again in backward, with ids and positions; the sums of the own block move with a whole ring,
    # and then come home in bfloat16.
    sums = 7 * key * 4 + (key * 2 if shared == 8192 else 0)
    assert ring.cost.wire_bytes["ring"] == shared * (7 * 2 * (key * 2 + 8) + sums)
    assert {c.way.layout for c in plan.candidates} == {ringjax.Contiguous()}
    assert ("shared_length" in plan.config) and plan.to_json()["shared_length"] == shared
    if shared == 0:  # each device has one document of its own shard at the most
        assert ring.cost.compute_seconds == pytest.approx(best(ringjax.plan(**GIVEN), "ring").cost.compute_seconds / 8,
                                                          rel=1e-3)  # fmt: skip


def test_code_to_paste_runs_with_what_pack_returns() -> None:
    packing = ringjax.pack([90, 7, 20, 30, 40, 25, 30, 12], num_shards=4, shard_length=64, multiple=8, final=True)
    plan = ringjax.plan("2,2,8,1", seq_len=256, devices="h100:4", shared_length=packing.shared_length)
    sequence = packing[0]
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 256, 2, 8))
    names: dict[str, Any] = {"ringjax": ringjax, "query": query, "key": key, "value": value}
    names |= {"segment_ids": sequence.segment_ids[None], "positions": sequence.positions}
    exec(best_code(plan), names)
    seen = (sequence.document[:, None] == sequence.document) & (sequence.offset[:, None] >= sequence.offset)
    dense = jax.nn.dot_product_attention(query, key, value, mask=jnp.asarray(seen)[None, None])
    present = sequence.document >= 0
    assert jnp.abs(names["out"] - dense)[:, present].max() < 1e-5


def best_code(plan: ringjax.Plan) -> str:
    return words.code(best(plan, "ring").way, plan.problem)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_segment_length": 0}, "max_segment_length must be a positive integer or None. Got 0"),
        ({"max_segment_length": 2.5}, "max_segment_length must be a positive integer.*Got 2.5"),
        ({"shared_length": -1}, "shared_length must be a non-negative integer.*Got -1"),
        ({"shared_length": (1, 2)}, r"shared_length must be one number, the same for every axis.*Got \(1, 2\)"),
        ({"shared_length": 8193}, "shared_length must be at most 8192, the tokens of a shard. Got 8193"),
    ],
)
def test_promises_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ringjax.plan(**GIVEN, **options)


ASKED = ["plan", "--model", "8,2,64,4", "--seq-len", "65536", "--devices", "h100:8"]


def test_the_command_takes_promises() -> None:
    result = CliRunner().invoke(app, [*ASKED, "--max-segment-length", "900", "--shared-length", "256", "--json"])
    said = json.loads(result.stdout)
    assert (said["max_segment_length"], said["shared_length"]) == (900, 256)
    shown = CliRunner().invoke(app, [*ASKED, "--max-segment-length", "900", "--shared-length", "256"]).stdout
    assert "documents of at most 900 places, 256 tokens of a shard in documents of several" in shown
    assert "positions=positions, segment_ids=segment_ids, max_segment_length=900, shared_length=256" in shown
    result = CliRunner().invoke(app, [*ASKED, "--shared-length", "9999"])
    assert result.exit_code == 2 and "error: --shared-length must be at most 8192" in result.output


# --- documents -------------------------------------------------------------------------------------------------------


def counted(ids: np.ndarray, at: np.ndarray, num_shards: int, left: int | None, right: int | None) -> np.ndarray:
    """Pairs of each rank with each rank's keys, token by token; ids and places in ring order."""
    apart = at[None] - at[:, None]
    seen = ids[:, None] == ids[None]
    seen &= apart >= -left if left is not None else True
    seen &= apart <= right if right is not None else True
    each = len(ids) // num_shards
    return seen.reshape(num_shards, each, num_shards, each).sum(axis=(1, 3))


@pytest.mark.parametrize(("left", "right"), [(None, 0), (None, None), (5, 0), (7, 2)])
@pytest.mark.parametrize("layout", [ringjax.Zigzag(), ringjax.Contiguous()], ids=str)
def test_work_as_documents_come(layout: Any, left: int | None, right: int | None) -> None:
    lengths, shards, each = np.array([5, 1, 70, 3, 3, 40, 12, 1, 1, 30, 9, 17]), 4, 16
    length, chunk = shards * each, layout.chunk_length(each)
    owner = layout.owner(np.arange(length // chunk), shards)
    found = np.concatenate(list(works_as_they_come(lengths, owner, chunk, Bounds(left, right))))
    ids = np.repeat(np.arange(len(lengths)), lengths)
    order = np.asarray(ringjax.ring_positions(length, layout=layout, num_shards=shards))
    assert len(found) == len(ids) // length == 3
    for number, work in enumerate(found):
        own = ids[number * length : (number + 1) * length][order]
        assert (work == counted(own, order, shards, left, right)).all()


def test_imbalance_over_several_axes_by_hand() -> None:
    """Ranks of 2 x 2, outermost first; rank r has r + 1 pairs with itself and 10 with the keys of rank 3."""
    work = np.diag([1, 2, 3, 4])[None] + np.array([0, 0, 0, 10])
    rings = by_block(work, (2, 2), ("ring", "ring"))[0]
    # Rank 0 meets rank 3 one outer place and one inner place on, rank 1 one outer, rank 2 one inner place on.
    assert rings.tolist() == [[1, 0, 0, 10], [2, 0, 10, 0], [3, 10, 0, 0], [14, 0, 0, 0]]
    assert by_block(work, (4,), ("ring",))[0].tolist() == [[1, 0, 0, 10], [2, 0, 10, 0], [3, 10, 0, 0], [14, 0, 0, 0]]
    assert by_block(work, (2, 2), ("ring", "all_gather"))[0].tolist() == [[1, 10], [2, 10], [13, 0], [14, 0]]
    assert by_block(work, (2, 2), ("ring", "all_to_all"))[0].tolist() == [[3, 20], [27, 0]]
    (total,), (lockstep,) = imbalance([rings[None]])
    assert (total, lockstep) == (14 / 12.5, (14 + 10 + 10 + 10) / 12.5)


def test_documents_are_reported_before_and_after() -> None:
    """Eight shards of 64 tokens: one document of half a sequence and many of 16; everything counted token by token."""
    lengths = ([256] + [16] * 16) * 4
    found = ringjax.plan("2,2,8,1", seq_len=512, devices="h100:8", documents=lengths, dtype="float32").documents
    before, after = found.before, found.after
    order = np.asarray(ringjax.ring_positions(512, layout="zigzag", num_shards=8))
    work = counted(np.repeat(np.arange(17), lengths[:17])[order], order, 8, None, 0)
    mean = work.sum() / 8
    hops = np.array([[work[r, (r + o) % 8] for o in range(8)] for r in range(8)])
    assert before.imbalance == Spread(mean=pytest.approx(work.sum(1).max() / mean), most=before.imbalance.mean)
    assert before.lockstep_imbalance.most == pytest.approx(hops.max(0).sum() / mean)
    assert (before.hops_made, before.hops_elided, before.padding, before.sequences) == (8, 0, 0, 4)
    packing = ringjax.pack(lengths, num_shards=8, shard_length=64)
    assert after.imbalance.most == packing.imbalance.max() and after.padding == packing.padding
    assert after.lockstep_imbalance.most == packing.lockstep_imbalance.max() < 1.1
    assert after.sequences == len(packing) and after.shared_length == packing.shared_length == 64
    assert before.left_over == 0 and after.left_over == np.array(lengths)[packing.left_over].sum()
    key = 2 * 2 * 8
    # K, V and ids of seven blocks in both passes, the sums of eight; packed with positions.
    assert before.wire_bytes == 64 * (2 * 7 * (key * 4 + 4) + 8 * key * 4)
    assert after.wire_bytes == 64 * (2 * 7 * (key * 4 + 8) + 8 * key * 4)
    assert (found.number, found.tokens, found.longest, found.cut) == (68, 2048, 256, 0)


def test_short_documents_need_no_wire() -> None:
    plan = ringjax.plan(**GIVEN, documents="equal:512")
    assert plan.documents.after.hops_made == 1 and plan.documents.after.hops_elided == 7
    assert plan.documents.after.wire_bytes == 0 and plan.documents.before.hops_elided == 0
    assert best(plan, "ring").cost.exposed_seconds == 0 and "shared_length=0" in plan.config
    # 512 * 513 / 2 pairs of each document; rates are those of the chip.
    whole = best(ringjax.plan(**GIVEN), "ring").cost.compute_seconds
    share = 128 * attended_pairs(512, None, 0) / attended_pairs(65_536, None, 0)
    assert best(plan, "ring").cost.compute_seconds == pytest.approx(share * whole, rel=0.03)


def test_documents_longer_than_a_sequence_are_cut() -> None:
    found = ringjax.plan(**GIVEN, documents=[200_000, 70_000]).documents
    assert found.cut == 2 and found.before.sequences == 4
    tokens = round((1 - found.after.padding) * found.after.sequences * 65_536)
    assert tokens + found.after.left_over == 270_000


def test_lengths_of_a_file_and_of_distributions(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("5\n 7\n\n1\n")
    (tmp_path / "list").write_text(" [5, 7, 1]\n")
    for given in (str(tmp_path / "lines"), tmp_path / "list", [5, 7, 1], np.array([5, 7, 1], np.uint16)):
        assert document_lengths(given, 13).tolist() == [5, 7, 1]
    assert document_lengths("equal:30", 100).tolist() == [30] * 54  # 1,600 tokens
    uniform = document_lengths("uniform:3:5", 1000)
    assert set(uniform) == {3, 4, 5} and 0 <= uniform.sum() - 16_000 < 5
    lognormal = document_lengths("lognormal:100:1.5:4000", 100_000)
    assert lognormal.max() == 4000 and np.median(lognormal) == pytest.approx(100, rel=0.05)
    assert np.log(lognormal[lognormal < 4000]).std() == pytest.approx(1.5, rel=0.1)
    assert (lognormal == document_lengths("lognormal:100:1.5:4000", 100_000)).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([5, 0], "documents must have positive lengths. Got 0 of document 1"),
        ([2.0], r"documents must be integers, the length of each. Got float64 \(1,\)"),
        ([[5], [5, 6]], r"documents must be integers, the length of each. Got \[\[5\], \[5, 6\]\]"),
        ([5, 6], "documents must have at least 100 tokens in all, those of a sequence. Got 11"),
        ("nowhere.txt", "documents must be FILE, lognormal:MEDIAN:SIGMA:LONGEST, .*Got 'nowhere.txt'"),
        ("normal:5:6", "documents must be FILE, .*Got 'normal:5:6'"),
        ("lognormal:5:6", "documents must be lognormal:MEDIAN:SIGMA:LONGEST, positive .*Got 'lognormal:5:6'"),
        ("lognormal:5:x:9", "documents must be lognormal.*Got 'lognormal:5:x:9'"),
        ("uniform:9:5", "documents must be uniform:SHORTEST:LONGEST, .*first not above the second. Got 'uniform:9:5'"),
        ("equal:0", "documents must be equal:LENGTH, positive integers. Got 'equal:0'"),
    ],
)
def test_documents_that_are_none(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        document_lengths(given, 100)


def test_documents_that_would_be_too_many() -> None:
    with pytest.raises(ValueError, match="documents must be at most 33554432 that fill 16 sequences.*'equal:1'"):
        document_lengths("equal:1", 2**22)


def test_a_file_that_holds_something_else(tmp_path: Path) -> None:
    for text in ("5\nsix\n", "[5, "):
        (tmp_path / "lengths").write_text(text)
        with pytest.raises(ValueError, match="documents: .*lengths' must have one integer a line"):
            document_lengths(tmp_path / "lengths", 1)
    (tmp_path / "lengths").write_text("")
    with pytest.raises(ValueError, match="documents must have at least 1 tokens in all.*Got 0"):
        document_lengths(tmp_path / "lengths", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_segment_length": 9}, "max_segment_length must be None with documents.*Got 9"),
        (
            {"shared_length": 100},
            "shared_length must be at least 7500 for a document of 60000 tokens, which .* 8192. Got 100",
        ),
    ],
)
def test_documents_and_promises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ringjax.plan(**GIVEN, documents=[60_000, 6000], **options)


def test_the_commands_take_documents(tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text("\n".join(["3000"] * 60))
    result = CliRunner().invoke(app, [*ASKED, "--documents", str(tmp_path / "lengths")])
    assert result.exit_code == 0, result.output
    assert "60 documents of 180000 tokens, at most 3000" in result.stdout and "as they come" in result.stdout
    said = json.loads(CliRunner().invoke(app, [*ASKED, "--documents", "equal:512", "--json"]).stdout)["documents"]
    assert said["before"]["hops_made"] == 8 and said["after"]["imbalance"]["most"] < 1.05
    result = CliRunner().invoke(app, [*ASKED, "--documents", "equal"])
    assert result.exit_code == 2 and "error: --documents must be FILE, " in result.output


def program(**changed: Any) -> Program:
    return Program("v5e:2x4", 8, 16_384, 4, 2, 64, 64, **{"is_causal": True, "segments": True, **changed})


def test_documents_of_a_program_that_is_inspected() -> None:
    """Its own hops and promises as they come; work as the inspector counts it where one document fills a sequence."""
    whole = deal(program(), [16_384] * 2).before
    work = pairs(program())
    assert whole.imbalance.most == pytest.approx(work.sum(1).max() / work.sum(1).mean())
    assert whole.lockstep_imbalance.most == pytest.approx(work.max(0).sum() / work.sum(1).mean())
    for options in ({}, {"max_segment_length": 900}, {"layout": "contiguous", "max_segment_length": 900}):
        asked = program(**options)
        found = deal(asked, [900, 100] * 100)
        assert found.before.hops_made == asked.schedule().num_blocks, options
    packed = program(layout="contiguous", shared_length=found.after.shared_length)
    assert found.after.hops_made == packed.schedule().num_blocks
    several = deal(program(axes=(2, 4), strategy=("ring", "all_to_all")), [900, 100] * 100)
    assert several.before.hops_made == 2 and several.strategy == "ring 2 x all_to_all 4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": False}, "segments must be True with documents.*False"),
        ({"layout": "striped"}, "layout must be 'contiguous' or 'zigzag' with documents. Got 'striped'"),
        ({"max_segment_length": 899}, "max_segment_length must be at least 900, the longest of the documents. Got 899"),
        ({"axes": (2, 4), "shared_length": (1, 2)}, r"shared_length must be the same for all axes.*Got \(1, 2\)"),
    ],
)
def test_programs_without_documents(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deal(program(**options), [900, 100] * 100)
