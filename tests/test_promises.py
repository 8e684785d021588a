"""Promises about documents: results stay what they are, less travels, and data that break them are refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import subprocess
import sys
import time
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import ringjax
from ringjax import layout as layouts
from ringjax import local, sharded
from ringjax import schedule as schedules
from ringjax.deal import Deal
from ringjax.sharing import share

LAYOUTS = ("contiguous", "zigzag", "striped", ringjax.Striped(stripe=4))
RING, HEADS, GATHER = "ring", "all_to_all", "all_gather"


# --- documents that keep a promise -----------------------------------------------------------------------------------


def packed(rng: np.random.Generator, length: int, longest: int) -> np.ndarray:
    """Documents in natural order, one after the other: of one token, of the longest length, and between."""
    lengths = [longest, 1]
    while sum(lengths) < length:
        lengths.append(int(rng.choice([1, longest, rng.integers(1, longest + 1)])))
    rng.shuffle(lengths)
    ids = np.repeat(2 * np.arange(len(lengths)) + 5, lengths)[:length]  # every other id has no token
    return ids.astype(np.int32)


def shared(rng: np.random.Generator, length: int, layout: Any, sizes: tuple[int, ...], first: tuple[int, ...]) -> Any:
    """Ids in natural order: of each shard the first tokens are in documents of all shards, on that axis and within."""
    num_shards = int(np.prod(sizes))
    shards = np.empty((num_shards, length // num_shards), np.int32)
    next_id = 1000
    for rank, shard in enumerate(shards):
        place = np.unravel_index(rank, sizes)
        for index in range(shard.size):
            axis = next((n for n, count in enumerate(first) if index < count), None)
            if axis is None:  # its own documents, of two tokens on average
                next_id += int(rng.integers(0, 2))
                shard[index] = next_id
            else:  # documents of all places on this axis and those within
                outside = int(np.ravel_multi_index(place[:axis], sizes[:axis])) if axis else 0
                shard[index] = 100 * axis + 10 * outside + rng.integers(0, 3)
        next_id += 1
    order = np.asarray(ringjax.ring_positions(length, layout=layout, num_shards=num_shards))
    natural = np.empty(length, np.int32)
    natural[order] = shards.ravel()
    return natural


def extent(ids: np.ndarray) -> int:
    """Places from the first to the last token of the longest document, both counted: pair by pair."""
    at = np.arange(ids.size)
    same = ids[:, None] == ids[None, :]
    return int(np.abs(at[:, None] - at[None, :])[same].max()) + 1


# --- results ---------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    sizes: tuple[int, ...]
    words: tuple[str, ...]
    layout: Any
    feature: str
    longest: int | None = None  # max_segment_length
    first: tuple[int, ...] | None = None  # shared_length
    direction: str = "forward"


FEATURES = {
    "plain": cases.Case("plain", 96, 96, num_heads=2, num_kv_heads=2),
    "causal": cases.Case("causal", 96, 96, is_causal=True, num_heads=4, num_kv_heads=1),
    "window": cases.Case("window", 96, 96, window=(9, 5), num_heads=4, sinks=True),
    "positions": cases.Case("positions", 96, 96, is_causal=True, positions="one", window=(30, 2), soft_cap=2.0),
    "pair": cases.Case("pair", 96, 48, num_heads=2, num_kv_heads=1, sinks=True, is_causal=True),
    "lengths": cases.Case("lengths", 83, 83, num_heads=2, num_kv_heads=2, key_lengths=(83, 40), is_causal=True),
}
# Shards of 96, 48, 32, 24 and 12 tokens; a tile is of 8, or of 1 of shards of 12.
CELLS = (
    Cell((1,), (RING,), "zigzag", "causal", longest=7, first=(0,)),
    Cell((2,), (RING,), "contiguous", "causal", longest=48),
    Cell((2,), (RING,), "zigzag", "plain", first=(20,)),
    Cell((3,), (RING,), "striped", "causal", first=(9,)),
    Cell((3,), (RING,), "contiguous", "lengths", longest=9),
    Cell((4,), (RING,), "contiguous", "positions", longest=24),
    Cell((2,), (RING,), "zigzag", "pair", longest=10),
    Cell((3,), (RING,), "zigzag", "window", longest=70, first=(15,)),
    Cell((4,), (GATHER,), "contiguous", "causal", longest=5, first=(8,)),
    Cell((4,), (HEADS,), "striped", "window", longest=6, first=(3,)),
    Cell((8,), (RING,), "contiguous", "plain", longest=12, direction="both"),
    Cell((8,), (RING,), ringjax.Striped(stripe=4), "positions", longest=5, first=(8,)),
    Cell((8,), (RING,), "zigzag", "window", first=(0,)),
    Cell((2, 2), (RING, RING), "zigzag", "causal", longest=30, first=(5, 12)),
    Cell((2, 4), (RING, RING), "striped", "positions", first=(0, 6), direction="both"),
    Cell((2, 2), (RING, HEADS), "zigzag", "causal", first=(0, 7)),
    Cell((2, 2), (HEADS, RING), "contiguous", "window", longest=25, first=(8, 8)),
    Cell((2, 2), (RING, GATHER), "striped", "causal", first=(0, 4)),
    Cell((2, 2, 2), (GATHER, RING, HEADS), "contiguous", "plain", first=(0, 0, 12)),
)


def problem(cell: Cell) -> tuple[cases.Case, cases.Inputs, dict[str, Any]]:
    """The case, its inputs, and what may be promised of them."""
    case = FEATURES[cell.feature]
    rng = np.random.default_rng(len(repr(cell)))
    inputs = cases.make_inputs(case)
    length = case.query_length
    if cell.first is None:
        rows = [packed(rng, length, cell.longest or length) for _ in range(case.batch)]
    else:
        rows = [shared(rng, length, cell.layout, cell.sizes, cell.first) for _ in range(case.batch)]
    ids: Any = np.stack(rows)
    promised: dict[str, Any] = {}
    if cell.first is not None:
        promised["shared_length"] = cell.first if len(set(cell.first)) > 1 else cell.first[0]
    if cell.first is not None and cell.longest is not None:  # of what is longer the first tokens; the rest are alone
        for row in ids:
            first: dict[int, int] = {}
            for place, one in enumerate(row.tolist()):
                if place - first.setdefault(one, place) >= cell.longest:
                    row[place] = 10_000 + place
    if cell.longest is not None:
        promised["max_segment_length"] = max(extent(row) for row in ids)
        assert promised["max_segment_length"] <= cell.longest
    if case.query_length != case.key_length:
        ids = (ids, ids[:, : case.key_length])
    return case, dataclasses.replace(inputs, masks={**inputs.masks, "segment_ids": ids}), promised


def run(cell: Cell, case: cases.Case, inputs: cases.Inputs, promised: dict[str, Any], as_users: bool = False) -> Any:
    options = dict(
        case.static_options(),
        **promised,
        mesh=cases.mesh_of(cell.sizes),
        axis_name=cases.axes_of(cell.sizes),
        layout=cell.layout,
        return_residual=True,
        config=cases.config_of("xla", strategy=cell.words, direction=cell.direction),
    )

    def program(arrays: Any, masks: Any) -> Any:
        def attend(query: Any, key: Any, value: Any, sinks: Any) -> Any:
            return ringjax.ring_attention(query, key, value, sinks=sinks, **masks, **options)

        return cases.value_and_gradients(attend, arrays)

    compiled = cases.compiled(program, as_users=as_users)
    return cases.run_ring(case, inputs, layout=cell.layout, num_shards=cell.sizes, program=compiled)


def in_ring_order(cell: Cell, case: cases.Case, inputs: cases.Inputs) -> Any:
    return cases.to_ring(inputs, *cases.orders(case, cell.layout, cell.sizes)).masks["segment_ids"]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(str(part) for part in cell if part is not None))
def test_results_are_those_without_it(cell: Cell) -> None:
    case, inputs, promised = problem(cell)
    ringjax.check_segments(in_ring_order(cell, case, inputs), layout=cell.layout, num_shards=cell.sizes, **promised)
    cases.assert_matches(case, inputs, run(cell, case, inputs, promised))


def test_as_users_compile() -> None:
    cell = Cell((2,), (RING,), "zigzag", "causal", longest=50, first=(20,))
    case, inputs, promised = problem(cell)
    cases.assert_matches(case, inputs, run(cell, case, inputs, promised, as_users=True), as_users=True)


@pytest.mark.parametrize(("sizes", "first"), [((4,), 0), ((4,), 3), ((2, 2), (0, 3))], ids=str)
def test_inside_shard_map(sizes: tuple[int, ...], first: Any) -> None:
    """Shards there: nothing is checked, and what travels is the same."""
    axes = cases.axes_of(sizes)
    spec = PartitionSpec(None, axes)
    q, ids = jnp.zeros((1, 32, 1, 8)), jnp.zeros((1, 32), jnp.int32)

    def traced(shared_length: Any) -> Any:
        options = dict(axis_name=axes, config=cases.config_of("xla"), shared_length=shared_length, max_segment_length=9)
        attend = lambda q, ids: ringjax.ring_attention(q, q, q, segment_ids=ids, **options)  # noqa: E731
        inside = jax.shard_map(attend, mesh=cases.mesh_of(sizes), in_specs=(spec, spec), out_specs=spec)
        return jax.make_jaxpr(inside)(q, ids)

    found = {one.shape[2] for one in jaxprs.collectives(traced(first)) if one.dtype == np.float32}
    assert found == (set() if first == 0 else {8})
    with pytest.raises(ValueError, match="shared_length must be at most 8, the tokens of a shard. Got 9"):
        traced(9)


# --- which keys are needed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_key_that_a_document_may_need_is_there(layout: Any, sizes: tuple[int, ...]) -> None:
    """Pair by pair: what arrives at an offset is the hull of what may be needed, in tiles of 8 and whole runs."""
    length, hand, num_shards = 24, layouts.as_layout(layout), int(np.prod(sizes))
    deal = Deal(hand, sizes, (False,) * len(sizes), length)
    run_length = hand.runs(0, length, num_shards).run
    firsts = [(0,) * len(sizes), (1, 7, 9)[-len(sizes) :], (0, 0, 24)[-len(sizes) :], (5, 16, 16)[-len(sizes) :]]
    index = np.arange(length)
    at = np.stack([hand.positions(rank, index, length, num_shards) for rank in range(num_shards)])
    for (left, right), first in itertools.product([(None, None), (4, 0), (30, 10), (None, 3)], firsts):
        truth: dict[tuple[int, ...], tuple[int, int]] = {}
        for own, other in itertools.product(range(num_shards), repeat=2):
            places = np.unravel_index((own, other), sizes)
            offset = tuple(int((there - here) % size) for (here, there), size in zip(places, sizes, strict=True))
            seen = np.ones((length, length), bool)
            seen &= True if left is None else at[other][None] >= at[own][:, None] - left
            seen &= True if right is None else at[other][None] <= at[own][:, None] + right
            apart = [n for n, away in enumerate(offset) if away]
            seen &= (index < first[apart[0]] if apart else index >= 0)[None]
            keys = np.flatnonzero(seen.any(axis=0))
            if keys.size:
                low, high = truth.get(offset, (length, 0))
                truth[offset] = min(low, int(keys[0])), max(high, int(keys[-1]) + 1)
        found = schedules.needed_keys(deal, deal, left, right, first)
        assert found.keys() - {(0,) * len(sizes)} == truth.keys() - {(0,) * len(sizes)}, (left, right, first)
        for offset, (low, high) in truth.items():
            start, stop = found[offset]
            assert start <= low and high <= stop
            if left is not None and right is not None or any(offset):
                assert low - start < 8 + run_length and stop - high < 8


@pytest.mark.parametrize("words", [(GATHER,), (HEADS,), (GATHER, RING), (HEADS, RING), (RING, GATHER)], ids=str)
def test_shards_that_are_merged_travel_whole_or_not_at_all(words: tuple[str, ...]) -> None:
    sizes = (4,) if len(words) == 1 else (2, 2)
    deal = functools.partial(share, layouts.as_layout("zigzag"), sizes, words, 16, 16, None, None)
    none, some = deal((0,) * len(sizes)), deal((4,) * len(sizes))
    assert GATHER not in none.words and GATHER not in some.words, "what is needed is fetched"
    for sharing, keys in ((none, []), (some, [(0, 32) if HEADS in words else (0, 8)])):
        if sharing.schedule is None:
            continue
        hops = [hop.keys or (0, sharing.keys.length) for hop in sharing.schedule.hops if hop.offset]
        assert hops == keys * (sharing.schedule.num_shards - 1)


def test_a_stripe_of_one_token_on_many_ranks_is_not_looked_at_token_by_token() -> None:
    deal = Deal(ringjax.Striped(), (256,), (False,), 4096)
    started = time.process_time()
    needed = schedules.needed_keys(deal, deal, 40, 0, (128,))
    assert time.process_time() - started < 2
    assert needed == {(0,): (0, 4096), **{(offset,): (0, 128) for offset in range(216, 256)}}


# --- bytes -----------------------------------------------------------------------------------------------------------

B, N, K, H = 1, 2, 1, 8


def sent(layout: Any, sizes: tuple[int, ...] = (4,), length: int = 16, **options: Any) -> dict[str, int]:
    """Bytes of each dtype that a device sends, forward and backward."""
    axes, total = cases.axes_of(sizes), length * int(np.prod(sizes))
    arrays = [jax.ShapeDtypeStruct((B, total, heads, H), jnp.bfloat16) for heads in (N, K, K)]

    def both(query: Any, key: Any, value: Any, ids: Any) -> Any:
        attend = functools.partial(
            ringjax.ring_attention, mesh=cases.mesh_of(sizes), axis_name=axes, layout=layout, segment_ids=ids,
            config=cases.config_of("xla"), **options,
        )  # fmt: skip
        out, pull = jax.vjp(attend, query, key, value)
        return pull(out)

    traced = jax.make_jaxpr(both)(*arrays, jax.ShapeDtypeStruct((B, total), jnp.int32))
    count = {"bfloat16": 0, "float32": 0, "int32": 0}
    for one in jaxprs.collectives(traced):
        assert one.primitive.startswith("ppermute")
        count[one.dtype.name] += one.size * one.times * one.dtype.itemsize
    return count


def keys_sent(keys: int, home: int) -> dict[str, int]:
    """So many keys, times hops, in forward; in backward again, and their sums on so many more on the way home."""
    return {"bfloat16": 2 * 2 * keys * K * H * 2, "int32": 2 * keys * 4, "float32": 2 * home * K * H * 4}


@pytest.mark.parametrize(("longest", "is_causal"), [(1, False), (2, True), (9, False), (17, True), (48, True)])
def test_only_what_the_longest_document_needs_travels(longest: int, is_causal: bool) -> None:
    """Of neighbours in the sequence, in tiles of 8: longest - 1 tokens before, and after unless it is causal."""
    sides = -(-(longest - 1) // 8) * 8 * (1 if is_causal else 2)
    found = sent("contiguous", (8,), max_segment_length=longest, is_causal=is_causal)
    assert found == keys_sent(sides, home=sides)


@pytest.mark.parametrize(("layout", "longest"), [("zigzag", 20), ("striped", 3)])
def test_it_travels_as_under_a_window(layout: str, longest: int) -> None:
    far = longest - 1
    assert sent(layout, max_segment_length=longest) == sent(layout, local_window_size=(far, far))


def test_a_window_and_documents_leave_out_what_either_does() -> None:
    both = sent("contiguous", max_segment_length=9, local_window_size=(30, 2), is_causal=False)
    assert both == keys_sent(8 + 8, home=8 + 8)
    given = {"positions": jnp.arange(64), "is_causal": True, "max_segment_length": 9}
    found = sent("contiguous", **given)  # both sides: what is causal in positions is unknown in places
    assert found["bfloat16"] == keys_sent(8 + 8, home=8 + 8)["bfloat16"]


@pytest.mark.parametrize(
    ("layout", "first"),
    [("contiguous", 1), ("contiguous", 9), ("zigzag", 8), ("striped", 0), ("striped", 8)],
)
def test_only_the_first_tokens_of_a_shard_travel(layout: str, first: int) -> None:
    keys = -(-first // 8) * 8
    # Three hops, and the sums move on twice and then home; whole blocks carry those of the own one along, and then come
    # home in the dtype of the keys.
    wanted = keys_sent(3 * keys, home=3 * keys)
    if keys == 16:
        wanted["bfloat16"] += 2 * keys * K * H * 2
    assert sent(layout, shared_length=first) == wanted


def test_fewer_first_tokens_pass_an_outer_axis() -> None:
    found = sent("zigzag", (2, 2), shared_length=(8, 16))
    # Within the own place the whole block, once; from the other the first tile, over the outer axis and once within.
    assert found["bfloat16"] == keys_sent(16 + 8 + 8, 0)["bfloat16"]
    assert sent("zigzag", (2, 2), shared_length=(0, 8)) == keys_sent(8, home=8)


# --- broken promises -------------------------------------------------------------------------------------------------


def attention(ids: Any, layout: str = "contiguous", **options: Any) -> Any:
    q = np.zeros((2, 16, 1, 8), np.float32)
    k = q[:, : np.shape(ids[1])[1]] if isinstance(ids, tuple) else q
    return ringjax.ring_attention(
        q, k, k, mesh=cases.mesh_of(4), layout=layout, segment_ids=ids, config=cases.config_of("xla"), **options
    )


IDS = np.stack([np.arange(16), np.array([0, 0, 0, 3, 3, 3, 3, 3, 3, 9, 9, 11, 12, 12, 12, 12])]).astype(np.int32)
BROKEN = {
    "too long": (
        dict(ids=IDS, max_segment_length=5),
        r"segment_ids must .* max_segment_length = 5 or more .*Got id 3 of row 1 at places 3 and 8, 5 apart\.",
    ),
    "of query and key": (
        dict(ids=(IDS, IDS[:, :8]), max_segment_length=5),
        r"segment_ids must .*Got id 3 of row 1 at places 3 and 8, 5 apart\.",
    ),
    "beyond the first": (
        dict(ids=IDS, shared_length=2),
        r"segment_ids must .* shared_length = 2 tokens .*Got id 3 of row 1 in shards 0 to 2, and at token 3 of shard 0",
    ),
    "in the layout's order": (
        dict(
            ids=np.asarray(ringjax.to_ring_order(IDS, layout="zigzag", num_shards=4)), layout="zigzag", shared_length=3
        ),
        r"Got id 9 of row 1 in shards 2 to 3, and at token 3 of shard 3\.",
    ),
    "a promise of no segments": (dict(ids=None, max_segment_length=3), "max_segment_length must be None without .* 3"),
    "a share of no segments": (dict(ids=None, shared_length=3), "shared_length must be None without segment_ids.* 3"),
    "length of zero": (dict(ids=IDS, max_segment_length=0), "max_segment_length must be a positive integer.*Got 0"),
    "length not whole": (dict(ids=IDS, max_segment_length=2.0), "max_segment_length must be .*integer.*Got 2.0"),
    "negative share": (dict(ids=IDS, shared_length=-1), "shared_length must be a non-negative integer.*Got -1"),
    "a share too many": (dict(ids=IDS, shared_length=(1, 2)), r"shared_length must be .* or 1, one for each.*\(1, 2\)"),
    "more than a shard": (dict(ids=IDS, shared_length=5), "shared_length must be at most 4, .*Got 5"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_said_with_its_numbers(name: str) -> None:
    given, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        attention(**given)


def test_shares_grow_inwards() -> None:
    with pytest.raises(ValueError, match=r"shared_length must not be smaller for an inner axis .*Got \(3, 2\)"):
        ringjax.check_segments(IDS, num_shards=(2, 2), shared_length=(3, 2))
    with pytest.raises(
        ValueError, match=r"shared_length = 1 tokens .* along axis 0 .*Got id 3 of row 1 in shards 0 to 2"
    ):
        ringjax.check_segments(IDS, num_shards=(2, 2), shared_length=(1, 4))


def test_arguments_of_the_check_are_named() -> None:
    for given, message in (
        (dict(num_shards=0), "num_shards must be a positive integer, .*Got 0"),
        (dict(num_shards=()), r"num_shards must be .*Got \(\)"),
        (dict(layout="spiral"), "layout must be one of .*'spiral'"),
        (dict(segment_ids=IDS[0]), r"segment_ids must have shape \[B, T\].*\(16,\)"),
        (dict(segment_ids=(IDS, IDS[:1])), r"segment_ids must have shape .* one batch size.*\(1, 16\)"),
        (dict(segment_ids=(IDS,) * 3), "segment_ids must be one array or a pair.*3"),
        (dict(segment_ids=IDS / 2), "segment_ids must have an integer dtype.*float64"),
        (dict(shared_length=5), "shared_length must be at most 4.*5"),
    ):
        with pytest.raises(ValueError, match=message):
            ringjax.check_segments(**{"segment_ids": IDS, "num_shards": 4, **given})
    with pytest.raises(ValueError, match="segment_ids must be .* outside jit.*traced"):
        jax.jit(lambda ids: ringjax.check_segments(ids, num_shards=4, max_segment_length=3))(IDS)


def test_what_keeps_a_promise_passes_and_absent_tokens_make_none() -> None:
    ringjax.check_segments(IDS, num_shards=4, max_segment_length=6, shared_length=4)
    ringjax.check_segments(IDS[:, :0], num_shards=4, max_segment_length=1)
    padded = np.where(np.arange(16) < 9, np.arange(16), 0).astype(np.int32)[None].repeat(2, 0)
    lengths = jnp.full((2,), 9)
    promised: Any = dict(max_segment_length=1, shared_length=0)
    with pytest.raises(ValueError, match="Got id 0 of row 0 at places 0 and 15"):
        attention(padded, **promised)
    with pytest.raises(ValueError, match="Got id 0 of row 0 at places 0 and 15"):
        attention(padded, key_value_seq_lengths=lengths, **promised)
    attention(padded, query_seq_lengths=lengths, key_value_seq_lengths=lengths, **promised)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_check_is_that_of_every_pair_of_tokens(layout: Any) -> None:
    """Random ids, lengths that do not divide, several axes: what the loosest promise is that holds."""
    rng = np.random.default_rng(1)
    hand = layouts.as_layout(layout)
    for sizes, length, values in itertools.product([(3,), (2, 2)], [24, 45], [2, 12, 60]):
        num_shards = int(np.prod(sizes))
        natural = np.sort(rng.integers(0, values, length)) if values != 60 else rng.integers(0, values, length)
        total = layouts.padded_length(length, hand, num_shards)
        where = {
            int(hand.positions(rank, index, total // num_shards, num_shards)): (rank, index)
            for rank in range(num_shards)
            for index in range(total // num_shards)
        }
        longest, first = 1, [0] * len(sizes)
        for a, b in itertools.product(range(length), repeat=2):
            if natural[a] != natural[b]:
                continue
            longest = max(longest, abs(a - b) + 1)
            places = np.unravel_index((where[a][0], where[b][0]), sizes)
            apart = [n for n, (one, other) in enumerate(places) if one != other]
            if apart:
                same = natural == natural[a]
                furthest = max(where[int(t)][1] for t in np.flatnonzero(same))
                first[apart[0]] = max(first[apart[0]], furthest + 1)
        first = np.maximum.accumulate(first).tolist()
        ids = natural[np.asarray(ringjax.ring_positions(length, layout=layout, num_shards=num_shards))][None]
        check = functools.partial(ringjax.check_segments, ids, layout=layout, num_shards=sizes)
        check(max_segment_length=longest, shared_length=tuple(first))
        if longest > 1:
            with pytest.raises(ValueError, match=f"Got id .* {longest - 1} apart"):
                check(max_segment_length=longest - 1)
        for n in range(len(sizes)):
            if first[n] > (first[n - 1] if n else 0):
                with pytest.raises(
                    ValueError, match=f"at token {first[n] - 1} of" if values == 2 else "shared_length = "
                ):
                    check(shared_length=(*first[:n], first[n] - 1, *first[n + 1 :]))


def test_a_million_tokens_are_checked_fast() -> None:
    ids = packed(np.random.default_rng(0), 2**20, 5000)[None].repeat(2, 0)
    dealt = ringjax.to_ring_order(ids, layout="zigzag", num_shards=64)
    started = time.process_time()
    ringjax.check_segments(dealt, layout="zigzag", num_shards=64, max_segment_length=5000)
    assert time.process_time() - started < 2


def test_under_jit_nothing_is_known_unless_jax_is_to_check() -> None:
    """In an interpreter of its own: what fails in a callback is told again when that ends."""
    code = """
import jax, numpy as np, ringjax
jax.config.update("jax_num_cpu_devices", 2)
mesh, q = jax.make_mesh((2,), ("sp",)), np.zeros((1, 8, 1, 8), np.float32)
config = ringjax.RingConfig(implementation="xla")

@jax.jit
def attend(q, ids):
    return ringjax.ring_attention(q, q, q, mesh=mesh, segment_ids=ids, max_segment_length=4, config=config)

kept, broken = (np.arange(8)[None] // n for n in (4, 5))
jax.block_until_ready(attend(q, broken))
try:  # constants can be seen
    jax.jit(lambda q: attend.__wrapped__(q, broken))(q)
except ValueError as error:
    print(error)
jax.clear_caches()
jax.config.update("jax_enable_checks", True)
jax.block_until_ready(attend(q, kept))
jax.effects_barrier()
print("kept")
try:
    attend(q, broken)
    jax.effects_barrier()
except Exception as error:
    print(str(error).strip().splitlines()[-1])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = [line for line in result.stdout.splitlines() if line]
    assert len(said) == 3, result.stderr
    assert said[1] == "kept"
    for line in (said[0], said[2]):
        assert "Got id 0 of row 0 at places 0 and 4, 4 apart." in line


# --- layers ----------------------------------------------------------------------------------------------------------


@functools.cache
def layers() -> dict[str, Any]:
    """What takes segment ids, as functions of ids and promises; tokens of 4 shards of 4."""
    mesh, config = cases.mesh_of(4), cases.config_of("xla")
    sizes = dict(num_heads=2, num_kv_heads=1, head_dim=8, layout="zigzag")
    x, tokens = jnp.zeros((2, 16, 8)), jnp.zeros((2, 16), jnp.int32)
    attention = ringjax.nnx.RingAttention(in_features=8, mesh=mesh, config=config, rngs=nnx.Rngs(0), **sizes)
    linen = ringjax.linen.RingAttention(mesh=mesh, config=config, **sizes)
    weights = jax.eval_shape(linen.init, jax.random.key(0), x)
    decoder = ringjax.nnx.Decoder(
        ringjax.nnx.DecoderConfig(vocab_size=16, embed_dim=8, num_layers=1, mlp_dim=16, ring=config, **sizes),
        mesh=mesh,
        rngs=nnx.Rngs(0),
    )

    def as_function(ids: Any, **promised: Any) -> Any:
        options = dict(mesh=mesh, layout="zigzag", config=config, segment_ids=ids, **promised)
        return ringjax.attention_fn(**options)(*[x.reshape(2, 16, 1, 8)] * 3)

    return {
        "nnx": lambda ids, **promised: attention(x, segment_ids=ids, **promised),
        "linen": lambda ids, **promised: jax.eval_shape(
            lambda weights: linen.apply(weights, x, segment_ids=ids, **promised), weights
        ),
        "logits": lambda ids, **promised: decoder(tokens, segment_ids=ids, **promised),
        "loss": lambda ids, **promised: decoder.loss(tokens, tokens, segment_ids=ids, **promised),
        "token_losses": lambda ids, **promised: decoder.token_losses(tokens, tokens, segment_ids=ids, **promised),
        "attention_fn": as_function,
    }


@pytest.mark.parametrize("name", ["nnx", "linen", "logits", "loss", "token_losses", "attention_fn"])
def test_layers_pass_promises_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, seen = layers()[name], []
    sharded._compiled.cache_clear()  # programs that are traced already
    monkeypatch.setattr(local, "share", lambda *given: seen.append(given[-3:]) or share(*given))
    jax.eval_shape(functools.partial(call, max_segment_length=6, shared_length=3), IDS)
    causal = name in ("logits", "loss", "token_losses")
    assert seen and set(seen) == {(5, 0 if causal else 5, (3,))}
    dealt = ringjax.to_ring_order(IDS, layout="zigzag", num_shards=4)
    with pytest.raises(ValueError, match="Got id 9 of row 1 in shards 2 to 3, and at token 3 of shard 3"):
        call(dealt, shared_length=3)
