"""Who may attend whom: positions and segments to an elementwise predicate, and to a map of tiles.

The one place that says so. A query at position p with segment a sees a key at position r with segment b when

    p - left <= r <= p + right   (each bound only if given; causal is right = 0)      and      a == b.

Lengths and padding are segments too: a query or key that is not there has an id that nothing else has, see
:func:`exclude`. So kernels know two things only, positions and segments.
"""

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

# Ids of queries and keys that are not there. Different, so that they do not attend each other either.
NO_QUERY = -(2**31)
NO_KEY = -(2**31) + 1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("q_positions", "kv_positions", "q_segments", "kv_segments"),
    meta_fields=("left", "right"),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """The mask between one query shard and one block. ``B1`` is the batch size, or 1 if the mask is the same for all.

    Positions are None where neither bound is given, segments are None where everything is in one segment.
    """

    q_positions: Int32[Array, "B1 T"] | None
    kv_positions: Int32[Array, "B1 S"] | None
    q_segments: Int32[Array, "B1 T"] | None
    kv_segments: Int32[Array, "B1 S"] | None
    left: int | None = None
    right: int | None = None

    @property
    def is_full(self) -> bool:
        """Known at trace time: every query attends every key."""
        return self.q_positions is None and self.q_segments is None

    def queries(self, batch: Array | int, start: Array | int, size: int) -> "Mask":
        """The same mask for ``size`` queries of one batch row."""
        cut = functools.partial(_slice_row, batch=batch, start=start, size=size)
        return dataclasses.replace(self, q_positions=cut(self.q_positions), q_segments=cut(self.q_segments))

    def keys(self, batch: Array | int, start: Array | int, size: int) -> "Mask":
        """The same mask for ``size`` keys of one batch row."""
        cut = functools.partial(_slice_row, batch=batch, start=start, size=size)
        return dataclasses.replace(self, kv_positions=cut(self.kv_positions), kv_segments=cut(self.kv_segments))

    def padded(self, q_length: int, q_total: int, kv_length: int, kv_total: int) -> "Mask":
        """The mask with queries and keys appended that attend nothing and that nobody attends."""
        if (q_length, kv_length) == (q_total, kv_total):
            return self
        return dataclasses.replace(
            self,
            q_positions=_extend_edge(self.q_positions, q_total - q_length),
            kv_positions=_extend_edge(self.kv_positions, kv_total - kv_length),
            q_segments=_extend(self.q_segments, q_length, q_total - q_length, NO_QUERY),
            kv_segments=_extend(self.kv_segments, kv_length, kv_total - kv_length, NO_KEY),
        )

    def sides(self) -> tuple["QuerySide", "KeySide"]:
        """What each side brings to :func:`attends`."""
        first = last = None
        if self.q_positions is not None:
            first, last = _window(self.q_positions, self.left, self.right)
        return QuerySide(first, last, self.q_segments), KeySide(self.kv_positions, self.kv_segments)

    def predicate(self) -> Bool[Array, "B1 T S"]:
        """True where the query attends the key. For tiles: it is T x S."""
        queries, keys = self.sides()
        columns = jax.tree.map(lambda x: x[:, :, None], queries)
        return attends(columns, jax.tree.map(lambda x: x[:, None, :], keys))


class QuerySide(NamedTuple):
    """First and last position that a query sees, and its segment. None: no such condition."""

    first: Array | None
    last: Array | None
    segments: Array | None


class KeySide(NamedTuple):
    """Position and segment of a key. None: no such condition."""

    positions: Array | None
    segments: Array | None


def attends(queries: QuerySide, keys: KeySide) -> Bool[Array, "..."]:
    """The predicate itself, elementwise: give the sides as columns and rows that broadcast against each other."""
    conditions = []
    if keys.positions is not None and queries.first is not None:
        conditions.append(keys.positions >= queries.first)
    if keys.positions is not None and queries.last is not None:
        conditions.append(keys.positions <= queries.last)
    if keys.segments is not None and queries.segments is not None:
        conditions.append(queries.segments == keys.segments)
    return functools.reduce(operator.and_, conditions) if conditions else jnp.ones((1, 1, 1), dtype=bool)


def _window(
    q_positions: Int32[Array, "B1 T"], left: int | None, right: int | None
) -> tuple[Int32[Array, "B1 T"] | None, Int32[Array, "B1 T"] | None]:
    """First and last position that each query sees; None is unbounded. Saturates where int32 would wrap around."""
    low, high = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max
    first = None if left is None else jnp.maximum(q_positions, jnp.int32(low + left)) - left
    last = None if right is None else jnp.minimum(q_positions, jnp.int32(high - right)) + right
    return first, last


def _slice_row(x: Array | None, batch: Array | int, start: Array | int, size: int) -> Array | None:
    if x is None:
        return None
    row = batch if x.shape[0] > 1 else 0
    return jax.lax.dynamic_slice(x, (jnp.int32(row), jnp.int32(start)), (1, size))


def _extend(x: Array | None, length: int, extra: int, value: int) -> Array:
    x = jnp.zeros((1, length), jnp.int32) if x is None else x
    return jnp.pad(x, ((0, 0), (0, extra)), constant_values=value)


def _extend_edge(x: Array | None, extra: int) -> Array | None:
    """Repeats the last position, so that the extent of the last tile does not grow."""
    return None if x is None else jnp.pad(x, ((0, 0), (0, extra)), mode="edge")


def exclude(segments: Int32[Array, "B1 L"], present: Bool[Array, "B1 L"], marker: int) -> Int32[Array, "B1 L"]:
    """Segment ids in which tokens that are not present have the id NO_QUERY or NO_KEY."""
    return jnp.where(present, segments, jnp.int32(marker))


class BlockMap(NamedTuple):
    """For every row of tiles the tiles to visit: FULL ones first, PARTIAL ones next, EMPTY ones last.

    ``order[b, i, :full[b, i]]`` need no predicate, ``order[b, i, full[b, i]:visit[b, i]]`` do, the rest is not
    touched. Rows are tiles of queries (forward) or of keys (backward).
    """

    order: Int32[Array, "B1 rows columns"]
    full: Int32[Array, "B1 rows"]
    visit: Int32[Array, "B1 rows"]


FULL, PARTIAL, EMPTY = 0, 1, 2


def tile_kinds(mask: Mask, block_q: int, block_kv: int) -> Int32[Array, "B1 nq nk"]:
    """FULL, PARTIAL or EMPTY for every tile, from minima and maxima alone (PARTIAL may be said of the others too).

    The lengths must be multiples of the tile sizes.
    """
    full = jnp.ones((1, 1, 1), dtype=bool)
    empty = jnp.zeros((1, 1, 1), dtype=bool)
    if mask.q_positions is not None and mask.kv_positions is not None:
        first, last = _window(mask.q_positions, mask.left, mask.right)
        k_min, k_max = _extent(mask.kv_positions, block_kv, queries=False)
        if first is not None:
            lowest, highest = _extent(first, block_q, queries=True)
            full, empty = full & (k_min >= highest), empty | (k_max < lowest)
        if last is not None:
            lowest, highest = _extent(last, block_q, queries=True)
            full, empty = full & (k_max <= lowest), empty | (k_min > highest)
    if mask.q_segments is not None and mask.kv_segments is not None:
        q_min, q_max = _extent(mask.q_segments, block_q, queries=True)
        k_min, k_max = _extent(mask.kv_segments, block_kv, queries=False)
        full = full & (q_min == q_max) & (k_min == k_max) & (q_min == k_min)
        empty = empty | (q_max < k_min) | (k_max < q_min)
    return jnp.where(empty, jnp.int32(EMPTY), jnp.where(full, jnp.int32(FULL), jnp.int32(PARTIAL)))


def _extent(x: Int32[Array, "B1 L"], tile: int, *, queries: bool) -> tuple[Array, Array]:
    """Minimum and maximum of every tile, shaped to broadcast to [B1, nq, nk]."""
    tiles = x.reshape(x.shape[0], -1, tile)
    axis = 2 if queries else 1
    return jnp.expand_dims(tiles.min(-1), axis), jnp.expand_dims(tiles.max(-1), axis)


_WORD_BITS = 32


def block_map(kinds: Int32[Array, "B1 rows columns"]) -> BlockMap:
    """The map of :func:`tile_kinds`, or of its transpose. Stable, so the order of tiles never depends on chance."""
    # Neither sum waits for the other: on a GPU they are one kernel.
    full = jnp.sum(kinds == FULL, axis=-1, dtype=jnp.int32)
    visit = jnp.sum(kinds != EMPTY, axis=-1, dtype=jnp.int32)
    if kinds.shape[-1] <= _WORD_BITS:
        return BlockMap(_order_from_bits(kinds, full[:, :, None], visit[:, :, None]), full, visit)
    return BlockMap(jnp.argsort(kinds, axis=-1, stable=True).astype(jnp.int32), full, visit)


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


class TileList(NamedTuple):
    """All tiles that a kernel visits, row after row, as one list: what a grid walks without a step for EMPTY tiles.

    Entry ``steps[b, s]`` packs row, column, kind and whether the tile is the first or the last of its row, see
    :func:`unpack_step`. A row without any tile has one EMPTY entry, so that its result is written. Entries from
    ``count[b]`` on repeat the last tile as EMPTY.
    """

    steps: Int32[Array, "B1 rows*columns"]
    count: Int32[Array, " B1"]


class Step(NamedTuple):
    """One entry of a :class:`TileList`."""

    row: Array
    column: Array
    kind: Array
    first: Array
    last: Array


_FIRST, _LAST, _FLAG_BITS = 4, 8, 4  # bits 0 and 1 hold the kind


def _column_bits(num_columns: int) -> int:
    return (num_columns - 1).bit_length()


def tile_list(kinds: Int32[Array, "B1 rows columns"]) -> TileList:
    """The list of :func:`tile_kinds`, or of its transpose, in the order of rows and columns."""
    batch, rows, columns = kinds.shape
    row, column = (jax.lax.broadcasted_iota(jnp.int32, kinds.shape, axis) for axis in (1, 2))
    nothing = jnp.all(kinds == EMPTY, axis=-1, keepdims=True)
    visited = (kinds != EMPTY) | (nothing & (column == 0))
    rank = jnp.cumsum(visited, axis=-1, dtype=jnp.int32)
    flags = kinds + jnp.where(rank == 1, jnp.int32(_FIRST), jnp.int32(0))
    flags = flags + jnp.where(rank == rank[:, :, -1:], jnp.int32(_LAST), jnp.int32(0))
    code = ((row << _column_bits(columns) | column) << _FLAG_BITS) | flags
    # Codes grow along rows and columns, so sorting them only moves the tiles that are not visited to the end.
    never = jnp.int32(jnp.iinfo(jnp.int32).max)
    steps = jnp.sort(jnp.where(visited, code, never).reshape(batch, rows * columns), axis=-1)
    count = jnp.sum(visited, axis=(1, 2), dtype=jnp.int32)
    final = jnp.max(jnp.where(visited, code, jnp.int32(0)), axis=(1, 2))
    idle = ((final >> _FLAG_BITS) << _FLAG_BITS) | EMPTY
    return TileList(jnp.where(steps == never, idle[:, None], steps), count)


def unpack_step(step: Array, num_columns: int) -> Step:
    """The fields of one entry, or of many."""
    tile, bits = step >> _FLAG_BITS, _column_bits(num_columns)
    return Step(tile >> bits, tile & (2**bits - 1), step & 3, (step & _FIRST) != 0, (step & _LAST) != 0)
