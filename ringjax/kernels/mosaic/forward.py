"""The forward block kernel for Hopper GPUs: folds one K/V block into the running softmax, which goes in and comes out.

A block of threads is some warpgroups that multiply, 64 queries each, and one that loads: TMA brings tiles of keys and
values into a ring of slots in SMEM. Of a row's tiles the FULL ones come first, without a predicate, then the PARTIAL
ones with it, EMPTY ones not at all. Products run behind the softmax in one of two ways: three warpgroups hide each
other's, or two also multiply p v of the previous tile beside q k^T of this one. Everything is in base 2,

    s = LOG2_E logits,    m = max s,    l = sum exp2(s - m),    acc = sum exp2(s - m) v,

and so is the maximum in the carry, which only this kernel reads. Any m near the maximum does as well, and where a FULL
tile need not wait for its own, m is that of the tiles before, until l gets large; see :meth:`Compute.guess`.

The carry is changed in place, so a row of tiles with nothing to visit costs nothing. Its acc comes and goes by TMA
behind the compute, joining at the end of a row, where there is SMEM for it; otherwise each warpgroup starts from it and
writes it back, in blocks of columns, see :func:`carry_shape`.

After Shah et al. 2024, arXiv:2407.08608; online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..._compat import GPU_CONCATENATES, gpu_kernel, shape_like, vary_like
from ...mask import Mask
from ...partial import Partial
from ..base import Block, Finished, KernelParams
from . import common, ptx
from . import tiles as tile_sizes
from .common import COLUMN_BLOCK, MaskArrays
from .forward_common import COLUMN, DRAWS, POISONED, Inputs, Scratch, Static, Work, column, marks, walk
from .forward_compute import Compute
from .forward_poison import look
from .signals import signals
from .tiles import SMEM_BYTES, WARPGROUP_ROWS, TileSizes, head_size

# From where on blocks of threads draw their work (docs/optimisation-log.md): so many tiles each, if all rows visited as
# many as the longest.
ENOUGH_TILES = 128
ENOUGH_ROWS = 3 * tile_sizes.MULTIPROCESSORS  # of heads that then take turns


def forward(
    block: Block, params: KernelParams, tiles: TileSizes, carry: Partial | None, *, finish: bool
) -> Partial | Finished:
    """See :class:`ringjax.kernels.base.Kernel`."""
    q, k, v, mask, sinks = block
    (batch, heads, q_length, _), (_, kv_heads, k_length, v_size) = q.shape, v.shape
    dtype = q.dtype
    num_q, num_kv = pl.cdiv(q_length, tiles.block_q), pl.cdiv(k_length, tiles.block_kv)
    size, v_padded = head_size(q.shape[3]), head_size(v_size)
    # Whole warpgroups; those of the last tile that have no queries leave it alone.
    rows_total = -(-q_length // WARPGROUP_ROWS) * WARPGROUP_ROWS
    carry_in_smem = _carry_in_smem(tiles, size, v_padded, carry is not None, finish)
    if carry is not None:
        carry_in_smem &= carry.acc.ndim == 4
    taken = tiles.smem_bytes(size, v_padded, finish=finish) + carry_in_smem * _carry_bytes(tiles, v_padded)
    reference = q
    # A box of TMA should not be longer than the array.
    least = max(WARPGROUP_ROWS, tiles.block_kv)
    q, k, v = (common.token_major(x, head_size(x.shape[3]), least) for x in (q, k, v))
    rule, of_mask = common.prepare_mask(mask, (q_length, k_length), (tiles.block_q, tiles.block_kv), rows="queries")
    rows = None if carry is None else tuple(carry)
    # A carry that goes on is changed in place: rows of tiles that have nothing to visit cost nothing.
    updated = rows if rows is not None and not finish else ()
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        mask=of_mask,
        carry=None if updated else rows,
        sinks=sinks.astype(jnp.float32) if finish and sinks is not None else None,
    )
    num_items = batch * heads * num_q
    num_blocks = min(num_items, tile_sizes.MULTIPROCESSORS) if tiles.persistent else num_items
    draws, group_heads = _order_of_work(mask, of_mask, tiles, (batch, heads, kv_heads, num_q, num_kv), num_blocks)
    static = Static(
        params=params,
        tiles=tiles,
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        num_q=num_q,
        num_kv=num_kv,
        group_heads=math.gcd(group_heads, batch * heads),
        num_blocks=num_blocks,
        finish=finish,
        carried=rows is not None,
        carry_in_smem=carry_in_smem,
        rule=rule,
        rows_total=rows_total,
        marks=marks(tiles, of_mask.keys, taken),
        draws=draws and not params.interpret,
    )
    row = shape_like((batch, heads, rows_total), jnp.float32, reference)
    if finish:
        # Clipped by TMA at the true length.
        result = (shape_like((batch, q.shape[1], heads, v_padded), dtype, reference), row)
    elif updated:
        result = ()
    else:
        acc = shape_like(carry_shape(tiles, reference.shape, v_size), jnp.float32, reference)
        result = (acc, row, row)
    changed, results = launch(static, inputs, updated, result)
    if finish:
        out, lse = results
        return Finished(out=jnp.swapaxes(out, 1, 2)[:, :, :q_length, :v_size], lse=lse[:, :, :q_length])
    return Partial(*changed, *results)


def launch(static: Static, inputs: Inputs, updated: tuple[Array, ...], result: Any) -> tuple[Any, ...]:
    """Runs the kernel: what it changed in place, and its other results, which are of the types ``result``."""
    tiles = static.tiles
    kernel = _Kernel(static, jax.tree.structure(inputs), len(updated), len(result))
    counter = (vary_like(jnp.zeros((1,), jnp.int32), *jax.tree.leaves(inputs)),) if static.draws else ()
    scratch = kernel.scratch(inputs.q.shape[3], inputs.v.shape[3], inputs.q.dtype)
    kernel = dataclasses.replace(kernel, allocated=jax.tree.structure(scratch, is_leaf=_is_type))
    changed, results = gpu_kernel(
        kernel,
        jax.tree.leaves(inputs),
        (*updated, *counter),
        out_type=result,
        scratch_types=jax.tree.leaves(scratch, is_leaf=_is_type),
        grid=(static.num_blocks,),
        grid_names=("block",),
        num_threads=tiles.compute + 1,
        thread_name="warpgroup",
        kernel_name="ringjax_decode" if static.splits else "ringjax_forward",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=512 if static.params.interpret else 0,  # rows are summed within a warp
        ),
    )
    return changed[: len(updated)], results


def _order_of_work(
    mask: Mask, rows: MaskArrays, tiles: TileSizes, problem: tuple[int, int, int, int, int], num_blocks: int
) -> tuple[bool, int]:
    """Whether blocks of threads draw rows of tiles, and how many query heads take turns before the next ones do.

    Heads that share keys take turns: their keys then are in the cache. If rows are unequal, all do, so that every block
    has as much. Of rows that are drawn fewer will do, if a layout made them; of documents the longest are so much
    longer than others that they should not come late.

    Args:
      rows: what the mask makes of them. Equal without counts.
      problem: batch, heads, kv_heads, rows of tiles of one head, columns of tiles.
    """
    batch, heads, kv_heads, num_q, num_kv = problem
    group = heads // kv_heads
    if rows.counts is None:
        return False, tiles.group_heads or group
    of_keys = num_kv * tiles.block_kv
    visits = min(num_kv, pl.cdiv(common.reach(mask, of_keys, tiles.block_q), tiles.block_kv) + 1)  # seldom aligned
    # A counter costs XLA a kernel more, some 10 us, and brings a few percent.
    draws = batch * heads * num_q * visits >= ENOUGH_TILES * num_blocks
    together = batch * kv_heads
    if draws and rows.order is None:
        together = tile_sizes.heads_together(together, group * num_q, ENOUGH_ROWS)
    return draws, tiles.group_heads or group * together


def carry_shape(tiles: TileSizes, q_shape: tuple[int, ...], v_size: int) -> tuple[int, ...]:
    """The shape of acc, which stays padded between hops: [B, N, T, Dv] where it comes and goes by TMA.

    [B, N, T / 64, Dv / 8, 64, 8] where it goes between registers and GMEM: the threads of a warp have 8 rows of 8
    columns between them, which so are 256 bytes in a row.
    """
    batch, heads, q_length, size = q_shape
    num_tiles, v_size = -(-q_length // WARPGROUP_ROWS), head_size(v_size)
    if GPU_CONCATENATES and not _carry_in_smem(tiles, head_size(size), v_size, True, False):
        return batch, heads, num_tiles, v_size // COLUMN_BLOCK, WARPGROUP_ROWS, COLUMN_BLOCK
    return batch, heads, num_tiles * WARPGROUP_ROWS, v_size


def _carry_in_smem(tiles: TileSizes, size: int, v_size: int, carry: bool, finish: bool) -> bool:
    """Whether the carry comes and goes by TMA, behind the compute: where the SMEM has room for it."""
    taken = tiles.smem_bytes(size, v_size, finish=finish) + _carry_bytes(tiles, v_size)
    return taken <= SMEM_BYTES and (carry or not finish)


def _carry_bytes(tiles: TileSizes, v_size: int) -> int:
    return tiles.block_q * v_size * 4


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel's body. ``inputs`` and ``allocated`` are the structures of what there is; some may be absent."""

    static: Static
    inputs: Any
    num_updated: int
    num_results: int
    allocated: Any = None

    def scratch(self, size: int, v_size: int, dtype: Any) -> Scratch:
        """What to allocate; None: nothing."""
        static, tiles = self.static, self.static.tiles
        queries = (tiles.compute, WARPGROUP_ROWS)
        out = acc = carried = left = turn = None
        rows = static.marks * tiles.stages + 1
        if static.params.interpret:
            left = plgpu.Barrier(num_arrivals=tiles.compute, num_barriers=tiles.stages)
            turn = plgpu.Barrier(num_barriers=tiles.compute)
        # Otherwise the output goes through the SMEM of the queries.
        if static.finish and tiles.has_out_smem(size, v_size):
            out = common.smem_tile((*queries, v_size), jnp.float32 if static.splits else dtype)
        if static.carry_in_smem:
            acc = common.smem_tile((*queries, v_size), jnp.float32)
            carried = plgpu.Barrier(num_barriers=tiles.compute)
        return Scratch(
            q_smem=common.smem_tile((*queries, size), dtype),
            k_smem=common.smem_tile((tiles.stages, tiles.block_kv, size), dtype),
            v_smem=common.smem_tile((tiles.stages, tiles.block_kv, v_size), dtype),
            out_smem=out,
            acc_smem=acc,
            q_ready=plgpu.Barrier(num_barriers=tiles.compute),
            q_consumed=plgpu.Barrier(num_barriers=tiles.compute),
            k_ready=plgpu.Barrier(num_barriers=tiles.stages),
            v_ready=plgpu.Barrier(num_barriers=tiles.stages),
            acc_ready=carried,
            acc_consumed=carried,
            k_free=left,
            v_free=left,
            turn=turn,
            met=plgpu.Barrier(num_arrivals=tiles.compute),
            v_landed=plgpu.Barrier(num_barriers=tiles.stages) if static.masked else None,
            marks_smem=plgpu.SMEM((rows, tiles.block_kv), jnp.int32) if static.masked else None,
            marked=plgpu.Barrier(num_arrivals=1 + static.marks, num_barriers=tiles.stages) if static.masked else None,
            drawn=plgpu.Barrier(num_barriers=DRAWS) if static.draws else None,
            seen=plgpu.Barrier(num_arrivals=tiles.compute, num_barriers=DRAWS) if static.draws else None,
        )

    def __call__(self, *refs: Any) -> None:
        tiles = self.static.tiles
        x = jax.tree.unflatten(self.inputs, refs[: self.inputs.num_leaves])
        refs = refs[self.inputs.num_leaves :]
        out, refs = refs[: self.num_updated], refs[self.num_updated :]
        if self.num_updated:
            x = x._replace(carry=out)
        counter, refs = (refs[0], refs[1:]) if self.static.draws else (None, refs)
        out, refs = (*out, *refs[: self.num_results]), refs[self.num_results :]
        scratch = jax.tree.unflatten(self.allocated, refs)
        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when(warpgroup < tiles.compute)
        def _() -> None:
            if tiles.registers is not None:
                plgpu.set_max_registers(tiles.registers[1], action="increase")
            Compute(self.static, x, out, scratch, warpgroup).run()

        @pl.when(warpgroup == tiles.compute)
        def _() -> None:
            if tiles.registers is not None:
                plgpu.set_max_registers(tiles.registers[0], action="decrease")
            _load(self.static, x, scratch, counter)


def _load(static: Static, x: Inputs, scratch: Scratch, counter: Any) -> None:
    """The loading warpgroup: keys and values into the ring as slots come free, queries behind the first of them."""
    tiles, signal = static.tiles, signals(static.tiles, scratch)

    def one(work: Work, count: Array) -> Array:
        kv_head = jax.lax.div(work.n, static.heads // static.kv_heads)

        def tile(t: Array, count: Array) -> Array:
            slot = jax.lax.rem(count, tiles.stages)
            number = column(static, x, work, t)
            keys = pl.ds(number * tiles.block_kv, tiles.block_kv)
            at = (work.b, keys, kv_head)
            signal.k_free.wait(slot)
            plgpu.copy_gmem_to_smem(x.k.at[at], scratch.k_smem.at[slot], scratch.k_ready.at[slot])

            @pl.when(t == 0)
            def _() -> None:
                for w in range(tiles.compute):
                    rows = pl.ds(static.first_query(work, w), WARPGROUP_ROWS)
                    plgpu.barrier_wait(scratch.q_consumed.at[w])
                    plgpu.copy_gmem_to_smem(x.q.at[work.b, rows, work.n], scratch.q_smem.at[w], scratch.q_ready.at[w])

            signal.v_free.wait(slot)
            v_smem = scratch.v_smem.at[slot]
            if not static.masked:
                plgpu.copy_gmem_to_smem(x.v.at[at], v_smem, scratch.v_ready.at[slot])
                return count + 1

            @pl.when(t < work.full)
            def _() -> None:
                plgpu.copy_gmem_to_smem(x.v.at[at], v_smem, scratch.v_ready.at[slot])

            @pl.when(t >= work.full)
            def _() -> None:
                scratch.marks_smem[scratch.flag(slot, COLUMN)] = number
                for n, vector in enumerate(jax.tree.leaves(x.mask.keys)[: static.marks]):
                    of_keys = vector.at[common.batch_row(vector, work.b), keys]
                    mark_smem = scratch.marks_smem.at[static.mark(slot, n)]
                    plgpu.copy_gmem_to_smem(of_keys, mark_smem, scratch.marked.at[slot])
                plgpu.barrier_arrive(scratch.marked.at[slot])
                plgpu.copy_gmem_to_smem(x.v.at[at], v_smem, scratch.v_landed.at[slot])
                plgpu.barrier_wait(scratch.v_landed.at[slot])
                scratch.marks_smem[scratch.flag(slot, POISONED)] = look(static, v_smem, signal.look)
                plgpu.barrier_arrive(scratch.v_ready.at[slot])

            return count + 1

        count = jax.lax.fori_loop(0, work.visit, tile, count)
        if static.masked and static.finish and scratch.out_smem is None:

            @pl.when(work.visit == 0)
            def _() -> None:
                # The output goes through the SMEM of the queries, and only this warpgroup knows when it is free.
                for w in range(tiles.compute):
                    plgpu.barrier_wait(scratch.q_consumed.at[w])
                    plgpu.barrier_arrive(scratch.q_ready.at[w])

        if not static.carry_by_tma:
            return count

        @pl.when(static.reads_carry(work))
        def _() -> None:
            for w in range(tiles.compute):
                rows = pl.ds((work.i * tiles.compute + w) * WARPGROUP_ROWS, WARPGROUP_ROWS)
                plgpu.barrier_wait(scratch.acc_consumed.at[w])
                plgpu.copy_gmem_to_smem(
                    x.carry[0].at[work.b, work.n, rows], scratch.acc_smem.at[w], scratch.acc_ready.at[w]
                )

        return count

    def draw(n: Array) -> Array:
        place, place_smem = scratch.place(n)
        pl.when(n >= DRAWS)(lambda: plgpu.barrier_wait(scratch.seen.at[place]))
        item = ptx.draw(counter, place_smem, signal.look)
        plgpu.barrier_arrive(scratch.drawn.at[place])
        return static.num_blocks + item

    walk(static, x, one, draw)
    if static.params.interpret:  # which wants every arrival to be waited for
        for slot in range(tiles.stages):
            signal.k_free.wait(slot)
            signal.v_free.wait(slot)
        for w in range(tiles.compute):
            plgpu.barrier_wait(scratch.q_consumed.at[w])


def _is_type(x: Any) -> bool:
    return isinstance(x, (pl.MemoryRef, plgpu.Barrier)) or hasattr(x, "get_ref_aval")
