"""The multiplying warpgroups of the forward kernel for GPU, and what they share with the one that loads.

Each has 64 queries and keeps their running softmax in registers while tiles of keys and values pass by in SMEM. See
:mod:`ringjax.kernels.mosaic.forward`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..._compat import gpu_load
from ...mask import Rule, attends
from ...partial import NO_LOGIT, close
from ..base import KernelParams
from . import common
from .common import (
    COLUMN_BLOCK,
    COLUMNS,
    LN_2,
    MATRIX,
    ROWS,
    MaskArrays,
    column_matrix,
    full,
    is_finite,
    row_matrix,
)
from .tiles import WARPGROUP_ROWS, TileSizes


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
    k_consumed: Any
    v_ready: Any
    v_consumed: Any
    acc_ready: Any
    acc_consumed: Any
    turn: Any  # one barrier per warpgroup: it may multiply
    met: Any  # all multiplying warpgroups have come here
    v_landed: Any  # as v_ready, but for the loading warpgroup, which looks through the values of PARTIAL tiles; or None
    flags_smem: Any  # [stages, 64] float32: not 0 where the values of the slot hold NaN or Inf; or None


class Running(NamedTuple):
    """The running softmax of 64 queries, in registers; ``p`` are the weights of the last tile, not yet in ``acc``."""

    acc: Array
    max: Array
    sum: Array
    p: Array


class Work(NamedTuple):
    """What one block of threads works on at a time: a tile of queries of one head, and all or a split of its visits."""

    b: Array
    n: Array
    i: Array  # the tile of queries, or the split of the only one
    first: Array | int  # of the row's visits
    full: Array  # of the visits from there on
    visit: Array


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

    @property
    def masked(self) -> bool:
        return self.rule is not None

    @property
    def own_keys(self) -> int:
        """Keys of a tile that one warpgroup multiplies with: all, or its part where all have the same queries."""
        return self.tiles.block_kv // self.tiles.compute if self.splits else self.tiles.block_kv

    def first_query(self, work: Work, warpgroup: Any) -> Any:
        return 0 if self.splits else (work.i * self.tiles.compute + warpgroup) * WARPGROUP_ROWS

    @property
    def carry_by_tma(self) -> bool:
        return self.carried and self.carry_in_smem

    def reads_carry(self, work: Work) -> Array:
        """A carry that goes on is left as it is where there is nothing to visit."""
        return (work.visit > 0) | self.finish


def column(static: Static, x: Inputs, work: Work, t: Array) -> Array:
    """The column of the t-th tile of a row, or of a split of it."""
    if static.splits:
        return common.column(x.mask, work.b, jnp.int32(0), work.first + t)
    return common.column(x.mask, work.b, work.i, t)


def walk(static: Static, x: Inputs, body: Any) -> None:
    """``body(work, count) -> count`` for all that this block of threads works on; count is of tiles of keys so far.

    Rows of tiles that come last have most to do under a causal mask, so they come first; of a group of heads all have
    their turn before the next row. Every other round goes backwards: what is left for each block is even.
    """
    block = jax.lax.axis_index("block")
    num_items = static.batch * static.heads * static.num_q
    section = static.group_heads * static.num_q

    def work(index: Array) -> Work:
        rest = jax.lax.rem(index, section)
        row = jax.lax.div(index, section) * static.group_heads + jax.lax.rem(rest, static.group_heads)
        i = static.num_q - 1 - jax.lax.div(rest, static.group_heads)
        b, n = jax.lax.div(row, static.heads), jax.lax.rem(row, static.heads)
        full = visit = jnp.int32(static.num_kv)
        if static.masked:
            counts, row = x.mask.counts, jnp.int32(0) if static.splits else i
            full, visit = (invariant(counts[common.batch_row(counts, b), which, row]) for which in range(2))
        first: Any = 0
        if static.splits:
            first, end = (jax.lax.div(visit * n, jnp.int32(static.splits)) for n in (i, i + 1))
            full, visit = jnp.clip(full, first, end) - first, end - first
        return Work(b=b, n=n, i=i, first=first, full=full, visit=visit)

    if static.num_blocks == num_items:
        body(work(block), jnp.int32(0))
        return
    rounds, rest = divmod(num_items, static.num_blocks)

    def place(turn: Array) -> Array:
        return jnp.where(jax.lax.rem(turn, 2) == 1, static.num_blocks - 1 - block, block)

    mine = rounds + (place(jnp.int32(rounds)) < rest).astype(jnp.int32)
    jax.lax.fori_loop(
        0, mine, lambda turn, count: body(work(turn * static.num_blocks + place(turn)), count), jnp.int32(0)
    )


@dataclasses.dataclass(frozen=True)
class Compute:
    """A multiplying warpgroup."""

    static: Static
    x: Inputs
    out: Any
    scratch: Scratch
    warpgroup: Array

    @property
    def tile_shape(self) -> tuple[int, int]:
        return WARPGROUP_ROWS, self.static.own_keys

    def run(self) -> None:
        tiles, scratch = self.static.tiles, self.scratch
        for slot in range(tiles.stages):
            plgpu.barrier_arrive(scratch.k_consumed.at[slot])
            plgpu.barrier_arrive(scratch.v_consumed.at[slot])
        plgpu.barrier_arrive(scratch.q_consumed.at[self.warpgroup])
        if tiles.turns != "none":
            pl.when(self.warpgroup == tiles.compute - 1)(lambda: plgpu.barrier_arrive(scratch.turn.at[0]))
        walk(self.static, self.x, self.one)
        plgpu.wait_smem_to_gmem(0)

    def one(self, work: Work, count: Array) -> Array:
        """One tile of queries; returns the count of tiles of keys so far."""

        @pl.when(work.visit > 0)
        def _() -> None:
            acc, top, total = self.so_far(work)
            self.end(work, top, *self.attend(work, count, acc, top, total), visited=True)

        if (self.static.masked or self.static.splits) and not (self.static.carried and not self.static.finish):

            @pl.when(work.visit == 0)
            def _() -> None:
                self.release_carry()
                acc, top, total = self.so_far(work)
                self.end(work, top, acc, top, total, visited=False)

        return count + work.visit

    def release_carry(self) -> None:
        """acc of the next carry may come: that of the previous tile of queries has left, by now without a wait."""
        if self.static.carry_by_tma:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(self.scratch.acc_consumed.at[self.warpgroup])

    def rows(self, work: Work) -> Any:
        return pl.ds((work.i * self.static.tiles.compute + self.warpgroup) * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def rows_there(self, work: Work) -> Any:
        """The same of the carry, which ends with the last warpgroup that has queries: others read its rows, in vain."""
        start = (work.i * self.static.tiles.compute + self.warpgroup) * WARPGROUP_ROWS
        return pl.ds(jnp.minimum(start, self.static.rows_total - WARPGROUP_ROWS), WARPGROUP_ROWS)

    def has_rows(self, work: Work) -> Any:
        if self.static.rows_total % self.static.tiles.block_q == 0:
            return True
        return (work.i * self.static.tiles.compute + self.warpgroup) * WARPGROUP_ROWS < self.static.rows_total

    def so_far(self, work: Work) -> tuple[Array, Array, Array]:
        """acc, maximum and sum to go on from. Loads return at once: what comes is first needed a product later."""
        acc = full((WARPGROUP_ROWS, self.scratch.v_smem.shape[-1]), 0.0, MATRIX)
        if self.x.carry is None:
            return acc, full((WARPGROUP_ROWS,), NO_LOGIT, ROWS), full((WARPGROUP_ROWS,), 0.0, ROWS)
        at = (work.b, work.n, self.rows_there(work))
        top, total = (invariant(gpu_load(x.at[at], ROWS, optimized=False)) for x in self.x.carry[1:])
        if not self.static.carry_in_smem:
            acc = self.load_acc(work)
        return acc, top, total

    def load_acc(self, work: Work) -> Array:
        """acc of the carry, see :func:`ringjax.kernels.mosaic.forward.carry_shape`."""
        load = lambda gmem: invariant(gpu_load(gmem, MATRIX, optimized=False))  # noqa: E731
        if self.x.carry[0].ndim == 4:
            return load(self.x.carry[0].at[work.b, work.n, self.rows_there(work)])
        tile_gmem = self.blocks(self.x.carry[0], work)
        return jnp.concatenate([load(tile_gmem.at[i]) for i in range(tile_gmem.shape[0])], axis=1)

    def store_acc(self, work: Work, acc: Array) -> None:
        if self.out[0].ndim == 4:
            self.out[0].at[work.b, work.n, self.rows_there(work)][...] = acc
            return
        tile_gmem = self.blocks(self.out[0], work)
        for i in range(tile_gmem.shape[0]):
            tile_gmem.at[i][...] = acc[:, COLUMN_BLOCK * i : COLUMN_BLOCK * (i + 1)]

    def blocks(self, acc_gmem: Any, work: Work) -> Any:
        return acc_gmem.at[work.b, work.n, jax.lax.div(self.rows_there(work).start, WARPGROUP_ROWS)]

    def attend(self, work: Work, count: Array, acc: Array, top: Array, total: Array) -> tuple[Array, Array, Array]:
        """acc, max and sum over the tiles of one row. Invariant: p of tile t - 1 meets v in step t."""
        scratch = self.scratch
        plgpu.barrier_wait(scratch.q_ready.at[self.warpgroup])
        if not self.static.tiles.overlap:
            return self.attend_plainly(work, count, acc, top, total)
        running = self.first(work, count, acc, top, total)
        self.release_carry()
        running = jax.lax.fori_loop(1, work.full, lambda t, r: self.step(work, count, t, r, masked=False), running)
        if self.static.masked:
            running = jax.lax.fori_loop(
                jnp.maximum(work.full, 1), work.visit, lambda t, r: self.step(work, count, t, r, masked=True), running
            )
        if not self.through_q():
            plgpu.barrier_arrive(scratch.q_consumed.at[self.warpgroup])
        last = self.slot(count + work.visit - 1)
        self.take_turn()

        def values(acc_ref: Any) -> None:
            plgpu.wgmma(acc_ref, running.p, self.own(scratch.v_smem, last))
            self.pass_turn("issued")

        summed: Any = pl.run_state(values)(plgpu.WGMMAAccumulatorRef.init(running.acc))
        self.pass_turn("logits")
        plgpu.barrier_arrive(scratch.v_consumed.at[last])
        return summed, running.max, running.sum

    def attend_plainly(
        self, work: Work, count: Array, acc: Array, top: Array, total: Array
    ) -> tuple[Array, Array, Array]:
        """The same, one product after the other: fewer registers, so more warpgroups to hide each other's waits."""
        self.release_carry()
        state = (acc, top, total)
        state = jax.lax.fori_loop(0, work.full, lambda t, s: self.plain_step(work, count, t, s, masked=False), state)
        if self.static.masked:
            state = jax.lax.fori_loop(
                work.full, work.visit, lambda t, s: self.plain_step(work, count, t, s, masked=True), state
            )
        return state

    def plain_step(self, work: Work, count: Array, t: Array, state: Any, *, masked: bool) -> Any:
        acc, top, total = state
        scratch, slot = self.scratch, self.slot(count + t)
        plgpu.barrier_wait(scratch.k_ready.at[slot])
        self.take_turn()
        s = common.scores(self.products(slot), self.static.params)
        self.pass_turn("logits")
        plgpu.barrier_arrive(scratch.k_consumed.at[slot])
        if not self.through_q():  # so that the next ones arrive while this row ends
            pl.when(t == work.visit - 1)(lambda: plgpu.barrier_arrive(scratch.q_consumed.at[self.warpgroup]))
        if masked:
            s = jnp.where(self.allowed(work, t), s, -jnp.inf)
        p, top, total, rescale = self.softmax(s, top, total)
        p = p.astype(scratch.q_smem.dtype)
        plgpu.barrier_wait(scratch.v_ready.at[slot])
        if masked:
            acc = self.mark_poison(work, t, slot, acc)
        acc = self.add_values(acc * row_matrix(rescale, acc), p, slot)
        plgpu.barrier_arrive(scratch.v_consumed.at[slot])
        return acc, top, total

    def first(self, work: Work, count: Array, acc: Array, top: Array, total: Array) -> Running:
        """The first tile, whose keys have no predecessor's values to be multiplied beside them."""
        slot = self.slot(count)
        plgpu.barrier_wait(self.scratch.k_ready.at[slot])
        self.take_turn()
        s = self.products(slot)
        self.pass_turn("logits")
        plgpu.barrier_arrive(self.scratch.k_consumed.at[slot])
        s = common.scores(s, self.static.params)
        if self.static.masked:
            s = jax.lax.cond(
                work.full > 0, lambda s: s, lambda s: jnp.where(self.allowed(work, jnp.int32(0)), s, -jnp.inf), s
            )
        p, top, total, rescale = self.softmax(s, top, total)
        if self.static.carried and not self.static.carry_in_smem:
            acc = acc * row_matrix(rescale, acc)
        plgpu.barrier_wait(self.scratch.v_ready.at[slot])
        if self.static.masked:
            acc = jax.lax.cond(
                work.full > 0, lambda acc: acc, lambda acc: self.mark_poison(work, jnp.int32(0), slot, acc), acc
            )
        return Running(acc, top, total, p.astype(self.scratch.q_smem.dtype))

    def step(self, work: Work, count: Array, t: Array, running: Running, *, masked: bool) -> Running:
        """Tile t of the row: q k^T of this tile and p v of the one before run while the softmax waits, then does."""
        scratch = self.scratch
        slot, before = self.slot(count + t), self.slot(count + t - 1)

        def products(refs: Any) -> None:
            acc_ref, *results = refs
            plgpu.barrier_wait(scratch.k_ready.at[slot])
            self.take_turn()
            values = pl.run_scoped(
                lambda s_ref: softmax(acc_ref, s_ref), plgpu.WGMMAAccumulatorRef(self.tile_shape, jnp.float32)
            )
            for ref, value in zip(results, values, strict=True):
                ref[...] = value

        def softmax(acc_ref: Any, s_ref: Any) -> tuple[Array, ...]:
            self.multiply_keys(s_ref, slot)
            plgpu.wgmma(acc_ref, running.p, self.own(scratch.v_smem, before))
            self.pass_turn("issued")
            s = jax.lax.optimization_barrier(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
            self.pass_turn("logits")
            plgpu.barrier_arrive(scratch.k_consumed.at[slot])
            s = common.scores(s, self.static.params)
            if masked:
                s = jnp.where(self.allowed(work, t), s, -jnp.inf)
            p, top, total, rescale = self.softmax(s, running.max, running.sum)
            # These two keep the compiler from putting the softmax behind the wait for p v, which it is to overlap.
            p, top, total, rescale = jax.lax.optimization_barrier((p, top, total, rescale))
            plgpu.barrier_wait(scratch.v_ready.at[slot])
            return top, total, p, rescale

        rows = running.max
        results: Any = pl.run_state(products)(
            (plgpu.WGMMAAccumulatorRef.init(running.acc), rows, rows, full(self.tile_shape, 0.0, MATRIX), rows)
        )
        acc, top, total, p, rescale = results
        plgpu.barrier_arrive(scratch.v_consumed.at[before])
        # p becomes short only now: its registers may be those of the p that was being multiplied.
        running = Running(acc * row_matrix(rescale, acc), top, total, p.astype(scratch.q_smem.dtype))
        if masked:
            running = running._replace(acc=self.mark_poison(work, t, slot, running.acc))
        return running

    def own(self, tiles_smem: Any, slot: Array) -> Any:
        """The keys or values of a slot that this warpgroup multiplies with."""
        if self.static.own_keys == self.static.tiles.block_kv:
            return tiles_smem.at[slot]
        return tiles_smem.at[slot, pl.ds(self.warpgroup * self.static.own_keys, self.static.own_keys)]

    def first_key(self, work: Work, t: Array) -> Array:
        """Where the keys of tile t that this warpgroup multiplies with start."""
        start = column(self.static, self.x, work, t) * self.static.tiles.block_kv
        return (
            start
            if self.static.own_keys == self.static.tiles.block_kv
            else start + self.warpgroup * self.static.own_keys
        )

    def multiply_keys(self, s_ref: Any, slot: Array) -> None:
        q_smem = self.scratch.q_smem.at[self.warpgroup]
        plgpu.wgmma(s_ref, q_smem, self.own(self.scratch.k_smem, slot).transpose((1, 0)))

    def products(self, slot: Array) -> Array:
        """q k^T of one tile."""
        if self.static.params.interpret:
            return jnp.dot(
                self.loaded(self.scratch.q_smem.at[self.warpgroup]), self.loaded(self.own(self.scratch.k_smem, slot)).T
            )

        def multiply(s_ref: Any) -> Array:
            self.multiply_keys(s_ref, slot)
            self.pass_turn("issued")
            return s_ref[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(self.tile_shape, jnp.float32))

    def add_values(self, acc: Array, p: Array, slot: Array) -> Any:
        """acc + p v of one tile."""
        if self.static.params.interpret:
            return acc + jnp.dot(p.astype(jnp.float32), self.loaded(self.own(self.scratch.v_smem, slot)))
        return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, p, self.own(self.scratch.v_smem, slot)))(
            plgpu.WGMMAAccumulatorRef.init(acc)
        )

    @staticmethod
    def loaded(x_smem: Any) -> Array:
        """For JAX's interpreter, which has no WGMMA with an operand in registers.

        TMA may overwrite what WGMMA has read; what a load has read only after a fence.
        """
        x = gpu_load(x_smem, MATRIX, optimized=False).astype(jnp.float32)
        plgpu.commit_smem()
        return x

    def softmax(self, s: Array, old: Array, total: Array) -> tuple[Array, Array, Array, Array]:
        """Weights, new maximum, new sum, and the factor for what was summed before.

        Masked logits are -inf here, and the maximum stays finite (NO_LOGIT at least), so that their weight is 0.
        """
        factor = common.factor(self.static.params)
        new = jnp.maximum(old, jnp.max(_halved(jnp.maximum, s), axis=1) * factor)
        rescale = jnp.exp2(old - new)
        p = jnp.exp2(s * factor - row_matrix(new, s))
        return p, new, total * rescale + jnp.sum(_halved(jnp.add, p), axis=1), rescale

    def allowed(self, work: Work, t: Array) -> Array:
        """The predicate of tile t for this warpgroup's queries."""
        rule = self.static.rule
        assert rule is not None
        q_start, k_start = self.static.first_query(work, self.warpgroup), self.first_key(work, t)
        return common.allowed(rule, self.x.mask, work.b, q_start=q_start, k_start=k_start, shape=self.tile_shape)

    def mark_poison(self, work: Work, t: Array, slot: Array, acc: Array) -> Array:
        """NaN in the outputs of queries that attend to a value that is NaN or Inf, which is then set to zero in SMEM.

        0 * NaN would reach the others too. Slow, and hardly ever done.
        """
        return jax.lax.cond(
            self.scratch.flags_smem[slot, 0] == 0.0, lambda acc: acc, lambda acc: self.poisoned(work, t, slot, acc), acc
        )

    def poisoned(self, work: Work, t: Array, slot: Array, acc: Array) -> Array:
        rule = self.static.rule
        assert rule is not None
        kv_head = jax.lax.div(work.n, self.static.heads // self.static.kv_heads)
        first_key, start = self.first_key(work, t), self.static.first_query(work, self.warpgroup)

        def key(c: Array, acc: Array) -> Array:
            index = first_key + c
            shape = (acc.shape[0], acc.shape[1])
            queries = common.query_side(rule, self.x.mask, work.b, start, shape, 0)
            # Beyond the last key nothing is allowed, whatever is read.
            token = jnp.minimum(index, self.x.v.shape[1] - 1)
            value = gpu_load(self.x.v.at[work.b, token, kv_head], COLUMNS, optimized=False)
            bad = ~is_finite(column_matrix(value.astype(jnp.float32), acc))
            may = attends(queries, common.one_key(rule, self.x.mask, work.b, index, shape))
            return jnp.where(bad & may, jnp.nan, acc)

        acc = jax.lax.fori_loop(0, self.static.own_keys, key, acc)
        self.meet()  # all have read what is now set to zero

        @pl.when(self.warpgroup == 0)
        def _() -> None:
            for row in range(0, self.static.tiles.block_kv, WARPGROUP_ROWS):
                tile_smem = self.scratch.v_smem.at[slot, pl.ds(row, WARPGROUP_ROWS)]
                values = gpu_load(tile_smem, MATRIX, optimized=False)
                wide = values.astype(jnp.float32)
                tile_smem[...] = jnp.where(is_finite(wide), wide, 0.0).astype(values.dtype)
            plgpu.commit_smem()

        self.meet()
        return acc

    def end(self, work: Work, old_top: Array, acc: Array, top: Array, total: Array, *, visited: bool) -> None:
        """Write a new carry, or acc / l and LN_2 * m + log(l), 0 and -inf over no keys."""
        at = (work.b, work.n, self.rows_there(work))
        if self.static.carry_by_tma:
            plgpu.barrier_wait(self.scratch.acc_ready.at[self.warpgroup])
            old = gpu_load(self.scratch.acc_smem.at[self.warpgroup], MATRIX, optimized=False)
            acc = acc + old * row_matrix(jnp.exp2(old_top - top), acc)
        if self.static.finish:
            self.finish(work, acc, top, total, visited=visited)
            return

        def write() -> None:
            self.out[1].at[at][...] = top
            self.out[2].at[at][...] = total
            if not self.static.carry_in_smem:
                self.store_acc(work, acc)

        pl.when(self.has_rows(work))(write)
        if self.static.carry_in_smem:
            self.store(acc, self.scratch.acc_smem.at[self.warpgroup], self.out[0].at[work.b, work.n, self.rows(work)])

    def finish(self, work: Work, acc: Array, top: Array, total: Array, *, visited: bool) -> None:
        scratch = self.scratch
        at = (work.b, work.n, self.rows_there(work))
        end = close(LN_2 * top, total, None if self.x.sinks is None else self.x.sinks[work.n])
        acc, lse = acc * row_matrix(end.weight, acc), end.lse

        @pl.when(self.has_rows(work))
        def _() -> None:
            self.out[1].at[at][...] = lse

        through_q = self.through_q()
        if through_q and not visited:
            plgpu.barrier_wait(scratch.q_ready.at[self.warpgroup])  # there are none, but their SMEM is free
        stage_smem = (scratch.q_smem if through_q else scratch.out_smem).at[self.warpgroup]
        if self.static.splits:
            there = self.static.rows_out
            part = pl.ds((work.i * self.static.tiles.compute + self.warpgroup) * there, there)
            self.store(acc, stage_smem, self.out[0].at[work.b, part, work.n], there)
            return
        self.store(acc, stage_smem, self.out[0].at[work.b, self.rows(work), work.n])
        if through_q:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(scratch.q_consumed.at[self.warpgroup])

    def store(self, acc: Array, stage_smem: Any, out_gmem: Any, rows: int = WARPGROUP_ROWS) -> None:
        """Through SMEM to GMEM, by TMA, which leaves out what lies beyond the last query."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        stage_smem[...] = acc.astype(stage_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stage_smem if rows == WARPGROUP_ROWS else stage_smem.at[pl.ds(0, rows)], out_gmem)

    def through_q(self) -> bool:
        return self.static.finish and self.scratch.out_smem is None

    def slot(self, count: Array) -> Array:
        return jax.lax.rem(count, self.static.tiles.stages)

    def take_turn(self) -> None:
        if self.static.tiles.turns != "none":
            plgpu.barrier_wait(self.scratch.turn.at[self.warpgroup])

    def pass_turn(self, event: str) -> None:
        if self.static.tiles.turns == event:
            following = jax.lax.rem(self.warpgroup + 1, self.static.tiles.compute)
            plgpu.barrier_arrive(self.scratch.turn.at[following])

    def meet(self) -> None:
        plgpu.barrier_arrive(self.scratch.met)
        plgpu.barrier_wait(self.scratch.met)


def invariant(x: Array) -> Array:
    """For loops: under check_vma what is read from GMEM is typed as varying over a mesh, what is computed is not."""
    return x * jnp.ones((), x.dtype)


def _halved(op: Any, x: Array) -> Array:
    """Columns combined by halves, down to 32: independent operations, where a reduction is a chain of them."""
    while x.shape[1] > 32 and x.shape[1] % 16 == 0:
        half = x.shape[1] // 2
        x = op(x[:, :half], x[:, half:])
    return x
