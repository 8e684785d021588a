"""The backward kernel that owns keys: dk and dv of a tile, and dq on the way. Hopper GPUs, five products per tile.

A program owns 128 keys of one K/V head: 64 each for two compute warpgroups, which keep their rows of dk and dv in
registers while the queries that attend to them pass by, brought by a memory warpgroup. Logits are worked on transposed,
keys along rows: then p^T and ds^T lie in registers as dv = p^T dout and dk = ds^T q want their left operands, and only
dq = ds k takes ds through SMEM. It sums over the keys of both warpgroups; each computes one half of it and has TMA add
it to dq in GMEM. Those sums come in the order in which programs get there: dq differs in its last bits from run to run.

The tensor cores should never wait, and SMEM is as busy as they are, least under dv and dk, whose left operands it need
not bring. So exponentials are taken under v dout^T, ds under p^T dout; dq is stored under ds^T q, and, registers
permitting, the logits of the next tile follow at once. One barrier per tile joins the two warpgroups: then ds of both
is there for dq, and dq of the tile before for TMA.

NaN or Inf in dout, or in the output, reaches whole rows of dv in PARTIAL tiles, for the keys that its query attends to;
other kernels confine it to a column.

FlashAttention-2's recurrences, Dao 2023, arXiv:2307.08691; the division of work after FlashAttention-3, Shah et al.
2024, arXiv:2407.08608; the equations are in base.py.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..._compat import gpu_kernel, gpu_load
from . import backward_common as gpu
from . import ptx
from .backward_common import BLOCK_KV, COMPUTE_WARPGROUPS, Inputs, Place, Static
from .common import COLUMNS, column_matrix, is_finite, smem_tile, zeros
from .tiles import WARPGROUP_ROWS


class _Outputs(NamedTuple):
    """Refs or types of what comes out. None: not asked for."""

    dq: Any  # [B, T, N, H], added to
    dk: Any  # [B, S, K, H]
    dv: Any


class _Scratch(NamedTuple):
    k_smem: Any  # [keys, H]
    v_smem: Any
    q_smem: Any  # [stages, queries, H]
    dout_smem: Any
    rows_smem: Any  # [stages, 2, queries]: lse and delta
    ds_smem: Any  # [2, keys, queries]: ds^T
    sums_smem: Any  # [2, warpgroups, 64, 64]: float32 on its way to GMEM
    keys_ready: Any
    queries_ready: Any  # one per stage
    queries_consumed: Any


class _State(NamedTuple):
    """What a compute warpgroup keeps in registers from tile to tile."""

    dk: Any
    dv: Any
    head: Any  # of the tile before, whose dq is in SMEM and still to be sent
    n: Any  # which of those visited it was. -1: none
    products: Any  # k q^T of the next tile. None: not computed ahead


class _Tile(NamedTuple):
    """One tile of queries to visit."""

    index: Any  # among all that the program visits
    head: Any
    n: Any  # its place among those of a head
    total: Any  # how many are visited
    masked: bool  # PARTIAL, and not FULL


def run(static: Static, x: Inputs, dq: Any, dk: Any, dv: Any) -> tuple[Array | None, ...]:
    """``dq`` with the share of these keys added (None: not computed), and dk and dv, of the types given (likewise)."""
    out_types = [t for t in (dk, dv) if t is not None]
    leaves, structure = jax.tree.flatten(x)
    wanted = _Outputs(dq is not None, dk is not None, dv is not None)

    def body(*refs: Any) -> None:
        inputs = jax.tree.unflatten(structure, refs[: len(leaves)])
        rest = iter(refs[len(leaves) :])
        out = _Outputs(*(next(rest) if want else None for want in wanted))
        program = _Kernel(static, inputs, out, _Scratch(*rest))
        gpu.run_program(program.memory, program.compute)

    batch, k_length, kv_heads, _ = x.k.shape
    num_tiles = -(-k_length // BLOCK_KV)
    added, results = gpu_kernel(
        body,
        leaves,
        () if dq is None else (dq,),
        out_type=out_types,
        grid=(batch, kv_heads, num_tiles),
        grid_names=gpu.GRID_NAMES,
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=tuple(_scratch(static, x, wanted)),
        compiler_params=gpu.COMPILER_PARAMS,
        kernel_name="ringjax_backward_keys",
    )
    rest = iter((*added, *results))
    return tuple(None if t is None else next(rest) for t in (dq, dk, dv))


def _scratch(static: Static, x: Inputs, wanted: _Outputs) -> _Scratch:
    dtype, size, stages, block_q = x.q.dtype, static.size, static.stages, static.block_q
    needs_ds = wanted.dq or wanted.dk
    each_stage = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)  # noqa: E731
    unused = smem_tile((8, 128 // jnp.dtype(dtype).itemsize), dtype)
    return _Scratch(
        smem_tile((BLOCK_KV, size), dtype),
        smem_tile((BLOCK_KV, size), dtype) if needs_ds else unused,
        smem_tile((stages, block_q, size), dtype),
        smem_tile((stages, block_q, size), dtype),
        plgpu.SMEM((stages, 2, block_q), jnp.float32),
        smem_tile((2, BLOCK_KV, block_q), dtype) if wanted.dq else unused,
        smem_tile((2 if wanted.dq else 1, COMPUTE_WARPGROUPS, WARPGROUP_ROWS, WARPGROUP_ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2 if needs_ds else 1),
        each_stage(3),
        each_stage(COMPUTE_WARPGROUPS),
    )


@dataclasses.dataclass(frozen=True)
class _Kernel:
    static: Static
    x: Inputs
    out: _Outputs
    scratch: _Scratch

    @property
    def needs_ds(self) -> bool:
        return self.out.dq is not None or self.out.dk is not None

    def memory(self, place: Place) -> None:
        static, x, s = self.static, self.x, self.scratch
        block_q, stages = static.block_q, static.stages
        plgpu.set_max_registers(24, action="decrease")
        keys = (place.batch, pl.ds(place.tile * BLOCK_KV, BLOCK_KV), place.head)
        plgpu.copy_gmem_to_smem(x.k.at[keys], s.k_smem, s.keys_ready)
        if self.needs_ds:
            plgpu.copy_gmem_to_smem(x.v.at[keys], s.v_smem, s.keys_ready)

        def load(index: Any, head: Any, n: Any, _: None) -> None:
            tile = gpu.column(x, place, n)
            slot = jax.lax.rem(index, jnp.int32(stages))
            queries = pl.ds(tile * block_q, block_q)
            pl.when(index >= stages)(lambda: plgpu.barrier_wait(s.queries_consumed.at[slot]))
            ready = s.queries_ready.at[slot]
            plgpu.copy_gmem_to_smem(x.q.at[place.batch, queries, head], s.q_smem.at[slot], ready)
            plgpu.copy_gmem_to_smem(x.rows.at[place.batch, head, :, queries], s.rows_smem.at[slot], ready)
            plgpu.copy_gmem_to_smem(x.dout.at[place.batch, queries, head], s.dout_smem.at[slot], ready)

        full, visit = gpu.counts(x, place)
        gpu.visit(static, place, jnp.int32(0), full, load, jnp.int32(0), None)
        if static.masked:
            gpu.visit(static, place, full, visit, load, full * static.group, None)

    @property
    def ahead(self) -> bool:
        """Whether the logits of a tile are computed while the one before is at work. Needs 32 registers of room."""
        return self.out.dq is not None and self.static.block_q == WARPGROUP_ROWS

    def compute(self, place: Place) -> None:
        static, x = self.static, self.x
        plgpu.set_max_registers(240, action="increase")
        dq, dk, dv = self.out
        nothing = lambda ref: None if ref is None else zeros((WARPGROUP_ROWS, static.size))  # noqa: E731
        plgpu.barrier_wait(self.scratch.keys_ready)
        full, visit = gpu.counts(x, place)
        total = visit * static.group
        before = (None, None) if dq is None else (jnp.int32(-1), jnp.int32(-1))
        state = _State(nothing(dk), nothing(dv), *before, self._first_products(place, total))

        def step(masked: bool) -> Any:
            return lambda index, head, n, state: self._add(_Tile(index, head, n, total, masked), place, state)

        state = gpu.visit(static, place, jnp.int32(0), full, step(False), jnp.int32(0), state)
        if static.masked:
            pl.when(full < visit)(lambda: self._clean_keys(place))
            state = gpu.visit(static, place, full, visit, step(True), full * static.group, state)
        if dq is not None:
            gpu.join_compute_warpgroups()
            self._send_dq(place, total, state, self._tile_before(place, state))
        scale = static.params.scale
        if dk is not None:
            self._store(place, state.dk, dk, self.scratch.k_smem)
        if dv is not None:
            dv_total = state.dv * (1.0 / scale) if static.folds_scale else state.dv
            self._store(place, dv_total, dv, self.scratch.v_smem if self.needs_ds else self.scratch.k_smem)
        plgpu.wait_smem_to_gmem(0)

    def _add(self, now: _Tile, place: Place, state: _State) -> _State:
        """One tile of queries: dk and dv with its share added, its dq in SMEM, that of the tile before sent off."""
        s, dtype = self.scratch, self.x.q.dtype
        slot = jax.lax.rem(now.index, jnp.int32(self.static.stages))
        q_smem, dout_smem = s.q_smem.at[slot], s.dout_smem.at[slot]
        if not self.ahead:
            plgpu.barrier_wait(s.queries_ready.at[slot])

        def products(refs: Any) -> None:
            dk_acc, dv_acc, logits_acc, dp_acc, dq_acc = refs
            ds: Any = None  # of no use where neither dk nor dq is wanted
            tile_before: Any = None
            if not self.ahead:
                self._products(place, logits_acc, slot)
            multiply_dp = lambda: plgpu.wgmma(dp_acc, s.v_smem.at[place.own], dout_smem.transpose((1, 0)))  # noqa: E731
            if self.needs_ds and not now.masked:
                multiply_dp()
            p, slope = self._probabilities(now, place, slot, logits_acc, state)
            weights = p.astype(dtype)
            if dv_acc is not None and not now.masked:
                plgpu.wgmma(dv_acc, weights, dout_smem)
            if self.needs_ds:
                if now.masked:  # one after the other: the predicate takes the registers
                    multiply_dp()
                dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0 if now.masked or dv_acc is None else 1)
                ds = self._ds(now, slot, p, dp, slope)
            if dq_acc is not None:
                s.ds_smem.at[now.index & 1, place.own][...] = ds
                # Before the barrier: the half of sums_smem that is written next has been read.
                ptx.instruction("cp.async.bulk.wait_group.read 0;")
            if dq_acc is not None or now.masked:
                gpu.join_compute_warpgroups()
            if now.masked:  # now that both have used the raw numbers
                self._clean_queries(place, q_smem, dout_smem)
                gpu.join_compute_warpgroups()
                if dv_acc is not None:
                    plgpu.wgmma(dv_acc, weights, dout_smem)
            if dq_acc is not None:
                tile_before = self._tile_before(place, state)  # this early, since GMEM takes its time
                queries, columns = self._half(place)
                ds_smem = s.ds_smem.at[now.index & 1, :, queries]
                plgpu.wgmma(dq_acc, ds_smem.transpose((1, 0)), s.k_smem.at[:, columns])
            if dk_acc is not None:
                plgpu.wgmma(dk_acc, ds, q_smem)
            if dq_acc is not None:
                dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)
                if self.ahead:
                    self._next_products(now, place, logits_acc)
                self._send_dq(place, now.index, state, tile_before)
                self._sums(place, now.index)[...] = dq

        start = lambda x: None if x is None else plgpu.WGMMAAccumulatorRef.init(x)  # noqa: E731
        logits = (WARPGROUP_ROWS, self.static.block_q)
        dk, dv, following, *_ = pl.run_state(products)(
            (
                start(state.dk),
                start(state.dv),
                start(zeros(logits)),
                start(zeros(logits)) if self.needs_ds else None,
                start(None if self.out.dq is None else zeros((WARPGROUP_ROWS, WARPGROUP_ROWS))),
            )
        )
        plgpu.barrier_arrive(s.queries_consumed.at[slot])
        before = (None, None) if self.out.dq is None else (now.head, now.n)
        return _State(dk, dv, *before, following if self.ahead else None)

    def _probabilities(
        self, now: _Tile, place: Place, slot: Any, logits_acc: Any, state: _State
    ) -> tuple[Array, Array | float | None]:
        static, x = self.static, self.x
        lse = gpu_load(self.scratch.rows_smem.at[slot, 0], COLUMNS)
        products = state.products
        if not self.ahead:
            products = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1 if self.needs_ds and not now.masked else 0)
        p, slope = gpu.softmax(static, products, column_matrix(lse, products))
        if now.masked:
            q_start = gpu.column(x, place, now.n) * static.block_q
            k_start = place.tile * BLOCK_KV + place.own.start
            shape = (p.shape[0], p.shape[1])
            may = gpu.allowed(static, x, place, q_start=q_start, k_start=k_start, shape=shape, q_axis=1)
            # A NaN or Inf in dout is taken out later on. It has left its trace in delta: NaN to all that it reaches.
            delta = gpu_load(self.scratch.rows_smem.at[slot, 1], COLUMNS)
            p = jnp.where(column_matrix(is_finite(delta), p), p, jnp.nan)
            p = jnp.where(may, p, 0.0)
        return p, slope

    def _ds(self, now: _Tile, slot: Any, p: Array, dp: Array, slope: Array | float | None) -> Array:
        delta = gpu_load(self.scratch.rows_smem.at[slot, 1], COLUMNS)
        ds = p * (dp - column_matrix(delta, p))
        ds = ds if slope is None else ds * slope
        # A NaN of an attended pair is in p already, so p = 0 is where the query does not attend to the key.
        return (jnp.where(p == 0.0, 0.0, ds) if now.masked else ds).astype(self.x.q.dtype)

    def _products(self, place: Place, acc: Any, slot: Any) -> None:
        plgpu.wgmma(acc, self.scratch.k_smem.at[place.own], self.scratch.q_smem.at[slot].transpose((1, 0)))

    def _first_products(self, place: Place, total: Any) -> Array | None:
        if not self.ahead:
            return None
        pl.when(total > 0)(lambda: plgpu.barrier_wait(self.scratch.queries_ready.at[0]))

        def multiply(acc: Any) -> Any:
            self._products(place, acc, 0)
            return acc[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((WARPGROUP_ROWS, self.static.block_q), jnp.float32))

    def _next_products(self, now: _Tile, place: Place, acc: Any) -> None:
        """After the last tile those of whatever lies there: nobody will look at them."""
        slot = jax.lax.rem(now.index + 1, jnp.int32(self.static.stages))
        pl.when(now.index + 1 < now.total)(lambda: plgpu.barrier_wait(self.scratch.queries_ready.at[slot]))
        self._products(place, acc, slot)

    def _tile_before(self, place: Place, state: _State) -> Any:
        return gpu.column(self.x, place, jnp.maximum(state.n, 0))

    def _half(self, place: Place) -> tuple[Any, Any]:
        """Which queries and columns of a tile's dq this warpgroup computes: 64 x 64."""
        first = pl.ds(0, WARPGROUP_ROWS)
        return (place.own, first) if self.static.size == WARPGROUP_ROWS else (first, place.own)

    def _sums(self, place: Place, index: Any) -> Any:
        """Where dq of the index-th tile waits in SMEM."""
        return self.scratch.sums_smem.at[index & 1, place.warpgroup]

    def _send_dq(self, place: Place, index: Any, state: _State, tile: Any) -> None:
        """Adds dq of the tile before the index-th: a barrier later, every thread has stored its part."""
        queries, columns = self._half(place)
        rows = pl.ds(tile * self.static.block_q + queries.start, WARPGROUP_ROWS)
        out_gmem = self.out.dq.at[place.batch, rows, state.head, columns]
        plgpu.copy_smem_to_gmem(self._sums(place, index - 1), out_gmem, state.n >= 0, reduction_op="add")

    def _store(self, place: Place, total: Array, out_gmem: Any, done_smem: Any) -> None:
        """This warpgroup's rows of dk or dv: float32 by 64 columns, 16 bits at once, where keys or values have been."""
        sums_smem = self.scratch.sums_smem.at[0, place.warpgroup]
        keys = pl.ds(place.tile * BLOCK_KV + place.own.start, WARPGROUP_ROWS)
        if out_gmem.dtype == done_smem.dtype:
            done_smem.at[place.own][...] = total.astype(out_gmem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(done_smem.at[place.own], out_gmem.at[place.batch, keys, place.head])
            return
        for start in range(0, self.static.size, WARPGROUP_ROWS):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            sums_smem[...] = jax.lax.slice(total, (0, start), (WARPGROUP_ROWS, start + WARPGROUP_ROWS))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(sums_smem, out_gmem.at[place.batch, keys, place.head, pl.ds(start, WARPGROUP_ROWS)])

    def _clean_keys(self, place: Place) -> None:
        """Before PARTIAL tiles: a masked NaN or Inf in k must not meet ds = 0. Where it is attended lse has it."""
        gpu.join_compute_warpgroups()
        for start in range(0, self.static.size, WARPGROUP_ROWS):
            gpu.clean(self.scratch.k_smem.at[place.own, pl.ds(start, WARPGROUP_ROWS)])
        gpu.join_compute_warpgroups()

    def _clean_queries(self, place: Place, q_smem: Any, dout_smem: Any) -> None:
        """The same of a tile of queries, which are right operands of dk and dv. Each warpgroup does one half."""
        for start in range(0, self.static.size, 2 * WARPGROUP_ROWS):
            queries, columns = self._half(place)
            part = (queries, pl.ds(start + columns.start, WARPGROUP_ROWS))
            gpu.clean(q_smem.at[part])
            gpu.clean(dout_smem.at[part])
