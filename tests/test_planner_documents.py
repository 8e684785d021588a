"""Packed documents in plans: what a promise spares, and what is refused."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import ringjax
from ringjax.cli import app
from ringjax.pairs import attended_pairs
from ringjax.planner import costs

GIVEN: dict[str, Any] = {"model": "8,2,64,4", "seq_len": 65_536, "devices": "h100:8"}


def best(plan: ringjax.Plan, *words: str) -> Any:
    return next(c for c in plan.candidates if c.way.words == words)


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
    # Seven hops, there and again in backward, with ids and positions; the sums of the own block move with a whole ring.
    assert ring.cost.wire_bytes["ring"] == shared * (7 * 2 * (key * 2 + 8) + (8 if shared == 8192 else 7) * key * 4)
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
    for which in set(sequence.document) - {-1}:
        places = np.flatnonzero(sequence.document == which)
        places = places[np.argsort(sequence.offset[places])]
        alone = jax.nn.dot_product_attention(*(x[:, places] for x in (query, key, value)), is_causal=True)
        assert jnp.abs(names["out"][:, places] - alone).max() < 1e-5


def best_code(plan: ringjax.Plan) -> str:
    from ringjax.planner import words

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
