"""Tiles to visit: kinds and ranges against the pairs in them, and the list of tiles against a stable sort."""

from __future__ import annotations

from typing import Any

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from test_mask import BATCH, BOUNDS, LAYOUTS, SHARDS, S, T, any_mask, as_int, expected, make, traced

from ringjax.kernels import visits
from ringjax.layout import Contiguous
from ringjax.mask import Mask, Tokens

# Divides both lengths, neither, one of them.
BLOCKS = ((3, 5), (5, 6), (4, 3))


def tiles_of(allowed: np.ndarray, block_q: int, block_kv: int) -> dict[tuple[int, int, int], np.ndarray]:
    """The pairs of each tile, ragged ones cut off."""
    num_q, num_kv = -(-T // block_q), -(-S // block_kv)
    return {
        (b, i, j): allowed[b, i * block_q : (i + 1) * block_q, j * block_kv : (j + 1) * block_kv]
        for b, i, j in np.ndindex(BATCH, num_q, num_kv)
    }


@hypothesis.settings(max_examples=40)
@hypothesis.given(any_mask, st.sampled_from(BLOCKS))
def test_tile_kinds_never_lie(mask: Mask, blocks: tuple[int, int]) -> None:
    kinds = np.asarray(visits.tile_kinds(mask, T, S, *blocks))
    for (b, i, j), tile in tiles_of(expected(mask), *blocks).items():
        kind = kinds[b if kinds.shape[0] > 1 else 0, i, j]
        whole = tile.shape == blocks
        assert kind != visits.FULL or (tile.all() and whole)
        assert kind != visits.EMPTY or not tile.any()


def visited(plan: visits.Visits, b: int, row: int) -> tuple[list[int], list[int]]:
    """Columns of the FULL and of the PARTIAL tiles of a row."""
    b = b if plan.full.shape[0] > 1 else 0
    full, visit = int(plan.full[b, row]), int(plan.visit[b, row])
    if plan.order is not None:
        columns = np.asarray(plan.order[b, row, :visit]).tolist()
    elif plan.full_start is None:
        columns = [n + (0 if plan.start is None else int(plan.start[b, row])) for n in range(visit)]
    else:
        assert plan.start is not None
        t = jnp.arange(visit, dtype=jnp.int32)
        columns = visits.nth_in_range(t, *(x[b, row] for x in (plan.full, plan.start, plan.full_start))).tolist()
    return columns[:full], columns[full:]


@hypothesis.settings(max_examples=40)
@hypothesis.given(any_mask, st.sampled_from(BLOCKS), st.integers(1, 9))
def test_parts_visit_together_what_the_row_does(mask: Mask, blocks: tuple[int, int], parts: int) -> None:
    columns = -(-T // blocks[0])
    plan = visits.plan_visits(mask, T, S, *blocks, rows="keys")
    if plan is None:
        plan = visits.all_visits(-(-S // blocks[1]), columns)
    rows = plan.full.shape[1]
    cut = visits.in_parts(plan, columns, parts)
    assert cut.full.shape == cut.visit.shape == (plan.full.shape[0], parts * rows)
    for b, row in np.ndindex(*plan.full.shape):
        found = [visited(cut, b, part * rows + row) for part in range(parts)]
        assert all(len(full) + len(partial) <= -(-columns // parts) for full, partial in found)
        for whole, pieces in zip(visited(plan, b, row), zip(*found, strict=True), strict=True):
            assert sorted(whole) == sorted(column for piece in pieces for column in piece)


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=9))
def test_longest_first_counts_every_row_once_and_equals_in_turn(kinds: list[list[int]]) -> None:
    plan = visits.list_visits(jnp.asarray([kinds, kinds[::-1]], jnp.int32))
    ordered = visits.longest_first(plan)
    assert ordered.row is not None
    for b in range(2):
        row = np.asarray(ordered.row[b])
        expected = sorted(range(len(kinds)), key=lambda n: -int(plan.visit[b, n]))
        np.testing.assert_array_equal(row, expected)
        np.testing.assert_array_equal(ordered.visit[b], plan.visit[b, row])
        np.testing.assert_array_equal(ordered.full[b], plan.full[b, row])
    assert ordered.order is plan.order


@hypothesis.settings(max_examples=40)
@hypothesis.given(any_mask, st.sampled_from(BLOCKS), st.sampled_from(("queries", "keys")))
def test_rows_visit_every_pair_once_and_full_tiles_are_full(mask: Mask, blocks: tuple[int, int], rows: str) -> None:
    plan = visits.plan_visits(mask, T, S, *blocks, rows=rows)
    tiles = tiles_of(expected(mask), *blocks)
    if plan is None:
        assert all(tile.all() for tile in tiles.values())
        return
    assert (plan.order is None) == (not mask.has_vectors)
    by_queries = rows == "queries"
    for b in range(BATCH):
        for row in range(plan.full.shape[1]):
            full, partial = visited(plan, b, row)
            assert len({*full, *partial}) == len(full) + len(partial)
            for (at, i, j), tile in tiles.items():
                own, column = (i, j) if by_queries else (j, i)
                if (at, own) != (b, row):
                    continue
                # Rows of queries that do not exist are not written; keys add to dq, and absent queries write zeros.
                ragged_rows = tile.shape[0] < blocks[0]
                whole = tile.shape[1] == blocks[1] and (by_queries or not ragged_rows)
                assert column not in full or (tile.all() and whole)
                assert column in (*full, *partial) or not tile.any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bounds", BOUNDS[1:])
def test_a_range_visits_just_the_tiles_that_kinds_tell(layout: Any, bounds: tuple[Any, Any]) -> None:
    for q_rank, kv_rank in np.ndindex(SHARDS, SHARDS):
        mask = Mask(
            queries=Tokens(positions=traced(layout.runs(q_rank, T, SHARDS))),
            keys=Tokens(positions=traced(layout.runs(kv_rank, S, SHARDS))),
            left=bounds[0],
            right=bounds[1],
        )
        kinds = np.asarray(visits.tile_kinds(mask, T, S, 3, 5))[0]
        for rows, by_row in (("queries", kinds), ("keys", kinds.T)):
            plan = visits.plan_visits(mask, T, S, 3, 5, rows=rows)
            assert plan is not None
            for row, kind in enumerate(by_row):
                full, partial = visited(plan, 0, row)
                assert full == np.flatnonzero(kind == visits.FULL).tolist()
                assert partial == np.flatnonzero(kind == visits.PARTIAL).tolist()


@pytest.mark.parametrize("bounds", BOUNDS)
def test_tile_kinds_are_exact_on_consecutive_positions(bounds: tuple[Any, Any]) -> None:
    # The case that pays: nothing that a contiguous shard could skip is visited, nothing full is masked.
    shard = lambda rank, length: Tokens(positions=traced(Contiguous().runs(rank, length, 2)))  # noqa: E731
    mask = Mask(queries=shard(1, T), keys=shard(0, S), left=bounds[0], right=bounds[1])
    kinds = np.asarray(visits.tile_kinds(mask, T, S, 3, 5))[0]
    tiles = expected(mask)[0].reshape(T // 3, 3, S // 5, 5)
    np.testing.assert_array_equal(kinds == visits.FULL, tiles.all(axis=(1, 3)))
    np.testing.assert_array_equal(kinds == visits.EMPTY, ~tiles.any(axis=(1, 3)))


def test_absent_queries_of_a_visited_tile_make_it_partial() -> None:
    # Forward writes 0 for them, so they may not be in a FULL tile; what is beyond the shard is not written at all.
    mask = Mask(queries=Tokens(length=as_int([7])))
    plan = visits.plan_visits(mask, T, S, 4, 5, rows="queries")
    assert plan is not None
    assert plan.full.tolist() == [[4, 0, 0]]
    assert plan.visit.tolist() == [[4, 4, 0]]
    assert visits.plan_visits(Mask(), 10, S, 4, 5, rows="queries") is None
    ragged = visits.plan_visits(Mask(), 10, S, 4, 5, rows="keys")
    assert ragged is not None
    assert ragged.full.tolist() == [[2] * 4]
    assert ragged.visit.tolist() == [[3] * 4]


def test_packed_segments_skip_other_documents() -> None:
    ids = Tokens(segments=jnp.repeat(jnp.arange(4, dtype=jnp.int32), 6)[None])
    kinds = np.asarray(visits.tile_kinds(Mask(queries=ids, keys=ids), 24, 24, 3, 3))[0]
    same = np.arange(8)[:, None] // 2 == np.arange(8)[None, :] // 2
    np.testing.assert_array_equal(kinds, np.where(same, visits.FULL, visits.EMPTY))


@pytest.mark.parametrize("columns", (1, 2, 3, 16, 17, 31, 32, 33, 64, 100))
def test_the_list_of_any_kinds_is_their_stable_sort(columns: int) -> None:
    # Up to 32 tiles a row is made into words, beyond it is sorted: both must give one order, EMPTY tiles included.
    rng = np.random.default_rng(columns)
    kinds = rng.integers(0, 3, (2, 40, columns)).astype(np.int32)
    kinds[0, :3] = np.arange(3)[:, None]  # rows of one kind
    kinds[0, 3:6] = 2 - np.sort(kinds[0, 3:6], axis=-1)
    kinds[1, :20, 1:] = kinds[1, :20, :1]  # one tile unlike all others
    kinds[1, np.arange(20), rng.integers(0, columns, 20)] = rng.integers(0, 3, 20)
    full, visit, order, *_ = visits.list_visits(jnp.asarray(kinds))
    assert order is not None
    assert order.dtype == full.dtype == visit.dtype == jnp.int32
    by_kind = [[j for kind in range(3) for j in range(columns) if row[j] == kind] for row in kinds.reshape(-1, columns)]
    np.testing.assert_array_equal(order, np.array(by_kind).reshape(kinds.shape))
    np.testing.assert_array_equal(full, (kinds == visits.FULL).sum(-1))
    np.testing.assert_array_equal(visit, (kinds != visits.EMPTY).sum(-1))


def test_every_kind_of_mask_is_met() -> None:
    made = [make(np.random.default_rng(seed), (3, 0), "layout") for seed in range(30)]
    assert {mask.has_vectors for mask in made} == {True, False}
    assert {mask.keys.length is None for mask in made} == {True, False}
