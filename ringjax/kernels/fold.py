"""Few queries, as in decoding: the query heads that share keys become rows of one matrix, so that keys are read once.

A block with G query heads for each K/V head and T queries is one with K heads and G T queries. Query t of head k G + g
is row g T + t of head k, where q, head-major, has it already. Sinks and absent queries enter when results are merged.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..layout import Runs
from ..mask import Tokens
from ..partial import combine
from .base import Block, Finished


def rows_of(block: Block) -> int:
    """G T, the rows of a folded block."""
    return block.q.shape[1] // block.k.shape[1] * block.q.shape[2]


def fold(block: Block) -> Block:
    """The same block with a row for each head and query. All its queries are present, and it has no sinks."""
    batch, heads, length, size = block.q.shape
    kv_heads = block.k.shape[1]
    group = heads // kv_heads
    mask = dataclasses.replace(block.mask, queries=_rows(block.mask.queries, length, group))
    return Block(q=block.q.reshape(batch, kv_heads, group * length, size), k=block.k, v=block.v, mask=mask)


def _rows(queries: Tokens, length: int, group: int) -> Tokens:
    positions, segments = queries.positions, queries.segments
    if isinstance(positions, Runs) and group > 1:
        if positions.run >= length:
            # Each head's queries start where the first one's do. Kernels ask only for the first and the last row.
            positions = Runs(base=positions.base, step=0, run=length, length=group * length)
        else:
            positions = jnp.atleast_2d(positions.at(jnp.arange(length, dtype=jnp.int32)))
    if group > 1 and positions is not None and not isinstance(positions, Runs):
        positions = jnp.tile(positions, (1, group))
    return Tokens(positions=positions, segments=None if segments is None else jnp.tile(segments, (1, group)))


def present(block: Block) -> Bool[Array, "B1 T"] | None:
    """Which queries of the block there are. None: all."""
    count = block.mask.queries.length
    return None if count is None else jnp.arange(block.q.shape[2], dtype=jnp.int32)[None] < count[:, None]


def unfold(block: Block, outs: Float[Array, "P B K R Hv"], lses: Float[Array, "P B K R"]) -> Finished:
    """The result of the block before it was folded, from those of P disjoint sets of its keys."""
    batch, heads, length, _ = block.q.shape
    shape = (*outs.shape[:1], batch, heads, length)
    outs, lses = outs.reshape(*shape, outs.shape[-1]), lses.reshape(shape)
    there, sinks = present(block), block.sinks
    if there is not None:
        there = there[None, :, None, :]
        lses = jnp.where(there, lses, jnp.log(there.astype(lses.dtype)))  # -inf: it attends to nothing
    out, lse = combine(outs, lses, None if sinks is None else sinks[None, :, None])
    return Finished(out=out.astype(block.q.dtype), lse=lse)
