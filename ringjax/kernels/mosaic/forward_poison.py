"""NaN and Inf among the values of PARTIAL tiles, in the forward kernel for GPU: they reach who attends to them alone.

0 * NaN would reach the others too. So the loading warpgroup looks through the values of these tiles, and where it finds
something, which is slow and hardly ever happens, it is set to zero, and the outputs concerned to NaN.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from ..._compat import gpu_load
from ...mask import attends
from . import common, ptx
from .common import COLUMNS, MATRIX, column_matrix, is_finite, swizzled
from .forward_common import POISONED, Inputs, Scratch, Static, Work
from .tiles import WARPGROUP_ROWS


def look(static: Static, v_smem: Any, barrier: int) -> Array:
    """1 if a tile of values holds NaN or Inf, otherwise 0."""
    if static.params.interpret:
        values = gpu_load(v_smem, MATRIX, optimized=False)
        return jnp.max(jnp.where(is_finite(values.astype(jnp.float32)), 0.0, 1.0)).astype(jnp.int32)
    return ptx.any_not_finite_in_smem(v_smem, swizzled(v_smem.dtype), barrier).astype(jnp.int32)


def contain(
    static: Static,
    x: Inputs,
    scratch: Scratch,
    work: Work,
    acc: Array,
    *,
    warpgroup: Array,
    slot: Array,
    first_key: Array,
    meet: Callable[[], None],
) -> Array:
    """acc, NaN where queries attend to a value that is NaN or Inf, which is then set to zero in its slot.

    Args:
      first_key: of the slot that this warpgroup multiplies with.
      meet: waits for all multiplying warpgroups.
    """

    def marked(acc: Array) -> Array:
        rule = static.rule
        assert rule is not None
        kv_head = jax.lax.div(work.n, static.heads // static.kv_heads)
        start = static.first_query(work, warpgroup)

        def key(c: Array, acc: Array) -> Array:
            index = first_key + c
            shape = (acc.shape[0], acc.shape[1])
            queries = common.query_side(rule, x.mask, work.b, start, shape, 0)
            # Beyond the last key nothing is allowed, whatever is read.
            token = jnp.minimum(index, x.v.shape[1] - 1)
            value = gpu_load(x.v.at[work.b, token, kv_head], COLUMNS, optimized=False)
            bad = ~is_finite(column_matrix(value.astype(jnp.float32), acc))
            may = attends(queries, common.one_key(rule, x.mask, work.b, index, shape))
            return jnp.where(bad & may, jnp.nan, acc)

        acc = jax.lax.fori_loop(0, static.own_keys, key, acc)
        meet()  # all have read what is now set to zero

        @pl.when(warpgroup == 0)
        def _() -> None:
            for row in range(0, static.tiles.block_kv, WARPGROUP_ROWS):
                tile_smem = scratch.v_smem.at[slot, pl.ds(row, WARPGROUP_ROWS)]
                values = gpu_load(tile_smem, MATRIX, optimized=False)
                wide = values.astype(jnp.float32)
                tile_smem[...] = jnp.where(is_finite(wide), wide, 0.0).astype(values.dtype)
            plgpu.commit_smem()

        meet()
        return acc

    return jax.lax.cond(scratch.marks_smem[scratch.flag(slot, POISONED)] == 0, lambda acc: acc, marked, acc)
