"""The steps of a TPU grid: the tiles that a kernel visits, row after row, as one list in scalar memory.

No step is spent on an EMPTY tile; a row that visits nothing has one EMPTY step, so that its result is written. Where
rows are ranges of tiles the list follows by arithmetic, otherwise from the kind of every tile. Lists end at run time.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from ...mask import Mask
from ..visits import EMPTY, FULL, PARTIAL, Visits, plan_visits, tile_kinds
from .tiles import TileSizes

# A kind of step besides those of tiles: a last row of steps that only writes the results of the columns.
FLUSH = 3

# Entries that go to SMEM (1 MiB on the smallest chip) at once, for all batch rows.
_MAX_STEPS = 2**17

_FIRST, _LAST, _FLAG_BITS = 4, 8, 4  # bits 0 and 1 hold the kind


class Step(NamedTuple):
    """One step: a tile, and whether it is the first or the last of its row."""

    row: Any
    column: Any
    kind: Any
    first: Any
    last: Any


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a grid walks the tiles of one (batch row, head): row by row, or as a list says."""

    num_rows: int
    num_columns: int
    lists: int  # how many the batch has: 0 where every tile is FULL, 1 if it is the same for all rows

    def step(self, steps_smem: Any, b: Any, s: Any) -> Step:
        """Step ``s`` of batch row ``b``; in a kernel or an index map."""
        if not self.lists:
            columns = jnp.int32(self.num_columns)
            row, column = jax.lax.div(s, columns), jax.lax.rem(s, columns)
            return Step(row=row, column=column, kind=jnp.int32(FULL), first=column == 0, last=column == columns - 1)
        start = b * (self.num_rows * self.num_columns) if self.lists > 1 else 0
        return unpack(steps_smem[start + s], self.num_columns)


class Plan(NamedTuple):
    """What to visit in each of one or more kernel calls that share the tiles' columns out among them."""

    walk: Walk
    lists: Int32[Array, "chunks B1*rows*columns"] | None  # for SMEM; None where every tile is FULL
    num_steps: Any  # of each chunk [chunks]; an int where every tile is FULL

    def chunk(self, index: Array | int) -> tuple[Array | None, Any]:
        """The list and the number of steps of one call."""
        return (None, self.num_steps) if self.lists is None else (self.lists[index], self.num_steps[index])


def plan_steps(
    mask: Mask, q_length: int, kv_length: int, tiles: TileSizes, *, rows: str, width: int | None = None
) -> Plan:
    """Tiles in rows of "queries" or of "keys". ``width``: columns of one call; the others are those of further calls.

    With rows of keys, whose kernel keeps a result for each column, lists end with a row of FLUSH steps. Where every
    tile is FULL the last row of tiles serves for it.
    """
    counts = [-(-q_length // tiles.block_q), -(-kv_length // tiles.block_kv)]
    num_rows, num_columns = counts if rows == "queries" else counts[::-1]
    width = num_columns if width is None else width
    chunks = -(-num_columns // width)
    visits = None
    if not mask.has_vectors:
        visits = plan_visits(mask, q_length, kv_length, tiles.block_q, tiles.block_kv, rows=rows)
        if visits is None and chunks * width == num_columns:
            return Plan(Walk(num_rows, width, lists=0), None, num_rows * width)
    batch = _batch(mask) if visits is None else visits.full.shape[0]
    listed_rows = num_rows + (rows == "keys")
    if batch * listed_rows * chunks * width > _MAX_STEPS:
        raise NotImplementedError(
            f"config: a shard may have at most {_MAX_STEPS} tiles (over all batch rows that have masks of their own) "
            "for implementation 'pallas_tpu'; use larger block_q and block_kv, or more devices. "
            f"Got {batch * num_rows * num_columns} tiles of {tiles.block_q} x {tiles.block_kv}."
        )
    if mask.has_vectors:
        kinds = tile_kinds(mask, q_length, kv_length, tiles.block_q, tiles.block_kv)
        kinds = kinds if rows == "queries" else jnp.swapaxes(kinds, 1, 2)
        kinds = jnp.pad(kinds, ((0, 0), (0, 0), (0, chunks * width - num_columns)), constant_values=EMPTY)
        kinds = jnp.moveaxis(kinds.reshape(batch, num_rows, chunks, width), 2, 0)
        if rows == "keys":
            written = jnp.arange(chunks * width).reshape(chunks, 1, 1, width) < num_columns
            last = jnp.where(written, jnp.int32(FLUSH), jnp.int32(EMPTY))
            kinds = jnp.concatenate([kinds, jnp.broadcast_to(last, (chunks, batch, 1, width))], axis=2)
        steps, count = list_kinds(kinds)
    else:
        visits = _everything(num_rows, num_columns) if visits is None else visits
        steps, count = list_ranges(visits, width, chunks, flush=num_columns if rows == "keys" else 0)
    # Flat: SMEM pads the last axis of a matrix.
    return Plan(Walk(listed_rows, width, lists=batch), steps.reshape(chunks, -1), jnp.max(count, axis=1))


def _batch(mask: Mask) -> int:
    """Rows that masks of this batch have: 1 if it is the same for all."""
    arrays = [*mask.vectors()[0], *mask.vectors()[1], mask.queries.length, mask.keys.length]
    return max((x.shape[0] for x in arrays if x is not None), default=1)


def _everything(num_rows: int, num_columns: int) -> Visits:
    zero = jnp.zeros((1, num_rows), jnp.int32)
    return Visits(full=zero + num_columns, visit=zero + num_columns, start=zero, full_start=zero)


def list_ranges(
    visits: Visits, width: int, chunks: int, *, flush: int
) -> tuple[Int32[Array, "chunks B1 rows*width"], Int32[Array, "chunks B1"]]:
    """The steps of rows that are ranges, columns ascending, and their number. ``flush``: columns of a row of FLUSH."""
    assert visits.start is not None and visits.full_start is not None
    first_column = (jnp.arange(chunks, dtype=jnp.int32) * width)[:, None, None]

    def cut(x: Array) -> Array:
        """The bound of a range, in the columns of each chunk."""
        return jnp.clip(x[None] - first_column, 0, width)

    start, stop = cut(visits.start), cut(visits.start + visits.visit)
    full_start, full_stop = cut(visits.full_start), cut(visits.full_start + visits.full)
    num_rows = start.shape[2]
    if flush:
        at_end = lambda x, row: jnp.concatenate([x, jnp.broadcast_to(row, (*x.shape[:2], 1))], axis=2)  # noqa: E731
        written = jnp.clip(flush - first_column, 0, width)
        start, stop = at_end(start, jnp.int32(0)), at_end(stop, written)
        full_start, full_stop = (at_end(x, jnp.int32(0)) for x in (full_start, full_stop))
    nothing = stop <= start
    count = jnp.where(nothing, 1, stop - start)
    end = jnp.cumsum(count, axis=2, dtype=jnp.int32)
    begin = end - count
    start = jnp.where(nothing, 0, start)

    # Rows begin one after the other, so what belongs to the row of a step is a sum of differences: no gather, no sort.
    s = jnp.arange(start.shape[2] * width, dtype=jnp.int32)[None, None]
    reached = s[:, :, :, None] >= begin[:, :, None, :]

    def of_row(x: Array) -> Array:
        change = jnp.diff(x, axis=2, prepend=jnp.zeros_like(x[:, :, :1]))
        return jnp.sum(jnp.where(reached, change[:, :, None, :], 0), axis=3, dtype=jnp.int32)

    row = jnp.sum(reached, axis=3, dtype=jnp.int32) - 1
    last = of_row(end) - 1
    column = jnp.minimum(s, last) + of_row(start - begin)
    is_full = (column >= of_row(full_start)) & (column < of_row(full_stop))
    kind = jnp.where(is_full, jnp.int32(FULL), jnp.int32(PARTIAL))
    kind = jnp.where(row == num_rows, jnp.int32(FLUSH), kind)
    kind = jnp.where((of_row(nothing.astype(jnp.int32)) != 0) | (s > last), jnp.int32(EMPTY), kind)
    steps = _pack(row, column, kind, s == of_row(begin), s == last, width)
    return steps, end[:, :, -1]


def list_kinds(
    kinds: Int32[Array, "... rows columns"],
) -> tuple[Int32[Array, "... rows*columns"], Int32[Array, "..."]]:
    """The steps of rows of :func:`ringjax.kernels.visits.tile_kinds`, columns ascending, and their number."""
    *batch, rows, columns = kinds.shape
    row, column = (jax.lax.broadcasted_iota(jnp.int32, kinds.shape, len(batch) + axis) for axis in (0, 1))
    nothing = jnp.all(kinds == EMPTY, axis=-1, keepdims=True)
    visited = (kinds != EMPTY) | (nothing & (column == 0))
    rank = jnp.cumsum(visited, axis=-1, dtype=jnp.int32)
    code = _pack(row, column, kinds, rank == 1, rank == rank[..., -1:], columns)
    # Codes grow along rows and columns, so sorting them only moves the tiles that are not visited to the end.
    never = jnp.int32(jnp.iinfo(jnp.int32).max)
    steps = jnp.sort(jnp.where(visited, code, never).reshape(*batch, rows * columns), axis=-1)
    count = jnp.sum(visited, axis=(-2, -1), dtype=jnp.int32)
    # Beyond the end the last tile again, as EMPTY.
    final = jnp.max(jnp.where(visited, code, jnp.int32(0)), axis=(-2, -1))
    idle = ((final >> _FLAG_BITS) << _FLAG_BITS) | EMPTY
    return jnp.where(steps == never, idle[..., None], steps), count


def _column_bits(num_columns: int) -> int:
    return (num_columns - 1).bit_length()


def _pack(
    row: Array, column: Array, kind: Array, first: Bool[Array, "..."], last: Bool[Array, "..."], columns: int
) -> Array:
    """A step as one number."""
    flag = lambda x, bit: jnp.where(x, jnp.int32(bit), jnp.int32(0))  # noqa: E731
    return (((row << _column_bits(columns)) | column) << _FLAG_BITS) | kind | flag(first, _FIRST) | flag(last, _LAST)


def unpack(step: Array, num_columns: int) -> Step:
    """The fields of one step, or of many."""
    tile, bits = step >> _FLAG_BITS, _column_bits(num_columns)
    return Step(
        row=tile >> bits,
        column=tile & (2**bits - 1),
        kind=step & 3,
        first=(step & _FIRST) != 0,
        last=(step & _LAST) != 0,
    )
