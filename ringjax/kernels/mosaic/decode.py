"""Few queries for Hopper GPUs: the forward kernel with rows folded (:mod:`ringjax.kernels.fold`) and keys split.

Reading keys and values once is all the work there is, so all multiprocessors must read all the time, however few rows
of the batch and heads there are. The tiles that a row visits are therefore dealt out to some splits of equal length,
each a work item with a result of its own; the warpgroups of a block have the same queries, and each its part of a tile
of keys. Results are normalised, in float32, and XLA merges them. After Flash-Decoding: Dao, Haziza, Massa and Sizov
2023, https://pytorch.org/blog/flash-decoding/.
"""

import jax.numpy as jnp
from jax.experimental import pallas as pl

from ..._compat import shape_like
from ..base import Block, Finished, KernelParams
from ..fold import fold, rows_of, unfold
from . import common
from .forward import launch
from .forward_common import Inputs, Static, marks
from .tiles import MULTIPROCESSORS, SMEM_BYTES, WARPGROUP_ROWS, TileSizes, head_size


def suits(block: Block, params: KernelParams) -> bool:
    """Whether all queries are rows of one warpgroup, and no tiles are asked for, which would be those of forward."""
    return rows_of(block) <= WARPGROUP_ROWS and params.block_q is None and params.block_kv is None


def forward(block: Block, params: KernelParams, tiles: TileSizes) -> Finished:
    """Of the only hop; see :class:`ringjax.kernels.base.Kernel`."""
    folded = fold(block)
    batch, heads, rows, _ = folded.q.shape
    k_length, v_size = folded.v.shape[2:]
    least = max(WARPGROUP_ROWS, tiles.block_kv)  # a box of TMA should not be longer than the array
    k, v = (common.token_major(x, head_size(x.shape[3]), least) for x in (folded.k, folded.v))
    q = common.token_major(folded.q, head_size(folded.q.shape[3]), WARPGROUP_ROWS)
    lengths, blocks = (rows, k_length), (WARPGROUP_ROWS, tiles.block_kv)
    rule, of_mask = common.prepare_mask(folded.mask, lengths, blocks, rows="queries")
    num_kv = pl.cdiv(k_length, tiles.block_kv)
    splits = best_splits(batch * heads, num_kv)
    parts, rows_out = splits * tiles.compute, -(-rows // 8) * 8
    static = Static(
        params=params,
        tiles=tiles,
        batch=batch,
        heads=heads,
        kv_heads=heads,
        num_q=splits,
        num_kv=num_kv,
        group_heads=1,
        num_blocks=min(batch * heads * splits, MULTIPROCESSORS),
        finish=True,
        carried=False,
        carry_in_smem=False,
        rule=rule,
        rows_total=parts * WARPGROUP_ROWS,
        splits=splits,
        rows_out=rows_out,
        marks=marks(tiles, of_mask.keys, SMEM_BYTES),
    )
    size = v.shape[3]
    result = (
        shape_like((batch, parts * rows_out, heads, size), jnp.float32, folded.q),
        shape_like((batch, heads, parts * WARPGROUP_ROWS), jnp.float32, folded.q),
    )
    inputs = Inputs(q=q, k=k, v=v, mask=of_mask, carry=None, sinks=None)
    _, (out, lse) = launch(static, inputs, (), result)
    out = out.reshape(batch, parts, rows_out, heads, size)[:, :, :rows, :, :v_size]
    lse = lse.reshape(batch, heads, parts, WARPGROUP_ROWS)[..., :rows]
    return unfold(block, jnp.transpose(out, (1, 0, 3, 2, 4)), jnp.transpose(lse, (2, 0, 1, 3)))


def best_splits(rows: int, columns: int) -> int:
    """Into how many to split each of so many rows of tiles: so that the busiest block of threads has least to do.

    What a work item costs beside its tiles is about one more tile.
    """

    def most(splits: int) -> int:
        return -(-rows * splits // MULTIPROCESSORS) * (-(-columns // splits) + 1)

    return min(range(1, min(columns, 4 * MULTIPROCESSORS) + 1), key=most)
