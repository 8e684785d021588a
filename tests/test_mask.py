"""Masks: the predicate against the oracle's, tiles against their own pairs, and the block map as a list to visit."""

from __future__ import annotations

from typing import Any

import hypothesis
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import strategies as st

from ringjax import mask as masks

# One set of shapes, so that the many examples below share their compiled operations.
BATCH, T, S, BLOCK_Q, BLOCK_KV = 2, 12, 20, 3, 5
BOUNDS = ((None, None), (None, 0), (0, 0), (4, 0), (2, 3), (None, 2), (1, None))


def make(rng: np.random.Generator, left: Any, right: Any, kind: str) -> masks.Mask:
    """Sorted positions and packed segments, as in training, or arbitrary ones."""
    positions = [rng.integers(-5, 25, (BATCH, n)) for n in (T, S)]
    segments = [rng.integers(0, 3, (BATCH, n)) for n in (T, S)]
    if kind == "sorted":
        positions, segments = [np.sort(x) for x in positions], [np.sort(x) for x in segments]
    as_int = lambda pair: [jnp.asarray(x, jnp.int32) for x in pair]  # noqa: E731
    bounded = left is not None or right is not None
    return masks.Mask(
        *(as_int(positions) if bounded else (None, None)),
        *(as_int(segments) if rng.random() < 0.7 else (None, None)),
        left=left,
        right=right,
    )


def expected(mask: masks.Mask) -> np.ndarray:
    pair = lambda q, k: None if q is None else (np.asarray(q), np.asarray(k))  # noqa: E731
    positions = pair(mask.q_positions, mask.kv_positions)
    far = 10**6
    window = (far if mask.left is None else mask.left, far if mask.right is None else mask.right)
    return oracle.attends(
        BATCH,
        T,
        S,
        local_window_size=None if positions is None else window,
        positions=positions,
        segment_ids=pair(mask.q_segments, mask.kv_segments),
    )


any_mask = st.builds(
    lambda seed, bounds, kind: make(np.random.default_rng(seed), *bounds, kind),
    st.integers(0, 2**20),
    st.sampled_from(BOUNDS),
    st.sampled_from(("sorted", "arbitrary")),
)


@hypothesis.settings(max_examples=60)
@hypothesis.given(any_mask)
def test_predicate_is_the_oracle(mask: masks.Mask) -> None:
    got = np.broadcast_to(np.asarray(mask.predicate()), (BATCH, T, S))
    np.testing.assert_array_equal(got, expected(mask))


@hypothesis.settings(max_examples=60)
@hypothesis.given(any_mask)
def test_tile_kinds_never_lie(mask: masks.Mask) -> None:
    kinds = np.asarray(masks.tile_kinds(mask, BLOCK_Q, BLOCK_KV))
    kinds = np.broadcast_to(kinds, (BATCH, T // BLOCK_Q, S // BLOCK_KV))
    allowed = expected(mask)
    for b, i, j in np.ndindex(*kinds.shape):
        tile = allowed[b, i * BLOCK_Q : (i + 1) * BLOCK_Q, j * BLOCK_KV : (j + 1) * BLOCK_KV]
        if kinds[b, i, j] == masks.FULL:
            assert tile.all()
        if kinds[b, i, j] == masks.EMPTY:
            assert not tile.any()


@pytest.mark.parametrize("bounds", BOUNDS)
def test_tile_kinds_are_exact_on_consecutive_positions(bounds: tuple[Any, Any]) -> None:
    # The case that pays: nothing that a contiguous shard could skip is visited, nothing full is masked.
    at_q, at_k = jnp.arange(T, dtype=jnp.int32)[None] + 4, jnp.arange(S, dtype=jnp.int32)[None]
    mask = masks.Mask(at_q, at_k, None, None, *bounds)
    kinds = np.asarray(masks.tile_kinds(mask, BLOCK_Q, BLOCK_KV))
    kinds = np.broadcast_to(kinds, (1, T // BLOCK_Q, S // BLOCK_KV))[0]
    tiles = expected(mask)[0].reshape(T // BLOCK_Q, BLOCK_Q, S // BLOCK_KV, BLOCK_KV)
    np.testing.assert_array_equal(kinds == masks.FULL, tiles.all(axis=(1, 3)))
    np.testing.assert_array_equal(kinds == masks.EMPTY, ~tiles.any(axis=(1, 3)))


def test_packed_segments_skip_other_documents() -> None:
    ids = jnp.repeat(jnp.arange(4, dtype=jnp.int32), 6)[None]
    kinds = np.asarray(masks.tile_kinds(masks.Mask(None, None, ids, ids), 3, 3))[0]
    same = np.arange(8)[:, None] // 2 == np.arange(8)[None, :] // 2
    np.testing.assert_array_equal(kinds, np.where(same, masks.FULL, masks.EMPTY))


@hypothesis.settings(max_examples=30)
@hypothesis.given(any_mask, st.booleans())
def test_block_map_lists_full_then_partial_then_empty(mask: masks.Mask, transpose: bool) -> None:
    kinds = np.asarray(masks.tile_kinds(mask, BLOCK_Q, BLOCK_KV))
    kinds = np.swapaxes(kinds, 1, 2) if transpose else kinds
    order, full, visit = (np.asarray(x) for x in masks.block_map(jnp.asarray(kinds)))
    for b, row in np.ndindex(*kinds.shape[:2]):
        listed = order[b, row]
        assert sorted(listed.tolist()) == list(range(kinds.shape[2]))
        full_tiles = listed[: full[b, row]].tolist()
        partial_tiles = listed[full[b, row] : visit[b, row]].tolist()
        # In ascending order, so that sums are taken in one order whatever the mask.
        assert full_tiles == np.flatnonzero(kinds[b, row] == masks.FULL).tolist()
        assert partial_tiles == np.flatnonzero(kinds[b, row] == masks.PARTIAL).tolist()


@pytest.mark.parametrize("columns", (1, 2, 3, 16, 17, 31, 32, 33, 64, 100))
def test_block_map_of_any_kinds_is_their_stable_sort(columns: int) -> None:
    # Up to 32 tiles a row is made into words, beyond it is sorted: both must give one order, EMPTY tiles included.
    rng = np.random.default_rng(columns)
    kinds = rng.integers(0, 3, (2, 40, columns)).astype(np.int32)
    kinds[0, :3] = np.arange(3)[:, None]  # rows of one kind
    kinds[0, 3:6] = 2 - np.sort(kinds[0, 3:6], axis=-1)
    kinds[1, :20, 1:] = kinds[1, :20, :1]  # one tile unlike all others
    kinds[1, np.arange(20), rng.integers(0, columns, 20)] = rng.integers(0, 3, 20)
    order, full, visit = masks.block_map(jnp.asarray(kinds))
    assert order.dtype == full.dtype == visit.dtype == jnp.int32
    by_kind = [[j for kind in range(3) for j in range(columns) if row[j] == kind] for row in kinds.reshape(-1, columns)]
    np.testing.assert_array_equal(order, np.array(by_kind).reshape(kinds.shape))
    np.testing.assert_array_equal(full, (kinds == masks.FULL).sum(-1))
    np.testing.assert_array_equal(visit, (kinds != masks.EMPTY).sum(-1))


@hypothesis.settings(max_examples=30)
@hypothesis.given(any_mask, st.integers(0, 1), st.integers(0, 3), st.integers(0, 3))
def test_a_slice_of_the_mask_is_the_mask_of_a_slice(mask: masks.Mask, batch: int, i: int, j: int) -> None:
    tile = mask.queries(batch, i * BLOCK_Q, BLOCK_Q).keys(batch, j * BLOCK_KV, BLOCK_KV)
    got = np.broadcast_to(np.asarray(tile.predicate()), (1, BLOCK_Q, BLOCK_KV))[0]
    rows, columns = slice(i * BLOCK_Q, (i + 1) * BLOCK_Q), slice(j * BLOCK_KV, (j + 1) * BLOCK_KV)
    np.testing.assert_array_equal(got, expected(mask)[batch, rows, columns])


def test_a_mask_shared_by_the_batch_is_sliced_from_its_only_row() -> None:
    at = jnp.arange(8, dtype=jnp.int32)[None]
    tile = masks.Mask(at, at, None, None, None, 0).queries(1, 4, 4).keys(1, 4, 4)
    np.testing.assert_array_equal(tile.predicate()[0], np.tri(4, dtype=bool))


def test_absent_tokens_attend_nobody_not_even_each_other() -> None:
    ids = jnp.zeros((1, 4), jnp.int32)
    present = jnp.array([[True, True, False, False]])
    mask = masks.Mask(
        None,
        None,
        masks.exclude(ids, present, masks.NO_QUERY),
        masks.exclude(ids, present, masks.NO_KEY),
    )
    want = np.zeros((4, 4), bool)
    want[:2, :2] = True
    np.testing.assert_array_equal(mask.predicate()[0], want)


def test_nothing_to_mask_is_known_at_trace_time() -> None:
    at = jnp.zeros((1, 4), jnp.int32)
    assert masks.Mask(None, None, None, None).is_full
    assert not masks.Mask(at, at, None, None, right=0).is_full
    assert not masks.Mask(None, None, at, at).is_full
