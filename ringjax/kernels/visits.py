"""Which tiles a kernel visits, and in which order: FULL ones without a predicate, PARTIAL ones with it, EMPTY ones not.

Rows are tiles of queries (forward) or of keys (backward), columns tiles of the other side. Where positions are three
integers and nothing else is a vector, a row's tiles are a range, by arithmetic; segments and positions given as arrays
take a list, from minima and maxima of each tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from ..layout import Runs
from ..mask import Mask, Tokens, window

FULL, PARTIAL, EMPTY = 0, 1, 2
_HIGHEST = 2**31 - 1


class Visits(NamedTuple):
    """For every row of tiles those to visit: ``full`` FULL ones first, then PARTIAL ones, ``visit`` in all.

    They are a list (``order``), or a range from ``start`` on in which the FULL ones, from ``full_start`` on, are in a
    row. What is None is absent: without ``full_start`` all of the range are FULL. Of lists, counts may be in another
    order than the rows of ``order``: the n-th are then those of ``row[n]``.
    """

    full: Int32[Array, "B1 rows"]
    visit: Int32[Array, "B1 rows"]
    order: Int32[Array, "B1 rows columns"] | None = None
    start: Int32[Array, "B1 rows"] | None = None
    full_start: Int32[Array, "B1 rows"] | None = None
    row: Int32[Array, "B1 rows"] | None = None


def nth_in_range(t: Array, full: Array, start: Array, full_start: Array) -> Array:
    """The column of the t-th visit of a row whose tiles are a range."""
    after = start + t - full
    return jnp.where(t < full, full_start + t, after + jnp.where(after >= full_start, full, jnp.int32(0)))


def plan_visits(mask: Mask, q_length: int, kv_length: int, block_q: int, block_kv: int, *, rows: str) -> Visits | None:
    """What each row visits; None: every column, all FULL. ``rows``: tiles of "queries" or of "keys".

    A tile that reaches beyond the end of the columns is PARTIAL. One that reaches beyond the end of the rows is PARTIAL
    for rows of keys, which add to dq; rows of queries that do not exist are not written.
    """
    by_queries = rows == "queries"
    ragged_columns = kv_length % block_kv if by_queries else q_length % block_q
    if mask.is_full and not ragged_columns and (by_queries or kv_length % block_kv == 0):
        return None
    if mask.has_vectors:
        kinds = tile_kinds(mask, q_length, kv_length, block_q, block_kv)
        return list_visits(kinds if by_queries else jnp.swapaxes(kinds, 1, 2))
    queries = _Side(mask.queries, q_length, block_q)
    keys = _Side(mask.keys, kv_length, block_kv)
    if by_queries:
        return _ranges(queries, keys, mask.left, mask.right, ragged_rows=mask.queries.length is not None)
    return _ranges(keys, queries, mask.right, mask.left, ragged_rows=True)


def all_visits(rows: int, columns: int) -> Visits:
    """Every column of every row, all FULL."""
    every = jnp.full((1, rows), columns, jnp.int32)
    return Visits(full=every, visit=every)


def in_parts(visits: Visits, columns: int, parts: int) -> Visits:
    """Cuts the visits of each row in parts of at most ``columns / parts``: the first parts of all rows, the second...

    Parts of a list have so many of its tiles each. Those of ranges lie between the same columns in all rows.
    """
    if parts == 1:
        return visits
    most = -(-columns // parts)
    low = (jnp.arange(parts, dtype=jnp.int32) * most)[None, :, None]
    rows_last = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])  # noqa: E731
    within = lambda x: jnp.clip(x[:, None], low, low + most)  # noqa: E731
    if visits.order is not None:
        cut = jnp.pad(visits.order, ((0, 0), (0, 0), (0, parts * most - columns)))
        cut = jnp.swapaxes(cut.reshape(*cut.shape[:2], parts, most), 1, 2)
        full, visit = (rows_last(within(x) - low) for x in (visits.full, visits.visit))
        return Visits(full=full, visit=visit, order=rows_last(cut))

    def part(start: Array, count: Array) -> tuple[Array, Array]:
        first = within(start)
        return rows_last(within(start + count) - first), rows_last(first)

    start = jnp.zeros_like(visits.visit) if visits.start is None else visits.start
    visit, start = part(start, visits.visit)
    if visits.full_start is None:
        return Visits(full=visit, visit=visit, start=start)
    full, full_start = part(visits.full_start, visits.full)
    return Visits(full=full, visit=visit, start=start, full_start=full_start)


def longest_first(visits: Visits) -> Visits:
    """The counts of a list from the row that visits most to the one that visits least; equals as they were.

    Who starts last then has least to do, so that all end at about the same time.
    """
    rows = jax.lax.broadcasted_iota(jnp.int32, visits.visit.shape, 1)
    fewest, full, row = jax.lax.sort((-visits.visit, visits.full, rows), num_keys=1, is_stable=True)
    return visits._replace(full=full, visit=-fewest, row=row)


class _Side(NamedTuple):
    tokens: Tokens
    length: int
    block: int

    @property
    def present(self) -> Array:
        """Tokens present, [B1, 1]."""
        given = self.tokens.length
        return jnp.full((1, 1), self.length, jnp.int32) if given is None else given[:, None]

    @property
    def num_tiles(self) -> int:
        return -(-self.length // self.block)


def _ranges(own: _Side, other: _Side, before: int | None, after: int | None, *, ragged_rows: bool) -> Visits:
    """A token at p of the rows meets those at p - before to p + after of the columns."""
    first = (jnp.arange(own.num_tiles, dtype=jnp.int32) * own.block)[None]
    present, count = own.present, other.present
    low, high = jnp.zeros_like(first), jnp.broadcast_to(count, (count.shape[0], own.num_tiles))
    full_low, full_high = low, high
    if isinstance(own.tokens.positions, Runs) and isinstance(other.tokens.positions, Runs):
        last = jnp.maximum(jnp.minimum(first + own.block, present) - 1, first)
        lowest, highest = (own.tokens.positions.at(x) for x in (first, last))
        below = other.tokens.positions.count_below
        if before is not None:
            low, full_low = below(lowest - before), below(highest - before)
        if after is not None:
            past = lambda x: jnp.minimum(x, jnp.int32(_HIGHEST - 1 - after)) + (after + 1)  # noqa: E731
            high, full_high = (jnp.minimum(count, below(past(x))) for x in (highest, lowest))
    absent = (first >= present) | (high <= low)
    start = jax.lax.div(low, jnp.int32(other.block))
    visit = jnp.where(absent, 0, _tiles_over(high, other.block) - start)
    full_start = _tiles_over(full_low, other.block)
    full = jnp.maximum(jax.lax.div(full_high, jnp.int32(other.block)) - full_start, 0)
    full = jnp.where(absent, 0, full)
    if ragged_rows:
        full = jnp.where(first + own.block > present, 0, full)
    shape = jnp.broadcast_shapes(visit.shape, full.shape)
    return Visits(
        full=jnp.broadcast_to(full, shape),
        visit=jnp.broadcast_to(visit, shape),
        start=jnp.broadcast_to(start, shape),
        full_start=jnp.broadcast_to(full_start, shape),
    )


def _tiles_over(tokens: Array, block: int) -> Array:
    """Tiles that so many tokens reach into."""
    return jax.lax.div(tokens + (block - 1), jnp.int32(block))


# ----------------------------------------------------------------------------------------------------------- lists


def tile_kinds(mask: Mask, q_length: int, kv_length: int, block_q: int, block_kv: int) -> Int32[Array, "B1 nq nk"]:
    """FULL, PARTIAL or EMPTY for every tile, from extents alone (PARTIAL may be said of the others too)."""
    queries, keys = _Side(mask.queries, q_length, block_q), _Side(mask.keys, kv_length, block_kv)
    full = jnp.ones((1, 1, 1), dtype=bool)
    empty = jnp.zeros((1, 1, 1), dtype=bool)
    if mask.queries.positions is not None and mask.keys.positions is not None:
        (q_min, q_max), (k_min, k_max) = _position_extents(queries, 2), _position_extents(keys, 1)
        (first_min, last_min), (first_max, last_max) = (
            window(x, mask.left, mask.right, natural=False) for x in (q_min, q_max)
        )
        if first_min is not None and first_max is not None:
            full, empty = full & (k_min >= first_max), empty | (k_max < first_min)
        if last_min is not None and last_max is not None:
            full, empty = full & (k_max <= last_min), empty | (k_min > last_max)
    if mask.queries.segments is not None and mask.keys.segments is not None:
        q_min, q_max = _extents(mask.queries.segments, queries, 2)
        k_min, k_max = _extents(mask.keys.segments, keys, 1)
        full = full & (q_min == q_max) & (k_min == k_max) & (q_min == k_min)
        empty = empty | (q_max < k_min) | (k_max < q_min)
    for side, axis in ((queries, 2), (keys, 1)):
        if side.tokens.length is not None or side.length % side.block:
            first = jnp.arange(side.num_tiles, dtype=jnp.int32)[None] * side.block
            reaches = jnp.expand_dims(first + side.block > side.present, axis)
            full, empty = full & ~reaches, empty | jnp.expand_dims(first >= side.present, axis)
    kinds = jnp.where(empty, jnp.int32(EMPTY), jnp.where(full, jnp.int32(FULL), jnp.int32(PARTIAL)))
    return jnp.broadcast_to(kinds, (kinds.shape[0], queries.num_tiles, keys.num_tiles))


def _position_extents(side: _Side, axis: int) -> tuple[Array, Array]:
    """First and last position of every tile, shaped to broadcast to [B1, nq, nk]."""
    positions = side.tokens.positions
    if not isinstance(positions, Runs):
        assert positions is not None
        return _extents(positions, side, axis)
    first = jnp.arange(side.num_tiles, dtype=jnp.int32) * side.block
    last = jnp.minimum(first + side.block, side.length) - 1
    lowest, highest = (jnp.expand_dims(positions.at(x[None]), axis) for x in (first, last))
    return lowest, highest


def _extents(x: Int32[Array, "B1 L"], side: _Side, axis: int) -> tuple[Array, Array]:
    """Minimum and maximum of every tile, likewise."""
    extra = side.num_tiles * side.block - side.length
    x = jnp.pad(x[:, : side.length], ((0, 0), (0, extra)), mode="edge") if extra else x[:, : side.length]
    tiles = x.reshape(x.shape[0], -1, side.block)
    return jnp.expand_dims(tiles.min(-1), axis), jnp.expand_dims(tiles.max(-1), axis)


_WORD_BITS = 32


def list_visits(kinds: Int32[Array, "B1 rows columns"]) -> Visits:
    """The list of :func:`tile_kinds`, or of its transpose. Stable, so the order of tiles never depends on chance."""
    # Neither sum waits for the other: on a GPU they are one kernel.
    full = jnp.sum(kinds == FULL, axis=-1, dtype=jnp.int32)
    visit = jnp.sum(kinds != EMPTY, axis=-1, dtype=jnp.int32)
    if kinds.shape[-1] <= _WORD_BITS:
        return Visits(full=full, visit=visit, order=_order_from_bits(kinds, full[:, :, None], visit[:, :, None]))
    return Visits(full=full, visit=visit, order=jnp.argsort(kinds, axis=-1, stable=True).astype(jnp.int32))


def _order_from_bits(
    kinds: Int32[Array, "B1 rows columns"], full: Int32[Array, "B1 rows 1"], visit: Int32[Array, "B1 rows 1"]
) -> Int32[Array, "B1 rows columns"]:
    """The order that the stable sort gives, for rows of at most 32 tiles.

    Tiles of one kind are the bits of a word. On a GPU the words are summed in the kernel that counts, and the order is
    one more kernel, where a sort is two: between the hops of a ring over short shards that can be seen.
    """
    at = jax.lax.broadcasted_iota(jnp.int32, kinds.shape, 2)
    bit = jnp.int32(1) << at
    fulls, partials = (
        jnp.sum(jnp.where(kinds == kind, bit, jnp.int32(0)), axis=-1, dtype=jnp.int32, keepdims=True)
        for kind in (FULL, PARTIAL)
    )
    empties = ~(fulls | partials)  # and bits beyond the columns, which come last and are not asked for
    word = jnp.where(at < full, fulls, jnp.where(at < visit, partials, empties))
    return _nth_bit(word, at - jnp.where(at < full, jnp.int32(0), jnp.where(at < visit, full, visit)))


def _nth_bit(word: Int32[Array, "..."], n: Int32[Array, "..."]) -> Int32[Array, "..."]:
    """Where the n-th of the bits that are set lies, n = 0 for the lowest: by halving what is left of the word."""
    place = jnp.zeros_like(n)
    for half in (16, 8, 4, 2, 1):
        below = jax.lax.population_count((word >> place) & jnp.int32(2**half - 1))
        n, place = jnp.where(n < below, n, n - below), jnp.where(n < below, place, place + half)
    return place
