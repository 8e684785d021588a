"""The multiplying warpgroups of the forward kernel for GPU, and what they share with the one that loads.

Each has 64 queries and keeps their running softmax in registers while tiles of keys and values pass by in SMEM. See
:mod:`ringjax.kernels.mosaic.forward`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..._compat import gpu_load
from ...partial import NO_LOGIT, close
from . import common, ptx
from .common import COLUMN_BLOCK, COLUMNS, LN_2, MATRIX, ROWS, full, row_matrix, zeros
from .forward_common import COLUMN, Inputs, Scratch, Static, Work, invariant, walk
from .forward_poison import contain
from .signals import Signals, signals
from .tiles import WARPGROUP_ROWS

# Of guessed weights, summed over an eighth of the keys: more is taken back. acc then may be so many times the largest
# value, which leaves float32 room for values of up to 2^80.
MOST = 2.0**40
LARGE = 2.0**20


class Running(NamedTuple):
    """The running softmax of 64 queries, in registers; ``p`` are the weights of the last tile, not yet in ``acc``."""

    acc: Array
    max: Array
    sum: Array
    p: Array


@dataclasses.dataclass(frozen=True)
class Compute:
    """A multiplying warpgroup."""

    static: Static
    x: Inputs
    out: Any
    scratch: Scratch
    warpgroup: Array

    @property
    def signals(self) -> Signals:
        return signals(self.static.tiles, self.scratch)

    @property
    def guesses(self) -> bool:
        """Whether weights of a FULL tile are those of the maximum of the tiles before, see :meth:`guess`.

        float16 has not the range for it, three warpgroups not the registers.
        """
        static = self.static
        if self.scratch.q_smem.dtype != jnp.bfloat16 or static.splits:
            return False
        return static.params.interpret or static.tiles.guesses

    @property
    def sums_by_column(self) -> bool:
        """Whether the running sum is one for every column of a block until the row ends, so that no thread asks others.

        Three warpgroups that overlap have the registers for it only without a mask and a carry.
        """
        static = self.static
        if self.guesses or static.masked or static.splits:
            return self.guesses
        return not static.tiles.overlap or (static.finish and not static.carried)

    @property
    def tile_shape(self) -> tuple[int, int]:
        return WARPGROUP_ROWS, self.static.own_keys

    def run(self) -> None:
        tiles, scratch = self.static.tiles, self.scratch
        for slot in range(tiles.stages):
            self.signals.k_free.give(slot)
            self.signals.v_free.give(slot)
        plgpu.barrier_arrive(scratch.q_consumed.at[self.warpgroup])
        if tiles.turns != "none":
            pl.when(self.warpgroup == tiles.compute - 1)(lambda: self.signals.turn.give(0))
        walk(self.static, self.x, self.one, self.drawn)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def drawn(self, n: Array) -> Array:
        """What the loading warpgroup has drawn."""
        place, place_smem = self.scratch.place(n)
        plgpu.barrier_wait(self.scratch.drawn.at[place])
        item = place_smem[0]
        plgpu.barrier_arrive(self.scratch.seen.at[place])
        return self.static.num_blocks + item

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
        """acc, max and sum over the tiles of one row."""
        if self.static.masked:  # this early, since GMEM takes its time
            q_start = self.static.first_query(work, self.warpgroup)
            queries = common.load_vectors(self.x.mask.queries, work.b, q_start, WARPGROUP_ROWS, 0)
            work = work._replace(queries=jax.tree.map(invariant, queries))
        plgpu.barrier_wait(self.scratch.q_ready.at[self.warpgroup])
        if self.sums_by_column:
            total = row_matrix(total * (1.0 / COLUMN_BLOCK), zeros((WARPGROUP_ROWS, COLUMN_BLOCK)))
        attend = self.attend_overlapped if self.static.tiles.overlap else self.attend_plainly
        acc, top, total = attend(work, count, acc, top, total)
        return acc, top, jnp.sum(total, axis=1) if self.sums_by_column else total

    def attend_overlapped(
        self, work: Work, count: Array, acc: Array, top: Array, total: Array
    ) -> tuple[Array, Array, Array]:
        """The products of one tile beside the softmax of another. Invariant: p of tile t - 1 meets v in step t."""
        scratch = self.scratch
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
        if not self.static.masked:
            plgpu.barrier_wait(scratch.v_ready.at[last])
        self.take_turn()

        def values(acc_ref: Any) -> None:
            plgpu.wgmma(acc_ref, running.p, self.own(scratch.v_smem, last))
            self.pass_turn("issued")

        summed: Any = pl.run_state(values)(plgpu.WGMMAAccumulatorRef.init(running.acc))
        self.pass_turn("logits")
        self.signals.v_free.give(last)
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
        s = common.scores(self.products(slot, in_turn=True), self.static.params)
        self.pass_turn("logits")

        def release_keys() -> None:
            self.signals.k_free.give(slot)
            if not self.through_q():  # so that the next ones arrive while this row ends
                pl.when(t == work.visit - 1)(lambda: plgpu.barrier_arrive(scratch.q_consumed.at[self.warpgroup]))

        if self.guesses and not masked:
            p, guessed = self.guess(s, top, total)
            wrong = jnp.max(guessed) > MOST
            state = (acc, top, guessed, p)
            acc, top, total, p = jax.lax.cond(
                wrong, lambda _: self.again(slot, acc, top, total), lambda state: state, state
            )
            release_keys()
        else:
            release_keys()
            if masked:
                s = jnp.where(self.allowed(work, slot), s, -jnp.inf)
            p, top, total, rescale = self.softmax(s, top, total)
            acc = acc * row_matrix(rescale, acc)
        p = p.astype(scratch.q_smem.dtype)
        plgpu.barrier_wait(scratch.v_ready.at[slot])
        if masked:
            acc = self.contain_poison(work, slot, acc)
        acc = self.add_values(acc, p, slot)
        self.signals.v_free.give(slot)
        return acc, top, total

    def first(self, work: Work, count: Array, acc: Array, top: Array, total: Array) -> Running:
        """The first tile, whose keys have no predecessor's values to be multiplied beside them."""
        slot = self.slot(count)
        plgpu.barrier_wait(self.scratch.k_ready.at[slot])
        self.take_turn()
        s = self.products(slot, in_turn=True)
        self.pass_turn("logits")
        self.signals.k_free.give(slot)
        s = common.scores(s, self.static.params)
        if self.static.masked:
            s = jax.lax.cond(work.full > 0, lambda s: s, lambda s: jnp.where(self.allowed(work, slot), s, -jnp.inf), s)
        p, top, total, rescale = self.softmax(s, top, total)
        if self.static.carried and not self.static.carry_in_smem:
            acc = acc * row_matrix(rescale, acc)
        if self.static.masked:
            plgpu.barrier_wait(self.scratch.v_ready.at[slot])
            acc = jax.lax.cond(work.full > 0, lambda acc: acc, lambda acc: self.contain_poison(work, slot, acc), acc)
        return Running(acc, top, total, p.astype(self.scratch.q_smem.dtype))

    def step(self, work: Work, count: Array, t: Array, running: Running, *, masked: bool) -> Running:
        """Tile t of the row: q k^T of this tile and p v of the one before run while the softmax waits, then does."""
        scratch, guesses = self.scratch, self.guesses and not masked
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
            if not self.static.masked:  # under a mask the step before has waited for them
                plgpu.barrier_wait(scratch.v_ready.at[before])
            plgpu.wgmma(acc_ref, running.p, self.own(scratch.v_smem, before))
            self.pass_turn("issued")
            s = jax.lax.optimization_barrier(plgpu.wgmma_accumulator_load(s_ref, wait_n=1))
            self.pass_turn("logits")
            if not guesses:
                self.signals.k_free.give(slot)
            s = common.scores(s, self.static.params)
            if masked:
                s = jnp.where(self.allowed(work, slot), s, -jnp.inf)
            # These two keep the compiler from putting the softmax behind the wait for p v, which it is to overlap.
            # Where weights are guessed the question does too: it needs all of them.
            if guesses:
                p, total = jax.lax.optimization_barrier(self.guess(s, running.max, running.sum))
                wrong = ptx.any_above(total, MATRIX, MOST, self.signals.retry + self.warpgroup)
                rest = p, total, wrong.astype(jnp.int32)
            else:
                rest = jax.lax.optimization_barrier(self.softmax(s, running.max, running.sum))
            if self.static.masked:
                plgpu.barrier_wait(scratch.v_ready.at[slot])
            return rest

        start, p = plgpu.WGMMAAccumulatorRef.init(running.acc), full(self.tile_shape, 0.0, MATRIX)
        # p becomes short only now: its registers may be those of the p that was being multiplied.
        if guesses:
            guessed: Any = pl.run_state(products)((start, p, running.sum, jnp.int32(0)))
            acc, p, total, wrong = guessed
            self.signals.v_free.give(before)
            acc, top, total, p = jax.lax.cond(
                wrong > 0,
                lambda _: self.again(slot, acc, running.max, running.sum),
                lambda state: state,
                (acc, running.max, total, p),
            )
            self.signals.k_free.give(slot)
            return Running(acc, top, total, p.astype(scratch.q_smem.dtype))
        rows = running.max
        results: Any = pl.run_state(products)((start, p, rows, running.sum, rows))
        acc, p, top, total, rescale = results
        self.signals.v_free.give(before)
        running = Running(acc * row_matrix(rescale, acc), top, total, p.astype(scratch.q_smem.dtype))
        if masked:
            running = running._replace(acc=self.contain_poison(work, slot, running.acc))
        return running

    def own(self, tiles_smem: Any, slot: Array) -> Any:
        """The keys or values of a slot that this warpgroup multiplies with."""
        if self.static.own_keys == self.static.tiles.block_kv:
            return tiles_smem.at[slot]
        return tiles_smem.at[slot, pl.ds(self.warpgroup * self.static.own_keys, self.static.own_keys)]

    def first_key(self, slot: Array) -> Array:
        """Where the keys of a PARTIAL tile that this warpgroup multiplies with start."""
        start = self.scratch.marks_smem[self.scratch.flag(slot, COLUMN)] * self.static.tiles.block_kv
        return (
            start
            if self.static.own_keys == self.static.tiles.block_kv
            else start + self.warpgroup * self.static.own_keys
        )

    def multiply_keys(self, s_ref: Any, slot: Array) -> None:
        q_smem = self.scratch.q_smem.at[self.warpgroup]
        plgpu.wgmma(s_ref, q_smem, self.own(self.scratch.k_smem, slot).transpose((1, 0)))

    def products(self, slot: Array, *, in_turn: bool) -> Array:
        """q k^T of one tile."""
        if self.static.params.interpret:
            return jnp.dot(
                self.loaded(self.scratch.q_smem.at[self.warpgroup]), self.loaded(self.own(self.scratch.k_smem, slot)).T
            )

        def multiply(s_ref: Any) -> Array:
            self.multiply_keys(s_ref, slot)
            if in_turn:
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

    def softmax(
        self, s: Array, old: Array, total: Array, least: Array | None = None
    ) -> tuple[Array, Array, Array, Array]:
        """Weights, new maximum, new sum, and the factor for what was summed before. The maximum is ``least`` at least.

        Masked logits are -inf here, and the maximum stays finite (NO_LOGIT at least), so that their weight is 0.
        """
        tile_max = jnp.max(_halved(jnp.maximum, s), axis=1) * common.factor(self.static.params)
        new = jnp.maximum(old if least is None else least, tile_max)
        rescale = jnp.exp2(old - new)
        p, added = self.guess(s, new, jnp.zeros_like(total))
        return p, new, total * (row_matrix(rescale, total) if self.sums_by_column else rescale) + added, rescale

    def guess(self, s: Array, top: Array, total: Array) -> tuple[Array, Array]:
        """Weights and new sum of a tile, with ``top`` in place of the maximum.

        Any number that is near it gives the same digits, since bfloat16 has the exponents of float32; the maximum of
        the first tile mostly is near enough for the row. Then nobody waits for a maximum, and acc is not rescaled.
        """
        p = jnp.exp2(s * common.factor(self.static.params) - row_matrix(top, s))
        return p, total + (_folded(p) if self.sums_by_column else jnp.sum(_halved(jnp.add, p), axis=1))

    def again(self, slot: Array, acc: Array, top: Array, total: Array) -> tuple[Array, Array, Array, Array]:
        """acc, maximum, sum and weights where a guess came out above MOST, from the products and the maximum.

        What was below MOST until now is brought down as well if it is large, so that not every tile ends up here.
        """
        s = common.scores(self.products(slot, in_turn=False), self.static.params)
        least = jnp.where(jnp.sum(total, axis=1) > LARGE, top + math.log2(LARGE), top)
        p, top, total, rescale = self.softmax(s, top, total, least)
        return acc * row_matrix(rescale, acc), top, total, p

    def allowed(self, work: Work, slot: Array) -> Array:
        """The predicate of a slot's tile for this warpgroup's queries."""
        rule = self.static.rule
        assert rule is not None
        plgpu.barrier_wait(self.scratch.marked.at[slot])
        vectors, structure = jax.tree.flatten(self.x.mask.keys)
        b, own = work.b, pl.ds(self.first_key(slot), self.static.own_keys)
        there = [
            self.own(self.scratch.marks_smem, self.static.mark(slot, n)) if n < self.static.marks
            else x_gmem.at[common.batch_row(x_gmem, b), own]
            for n, x_gmem in enumerate(vectors)
        ]  # fmt: skip
        keys = jax.tree.unflatten(structure, [gpu_load(x, COLUMNS, optimized=False) for x in there])
        return common.allowed(
            rule,
            self.x.mask,
            work.b,
            q_start=self.static.first_query(work, self.warpgroup),
            k_start=self.first_key(slot),
            shape=self.tile_shape,
            queries=work.queries,
            keys=keys,
        )

    def contain_poison(self, work: Work, slot: Array, acc: Array) -> Array:
        """See :mod:`ringjax.kernels.mosaic.forward_poison`."""
        return contain(
            self.static,
            self.x,
            self.scratch,
            work,
            acc,
            warpgroup=self.warpgroup,
            slot=slot,
            first_key=self.first_key(slot),
            meet=self.meet,
        )

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
            self.signals.turn.wait(self.warpgroup)

    def pass_turn(self, event: str) -> None:
        if self.static.tiles.turns == event:
            following = jax.lax.rem(self.warpgroup + 1, self.static.tiles.compute)
            self.signals.turn.give(following)

    def meet(self) -> None:
        plgpu.barrier_arrive(self.scratch.met)
        plgpu.barrier_wait(self.scratch.met)


def _halved(op: Any, x: Array) -> Array:
    """Columns combined by halves, down to 32: independent operations, where a reduction is a chain of them."""
    while x.shape[1] > 32 and x.shape[1] % 16 == 0:
        half = x.shape[1] // 2
        x = op(x[:, :half], x[:, half:])
    return x


def _folded(x: Array) -> Array:
    """Columns added up by blocks: within a thread, where a sum over all would ask three others."""
    while x.shape[1] > COLUMN_BLOCK:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x
