"""What the warpgroups of the forward kernel for GPU share: what goes in, SMEM and barriers, who works on what.

See :mod:`ringjax.kernels.mosaic.forward`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from ...mask import Rule, Vectors
from ..base import KernelParams
from . import common
from .common import MaskArrays
from .tiles import SMEM_BYTES, WARPGROUP_ROWS, TileSizes

# Flags of a slot: not 0 where its values hold NaN or Inf, and which column of tiles it is.
POISONED, COLUMN, NUM_FLAGS = 0, 1, 2
# Work that is drawn waits in one of so many places, until all have seen it.
DRAWS = 2


class Inputs(NamedTuple):
    """Refs (or arrays) in GMEM of what goes in. None: absent."""

    q: Any  # [B, T, N, D]
    k: Any  # [B, S, K, D]
    v: Any  # [B, S, K, Dv]
    mask: MaskArrays  # rows of tiles are of queries
    carry: Any  # (acc, max, sum) of [B, N, Tp, Dv] or [B, N, Tp / 64, Dv / 8, 64, 8], [B, N, Tp], [B, N, Tp]
    sinks: Any  # [N]


class Scratch(NamedTuple):
    """SMEM and barriers. A slot of the ring holds a tile of keys and one of values."""

    q_smem: Any  # [compute, 64, D]
    k_smem: Any  # [stages, block_kv, D]
    v_smem: Any  # [stages, block_kv, Dv]
    out_smem: Any  # [compute, 64, Dv], or None: the output goes through q_smem
    acc_smem: Any  # [compute, 64, Dv] float32: acc of the carry; or None: it is read from and written to GMEM
    q_ready: Any
    q_consumed: Any
    k_ready: Any
    v_ready: Any
    acc_ready: Any
    acc_consumed: Any
    k_free: Any  # see Signals: for the interpreter; or None
    v_free: Any
    turn: Any
    met: Any  # all multiplying warpgroups have come here
    v_landed: Any  # as v_ready, but for the loading warpgroup, which looks through the values of PARTIAL tiles; or None
    # Of PARTIAL tiles, int32: flags of all slots in the last row, before it for each slot its part of Static.marks of
    # the mask's vectors of keys. A single array, since each takes a whole KiB. None: there are no such tiles.
    marks_smem: Any
    marked: Any  # the vectors are there, and COLUMN
    # Where work is drawn, see Static.draws: it is there, and all that multiply have seen it. In the row of flags.
    drawn: Any
    seen: Any

    def flag(self, slot: Array, which: int) -> Any:
        """Where in marks_smem a flag is."""
        return self.marks_smem.shape[0] - 1, slot * NUM_FLAGS + which

    def place(self, n: Array) -> tuple[Array, Any]:
        """Of the n-th work drawn: the number of its place, and the place in marks_smem."""
        place, (rows, columns) = jax.lax.rem(n, jnp.int32(DRAWS)), self.marks_smem.shape
        return place, self.marks_smem.at[rows - 1, pl.ds(columns - DRAWS + place, 1)]


class Work(NamedTuple):
    """What one block of threads works on at a time: a tile of queries of one head, and all or a split of its visits."""

    b: Array
    n: Array
    i: Array  # the tile of queries, or the split of the only one
    first: Array | int  # of the row's visits
    full: Array  # of the visits from there on
    visit: Array
    queries: Any = None  # what a multiplying warpgroup has loaded of the mask's vectors


@dataclasses.dataclass(frozen=True)
class Static:
    params: KernelParams
    tiles: TileSizes
    batch: int
    heads: int
    kv_heads: int
    num_q: int
    num_kv: int
    group_heads: int
    num_blocks: int
    finish: bool
    carried: bool
    carry_in_smem: bool
    rule: Rule | None  # of PARTIAL tiles. None: every row visits every column, and all are FULL
    rows_total: int  # queries in the carry and in lse
    splits: int = 0  # of the visits of the only tile of queries, see ringjax.kernels.mosaic.decode. 0: none
    rows_out: int = WARPGROUP_ROWS  # queries of a split that there are, in eights
    marks: int = 0  # vectors of keys that come to SMEM, where threads have them at once; others are loaded from GMEM
    # Whether a block of threads that has done its work draws the next from a counter in GMEM, which keeps all of them
    # busy whatever rows and multiprocessors are like. Otherwise all is dealt out beforehand.
    draws: bool = False

    @property
    def masked(self) -> bool:
        return self.rule is not None

    @property
    def own_keys(self) -> int:
        """Keys of a tile that one warpgroup multiplies with: all, or its part where all have the same queries."""
        return self.tiles.block_kv // self.tiles.compute if self.splits else self.tiles.block_kv

    def mark(self, slot: Array, vector: int) -> Array:
        """Where in marks_smem a slot's part of a vector of keys is."""
        return slot + vector * self.tiles.stages

    def first_query(self, work: Work, warpgroup: Any) -> Any:
        return 0 if self.splits else (work.i * self.tiles.compute + warpgroup) * WARPGROUP_ROWS

    @property
    def carry_by_tma(self) -> bool:
        return self.carried and self.carry_in_smem

    def reads_carry(self, work: Work) -> Array:
        """A carry that goes on is left as it is where there is nothing to visit."""
        return (work.visit > 0) | self.finish


def marks(tiles: TileSizes, of_keys: Vectors, taken: int) -> int:
    """For how many of these vectors there is SMEM, beside ``taken`` bytes, which one is part of."""
    another = -(-tiles.stages * tiles.block_kv * 4 // 1024) * 1024
    return min(len(jax.tree.leaves(of_keys)), 1 + (SMEM_BYTES - taken) // another)


def column(static: Static, x: Inputs, work: Work, t: Array) -> Array:
    """The column of the t-th tile of a row, or of a split of it."""
    if static.splits:
        return common.column(x.mask, work.b, jnp.int32(0), work.first + t)
    return common.column(x.mask, work.b, work.i, t)


def walk(static: Static, x: Inputs, body: Any, draw: Callable[[Array], Array]) -> None:
    """``body(work, count) -> count`` for all that this block of threads works on; count is of tiles of keys so far.

    Rows that have most to do come first: the last ones under a causal mask, of lists as they are counted. Of a group of
    heads all have their turn before the next row. Work that is dealt out goes backwards every other round: what is left
    for each block is even.

    Args:
      draw: if ``static.draws``: the number of what to work on after the n-th, from 0 on.
    """
    block = jax.lax.axis_index("block")
    num_items = static.batch * static.heads * static.num_q
    section = static.group_heads * static.num_q

    def work(index: Array) -> Work:
        rest = jax.lax.rem(index, section)
        row = jax.lax.div(index, section) * static.group_heads + jax.lax.rem(rest, static.group_heads)
        i = jax.lax.div(rest, static.group_heads)
        if x.mask.order is None:
            i = static.num_q - 1 - i
        b, n = jax.lax.div(row, static.heads), jax.lax.rem(row, static.heads)
        full = visit = jnp.int32(static.num_kv)
        if static.masked:
            counts, row = x.mask.counts, jnp.int32(0) if static.splits else i
            full, visit = (invariant(counts[common.batch_row(counts, b), which, row]) for which in range(2))
            if not static.splits:
                i = invariant(common.row_of(x.mask, b, i))
        first: Any = 0
        if static.splits:
            first, end = (jax.lax.div(visit * n, jnp.int32(static.splits)) for n in (i, i + 1))
            full, visit = jnp.clip(full, first, end) - first, end - first
        return Work(b=b, n=n, i=i, first=first, full=full, visit=visit)

    if static.num_blocks == num_items:
        body(work(block), jnp.int32(0))
        return
    if static.draws:

        def one(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            item, n, count = state
            count = body(work(item), count)
            return draw(n), n + 1, count

        jax.lax.while_loop(lambda state: state[0] < num_items, one, (block, jnp.int32(0), jnp.int32(0)))
        return
    rounds, rest = divmod(num_items, static.num_blocks)

    def place(turn: Array) -> Array:
        return jnp.where(jax.lax.rem(turn, 2) == 1, static.num_blocks - 1 - block, block)

    mine = rounds + (place(jnp.int32(rounds)) < rest).astype(jnp.int32)
    jax.lax.fori_loop(
        0, mine, lambda turn, count: body(work(turn * static.num_blocks + place(turn)), count), jnp.int32(0)
    )


def invariant(x: Array) -> Array:
    """For loops: under check_vma what is read from GMEM is typed as varying over a mesh, what is computed is not."""
    return x * jnp.ones((), x.dtype)
