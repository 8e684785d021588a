"""The backward kernel that owns queries: dq alone, the same bits on every run. Hopper GPUs, three products per tile.

A program owns 128 queries of one head: 64 each for two compute warpgroups, which keep their rows of dq in registers
while the keys that they attend to pass by, brought by a memory warpgroup. ds lies in registers as dq = ds k wants its
left operand. FlashAttention-2's recurrences, Dao 2023, arXiv:2307.08691; the equations are in base.py.
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
from .backward_common import COMPUTE_WARPGROUPS, Inputs, Place, Static, Tile
from .common import ROWS, row_matrix, smem_tile, zeros
from .tiles import WARPGROUP_ROWS

BLOCK_Q = WARPGROUP_ROWS * COMPUTE_WARPGROUPS


class _Scratch(NamedTuple):
    q_smem: Any  # [warpgroups, 64, H]
    dout_smem: Any
    k_smem: Any  # [stages, keys, H]
    v_smem: Any
    sums_smem: Any  # [warpgroups, 64, 64]: float32 on its way to GMEM
    queries_ready: Any  # one per warpgroup
    keys_ready: Any  # one per stage
    keys_consumed: Any


def run(static: Static, x: Inputs, dq: Array) -> Array:
    """``dq`` with the share of these keys added: once to each element."""
    leaves, structure = jax.tree.flatten(x)
    batch, q_length, heads, _ = x.q.shape
    tiles = -(-q_length // BLOCK_Q)

    def body(*refs: Any) -> None:
        inputs = jax.tree.unflatten(structure, refs[: len(leaves)])
        program = _Kernel(static, inputs, refs[len(leaves)], _Scratch(*refs[len(leaves) + 1 :]))
        batch, head, turn = (jax.lax.axis_index(name) for name in gpu.GRID_NAMES)
        if inputs.mask.order is None:  # the last queries of a causal mask have the most keys: they start first
            turn = tiles - 1 - turn
        gpu.run_program(gpu.place_of(inputs, batch, head, turn), program.memory, program.compute)

    dtype, size, stages = x.q.dtype, static.size, static.stages
    each_stage = lambda arrivals: plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages)  # noqa: E731
    (added,), _ = gpu_kernel(
        body,
        leaves,
        (dq,),
        out_type=(),
        grid=(batch, heads, tiles),
        grid_names=gpu.GRID_NAMES,
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=tuple(
            _Scratch(
                smem_tile((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, size), dtype),
                smem_tile((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, size), dtype),
                smem_tile((stages, static.block_kv, size), dtype),
                smem_tile((stages, static.block_kv, size), dtype),
                smem_tile((COMPUTE_WARPGROUPS, WARPGROUP_ROWS, WARPGROUP_ROWS), jnp.float32),
                plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_WARPGROUPS),
                each_stage(2),
                each_stage(COMPUTE_WARPGROUPS),
            )
        ),
        compiler_params=gpu.COMPILER_PARAMS,
        kernel_name="ringjax_backward_queries",
    )
    return added


@dataclasses.dataclass(frozen=True)
class _Kernel:
    static: Static
    x: Inputs
    dq_gmem: Any
    scratch: _Scratch

    def _queries(self, place: Place) -> Any:
        return pl.ds(place.tile * BLOCK_Q + place.own.start, WARPGROUP_ROWS)

    def memory(self, place: Place) -> None:
        static, x, s = self.static, self.x, self.scratch
        block_kv, stages = static.block_kv, static.stages
        plgpu.set_max_registers(24, action="decrease")
        for w in range(COMPUTE_WARPGROUPS):
            rows = (place.batch, self._queries(place._replace(warpgroup=w)), place.head)
            plgpu.copy_gmem_to_smem(x.q.at[rows], s.q_smem.at[w], s.queries_ready.at[w])
            plgpu.copy_gmem_to_smem(x.dout.at[rows], s.dout_smem.at[w], s.queries_ready.at[w])
        kv_head = jax.lax.div(place.head, jnp.int32(x.q.shape[2] // x.k.shape[2]))

        def load(now: Tile, _: None) -> None:
            tile = gpu.column(x, place, now.n)
            slot = jax.lax.rem(now.index, jnp.int32(stages))
            keys = (place.batch, pl.ds(tile * block_kv, block_kv), kv_head)
            pl.when(now.index >= stages)(lambda: plgpu.barrier_wait(s.keys_consumed.at[slot]))
            plgpu.copy_gmem_to_smem(x.k.at[keys], s.k_smem.at[slot], s.keys_ready.at[slot])
            plgpu.copy_gmem_to_smem(x.v.at[keys], s.v_smem.at[slot], s.keys_ready.at[slot])

        gpu.visit(static, x, place, load, None)

    def compute(self, place: Place) -> None:
        static, x = self.static, self.x
        plgpu.set_max_registers(240, action="increase")
        plgpu.barrier_wait(self.scratch.queries_ready.at[place.warpgroup])
        rows_gmem = x.rows.at[place.batch, place.head, :, self._queries(place)]
        lse, delta = (gpu_load(rows_gmem.at[n], ROWS, optimized=False) for n in range(2))
        add = lambda dq_acc: gpu.visit(  # noqa: E731
            static, x, place, lambda now, _: self._add(now, place, lse, delta, dq_acc), None
        )
        dq: Any = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(zeros((WARPGROUP_ROWS, static.size))))
        out_gmem = self.dq_gmem.at[place.batch, self._queries(place), place.head]
        gpu.store_float32(dq, out_gmem, self.scratch.sums_smem.at[place.warpgroup], reduction_op="add")
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def _add(self, now: Tile, place: Place, lse: Array, delta: Array, dq_acc: Any) -> None:
        """Adds to dq the share of one tile of keys. An accumulator takes registers from where it is made."""
        static, x, s, dtype = self.static, self.x, self.scratch, self.x.q.dtype
        shape = (WARPGROUP_ROWS, static.block_kv)
        slot = jax.lax.rem(now.index, jnp.int32(static.stages))
        q_smem, dout_smem = s.q_smem.at[place.warpgroup], s.dout_smem.at[place.warpgroup]
        k_smem, v_smem = s.k_smem.at[slot], s.v_smem.at[slot]
        plgpu.barrier_wait(s.keys_ready.at[slot])

        def with_logits(logits_acc: Any) -> Array:
            plgpu.wgmma(logits_acc, q_smem, k_smem.transpose((1, 0)))
            return pl.run_scoped(lambda dp_acc: with_both(logits_acc, dp_acc), accumulator)

        def with_both(logits_acc: Any, dp_acc: Any) -> Array:
            plgpu.wgmma(dp_acc, dout_smem, v_smem.transpose((1, 0)))
            product = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
            p, slope = gpu.softmax(static, product, row_matrix(lse, product))
            dp = plgpu.wgmma_accumulator_load(dp_acc, wait_n=0)
            ds = p * (dp - row_matrix(delta, p))
            return ds if slope is None else ds * slope

        accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
        ds = pl.run_scoped(with_logits, accumulator)
        if now.masked:
            k_start = gpu.column(x, place, now.n) * static.block_kv
            q_start = self._queries(place).start
            may = gpu.allowed(static, x, place, q_start=q_start, k_start=k_start, shape=shape, q_axis=0)
            ds = jnp.where(may, ds, 0.0)
            gpu.clean(place, k_smem)
        plgpu.wgmma(dq_acc, ds.astype(dtype), k_smem)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(s.keys_consumed.at[slot])
