"""The readable block kernel in jax.numpy. Runs everywhere; blocked, so no T x S array ever exists.

A loop over tiles of queries (backward: of keys), in it a loop over the tiles that it visits: FULL ones first, without a
predicate, then PARTIAL ones with it. A tile is of one K/V head on CPUs and TPUs, whose fast memory it is to stay in,
and of as many heads and batch rows as memory allows on GPUs, where every step costs a launch. FlashAttention-2's
recurrences, Dao 2023, arXiv:2307.08691. float32 is multiplied in full on every platform: by default XLA would take TF32
on a GPU, where logits that share an offset lose their digits.

Of 16-bit arrays, weights and their gradients stay wide on CPUs and TPUs: rounded, the sum of ds over the keys would not
be 0 any more, and what keys share would multiply it. On GPUs they are rounded, as in the kernels there and in dense
attention: tensor cores do not multiply float32 in full.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._compat import vary_like
from ..mask import Rule, Vectors, attends
from ..partial import NO_LOGIT, Partial, close, identity, wide
from .base import Block, Finished, Gradients, KernelParams, Upstream
from .softmax import Normaliser, factor, normaliser, scores, slope, to_save, weights
from .visits import Visits, nth_in_range, plan_visits
from .zeros import zeros_after

TOKEN_MAJOR = False  # see ringjax.kernels.base.Kernel
# 256 x 256 float32 logits (256 KiB) stay in a core's cache, and fewer PARTIAL tiles than with larger ones; see
# docs/optimisation-log.md.
_DEFAULT_TILE = 256
# On GPUs: logits of a head in a tile, with a mask and without; queries at most; and logits in a tile, 256 MiB. With a
# mask smaller tiles leave more out.
_AREA, _FULL_AREA, _QUERIES, _LOGITS = 2**20, 2**22, 1024, 2**26


class _Tiles(NamedTuple):
    """Sizes of one call after padding. The outer loop is over (batch rows, K/V heads, tile)."""

    batch: int
    kv_heads: int
    group: int
    rows: int  # of the batch in a tile: one, or as many as have the same mask
    heads: int  # K/V heads in a tile
    block_q: int
    block_kv: int
    num_q: int
    num_kv: int
    weights: Any  # the dtype in which weights and their gradients are multiplied

    def steps(self, num_tiles: int) -> int:
        return self.batch // self.rows * (self.kv_heads // self.heads) * num_tiles

    def at(self, index: Array, num_tiles: int) -> tuple[Array, Array, Array]:
        """The first batch row and K/V head, and the tile, of a step."""
        part, tile = index // num_tiles, index % num_tiles
        parts = self.kv_heads // self.heads
        return part // parts * self.rows, part % parts * self.heads, tile


class _TileMask(NamedTuple):
    """The mask of a block, to be applied tile by tile."""

    rule: Rule
    queries: Vectors
    keys: Vectors
    numbers: Array  # [B1, 6]

    def allowed(self, b: Array, i: Array, j: Array, tiles: _Tiles) -> Bool[Array, "R S"]:
        """The predicate of one tile, repeated for the G query heads."""
        row = b if self.numbers.shape[0] > 1 else 0
        numbers = tuple(jax.lax.dynamic_index_in_dim(self.numbers, row, keepdims=False))
        of_queries, q_index = _cut(self.queries, b, i, tiles.block_q)
        of_keys, kv_index = _cut(self.keys, b, j, tiles.block_kv)
        columns = jax.tree.map(lambda x: x[:, None], self.rule.of_queries(of_queries, numbers, q_index))
        rows = jax.tree.map(lambda x: x[None, :], self.rule.of_keys(of_keys, numbers[3:], kv_index))
        tile = jnp.broadcast_to(attends(columns, rows), (tiles.group, tiles.block_q, tiles.block_kv))
        return tile.reshape(-1, tiles.block_kv)


def forward(block: Block, params: KernelParams, carry: Partial | None, *, finish: bool) -> Partial | Finished:
    """See :class:`ringjax.kernels.base.Kernel`. The carry's maximum is that of the scores."""
    q, k, v, mask, sinks = block
    dtype, length = wide(q.dtype), q.shape[2]
    tiles = _tiling(block, params)
    if carry is None:
        nothing = identity(q.shape[:3], v.shape[3], dtype)
        (acc,), (q, k, v) = zeros_after((nothing.acc.shape,), (q, k, v), dtype)
        nothing = nothing._replace(acc=acc)
        carry = Partial(*(vary_like(x, q, k, v, *jax.tree.leaves(mask)) for x in nothing))
    visits = plan_visits(mask, length, k.shape[2], tiles.block_q, tiles.block_kv, rows="queries")
    tile_mask = _tile_mask(block, tiles)
    q_tiles = _grouped(_pad(q, tiles.block_q), tiles)
    k, v = _pad(k, tiles.block_kv), _pad(v, tiles.block_kv)
    state = Partial(*(_grouped(_pad(x, tiles.block_q), tiles) for x in carry))

    def row(index: Array, state: Partial) -> Partial:
        b, head, i = tiles.at(index, tiles.num_q)
        q_tile = _query_tile(q_tiles, b, head, i, tiles)

        def column(j: Array, running: Partial, masked: bool) -> Partial:
            k_tile, v_tile = (_key_tile(x, b, head, j, tiles) for x in (k, v))
            s = scores(_dot(q_tile, k_tile, (1, 1), dtype), params)
            allowed = None
            if masked:
                allowed = tile_mask.allowed(b, i, j, tiles)
                s = jnp.where(allowed, s, NO_LOGIT)
            return _fold(running, s, v_tile, allowed, params, tiles)

        running = Partial(*(_query_tile(x, b, head, i, tiles) for x in state))
        running = _visit(visits, b, i, tiles.num_kv, column, running)
        return Partial(*(_put_query_tile(x, new, b, head, i, tiles) for x, new in zip(state, running, strict=True)))

    state = jax.lax.fori_loop(0, tiles.steps(tiles.num_q), row, state)
    result = Partial(*(_ungrouped(x, length) for x in state))
    if not finish:
        return result
    acc, top, total = result
    sink = None if sinks is None else sinks.astype(dtype)[None, :, None]
    end = close(top, total, sink, factor(params))
    wide_out = acc * end.weight[..., None]
    out = wide_out.astype(q.dtype)
    rest = (wide_out - out.astype(dtype)).astype(q.dtype) if out.dtype != dtype else None
    saved = to_save(q.dtype, top, total, end.weight)
    return Finished(out=out, lse=end.lse, saved=saved, rest=rest, sink=end.sink)


def backward(
    block: Block, upstream: Upstream, params: KernelParams, carry: Float[Array, "B N T H"] | None, *, finish: bool
) -> Gradients:
    """See :class:`ringjax.kernels.base.Kernel`. One pass over the tiles: five products each."""
    del finish  # Unused: the carry is dq itself.
    q, k, v, mask, _ = block
    dtype, q_length, k_length = wide(q.dtype), q.shape[2], k.shape[2]
    references = (q, k, v, upstream.dout, *jax.tree.leaves(mask))
    tiles = _tiling(block, params)
    visits = plan_visits(mask, q_length, k_length, tiles.block_q, tiles.block_kv, rows="keys")
    tile_mask = _tile_mask(block, tiles)
    by = normaliser(upstream.lse, upstream.saved, params)
    k, v = _pad(k, tiles.block_kv), _pad(v, tiles.block_kv)
    (dq, dk, dv), (q, k, v, dout) = zeros_after((q.shape, k.shape, v.shape), (q, k, v, upstream.dout), dtype)
    carry, dk, dv = (vary_like(x, *references) for x in (dq if carry is None else carry, dk, dv))
    q, dout, delta, dq, by = jax.tree.map(
        lambda x: _grouped(_pad(x, tiles.block_q), tiles), (q, dout, upstream.delta, carry, by)
    )

    def row(index: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        b, head, j = tiles.at(index, tiles.num_kv)
        k_tile, v_tile = (_key_tile(x, b, head, j, tiles) for x in (k, v))

        def column(i: Array, sums: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
            dq, dk_tile, dv_tile = sums
            q_tile, dout_tile, delta_tile = (_query_tile(x, b, head, i, tiles) for x in (q, dout, delta))
            by_tile = jax.tree.map(lambda x: _query_tile(x, b, head, i, tiles)[..., None], by)
            s = scores(_dot(q_tile, k_tile, (1, 1), dtype), params)
            p = weights(s, by_tile, params)
            ds = p * (_dot(dout_tile, v_tile, (1, 1), dtype) - delta_tile[..., None]) * slope(s, params)
            allowed = None
            if masked:
                allowed = tile_mask.allowed(b, i, j, tiles)
                p, ds = jnp.where(allowed, p, 0.0), jnp.where(allowed, ds, 0.0)
            # An attended NaN or Inf in q or k is in ds already, one that is masked out must not meet ds = 0.
            q_clean, k_clean = ((_finite(x) if masked else x).astype(tiles.weights) for x in (q_tile, k_tile))
            ds = ds.astype(tiles.weights)
            dq_tile = _query_tile(dq, b, head, i, tiles) + _dot(ds, k_clean, (1, 0), dtype)
            dq = _put_query_tile(dq, dq_tile, b, head, i, tiles)
            dk_tile = dk_tile + _dot(ds, q_clean, (0, 0), dtype)
            return dq, dk_tile, dv_tile + _weigh(p, dout_tile, allowed, 0, tiles)

        dq, dk, dv = grads
        zeros = (jnp.zeros_like(k_tile, dtype), jnp.zeros_like(v_tile, dtype))
        zeros = tuple(vary_like(x, *references) for x in zeros)
        dq, dk_tile, dv_tile = _visit(visits, b, j, tiles.num_q, column, (dq, *zeros))
        start = (b, head, j * tiles.block_kv, 0)
        return dq, _put(dk, dk_tile, start), _put(dv, dv_tile, start)

    dq, dk, dv = jax.lax.fori_loop(0, tiles.steps(tiles.num_kv), row, (dq, dk, dv))
    return Gradients(dq=_ungrouped(dq, q_length), dk=dk[:, :, :k_length], dv=dv[:, :, :k_length])


def _fold(
    running: Partial, s: Array, values: Array, allowed: Bool[Array, "R S"] | None, params: KernelParams, tiles: _Tiles
) -> Partial:
    """One step of the online softmax for a tile of R queries, given the scores."""
    top = jnp.maximum(running.max, s.max(axis=-1))
    p = weights(s, Normaliser(top[..., None]), params)
    if allowed is not None:
        p = jnp.where(allowed, p, 0.0)  # where nothing was attended yet, exp(NO_LOGIT - NO_LOGIT) is 1
    rescale = weights(running.max, Normaliser(top), params)
    acc = running.acc * rescale[..., None] + _weigh(p, values, allowed, 1, tiles)
    return Partial(acc, top, running.sum * rescale + p.sum(axis=-1))


def _weigh(p: Array, values: Array, allowed: Bool[Array, "R S"] | None, axis: int, tiles: _Tiles) -> Array:
    """Contract ``axis`` of p with axis 0 of values; a NaN or Inf in values reaches only results that may see it.

    0 * NaN is NaN, so values that are masked out for some rows are set to zero, and NaN is put back where attended.
    """
    dtype, p, values = p.dtype, p.astype(tiles.weights), values.astype(tiles.weights)
    product = lambda weights, x: _dot(weights, x, (axis, 0), dtype)  # noqa: E731
    if allowed is None:
        return product(p, values)
    clean = product(p, _finite(values))

    def mark() -> Array:
        bad = (~jnp.isfinite(values)).astype(p.dtype)
        return jnp.where(product(jnp.broadcast_to(allowed, p.shape).astype(p.dtype), bad) > 0, jnp.nan, clean)

    return jax.lax.cond(jnp.all(jnp.isfinite(values)), lambda: clean, mark)


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0.0)


def _dot(a: Array, b: Array, axes: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Contract one axis of each matrix [rows, heads, ., .], accumulating in ``dtype``; float32 multiplied in full."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    if a.shape[:2] == (1, 1):
        dimensions = (((axes[0],), (axes[1],)), ((), ()))
        product = jax.lax.dot_general(a[0, 0], b[0, 0], dimensions, precision=precision, preferred_element_type=dtype)
        return product[None, None]
    dimensions = (((2 + axes[0],), (2 + axes[1],)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)


def _visit(
    visits: Visits | None,
    b: Array,
    row: Array,
    num_columns: int,
    column: Callable[[Array, Any, bool], Any],
    init: Any,
) -> Any:
    """Run ``column(tile, state, masked)`` for every tile that this row visits."""
    if visits is None:
        return jax.lax.fori_loop(0, num_columns, lambda j, state: column(j, state, False), init)
    b = b if visits.full.shape[0] > 1 else jnp.zeros_like(b)
    full, visit = visits.full[b, row], visits.visit[b, row]

    def nth(n: Array) -> Array:
        if visits.order is not None:
            return visits.order[b, row, n]
        assert visits.start is not None and visits.full_start is not None
        return nth_in_range(n, full, visits.start[b, row], visits.full_start[b, row])

    state = jax.lax.fori_loop(0, full, lambda n, state: column(nth(n), state, False), init)
    return jax.lax.fori_loop(full, visit, lambda n, state: column(nth(n), state, True), state)


def _tiling(block: Block, params: KernelParams) -> _Tiles:
    (batch, heads, q_length, _), (_, kv_heads, k_length, _) = block.q.shape, block.k.shape
    one_head = params.device_kind in ("", "cpu") or params.device_kind.startswith("TPU")
    most_q = _DEFAULT_TILE if one_head else _QUERIES
    block_q = _tile(q_length, params.block_q, most_q)
    group, rows, together = heads // kv_heads, 1, 1
    area = min(_FULL_AREA if block.mask.is_full else _AREA, _LOGITS // group)
    block_kv = _tile(k_length, params.block_kv, _DEFAULT_TILE if one_head else area // min(block_q, _QUERIES))
    if not one_head:
        logits = group * block_q * block_kv
        together = _divisor(kv_heads, _LOGITS // logits)
        of_mask = jax.tree.leaves((block.mask.vectors(), block.mask.numbers(q_length, k_length)))
        if together == kv_heads and all(x.shape[0] == 1 for x in of_mask):
            rows = _divisor(batch, _LOGITS // (logits * kv_heads))
    return _Tiles(
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        rows=rows,
        heads=together,
        block_q=block_q,
        block_kv=block_kv,
        num_q=-(-q_length // block_q),
        num_kv=-(-k_length // block_kv),
        weights=wide(block.q.dtype) if one_head else block.q.dtype,
    )


def _divisor(count: int, most: int) -> int:
    """The largest divisor that is at most so many, and one at least."""
    return max(n for n in range(1, count + 1) if count % n == 0 and n <= max(most, 1))


def _tile_mask(block: Block, tiles: _Tiles) -> _TileMask:
    q_length, k_length = block.q.shape[2], block.k.shape[2]
    q_total, k_total = tiles.num_q * tiles.block_q, tiles.num_kv * tiles.block_kv
    rule = block.mask.rule(q_length, k_length, ragged_q=q_total != q_length, ragged_kv=k_total != k_length)
    return _TileMask(rule, *block.mask.vectors(q_total, k_total), block.mask.numbers(q_length, k_length))


def _cut(vectors: Vectors, b: Array, tile: Array, size: int) -> tuple[Vectors, Array]:
    """The part of the vectors that belongs to one tile, and its tokens' indices."""
    start = tile * size

    def cut(x: Array) -> Array:
        at = _as_index((b if x.shape[0] > 1 else 0, start))
        return jax.lax.dynamic_slice(x, at, (1, size))[0]

    return jax.tree.map(cut, vectors), start + jnp.arange(size, dtype=jnp.int32)


def _tile(length: int, requested: int | None, most: int) -> int:
    """The tile size: as requested, else equal tiles of at most so many tokens, so that padding is small or none."""
    if requested is not None:
        return min(requested, length)
    count = -(-length // most)
    return -(-length // count)


def _pad(x: Array, block: int) -> Array:
    """Append zeros along the sequence (axis 2) up to a multiple of the tile."""
    extra = -x.shape[2] % block
    return jnp.pad(x, [(0, extra if axis == 2 else 0) for axis in range(x.ndim)]) if extra else x


def _grouped(x: Array, tiles: _Tiles) -> Array:
    """[B, N, ...] as [B, K, G, ...]."""
    return x.reshape(tiles.batch, tiles.kv_heads, tiles.group, *x.shape[2:])


def _ungrouped(x: Array, length: int) -> Array:
    """[B, K, G, T, ...] as [B, N, T, ...], the padding cut off."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :, :length]


def _query_tile(x: Array, b: Array, head: Array, i: Array, tiles: _Tiles) -> Array:
    """Of all G query heads of each K/V head: [rows, heads, G * block_q, ...]."""
    start = (b, head, 0, i * tiles.block_q, *(0,) * (x.ndim - 4))
    size = (tiles.rows, tiles.heads, tiles.group, tiles.block_q, *x.shape[4:])
    cut = jax.lax.dynamic_slice(x, _as_index(start), size)
    return cut.reshape(tiles.rows, tiles.heads, tiles.group * tiles.block_q, *x.shape[4:])


def _put_query_tile(x: Array, tile: Array, b: Array, head: Array, i: Array, tiles: _Tiles) -> Array:
    start = (b, head, 0, i * tiles.block_q, *(0,) * (x.ndim - 4))
    return _put(x, tile.reshape(tiles.rows, tiles.heads, tiles.group, tiles.block_q, *x.shape[4:]), start)


def _key_tile(x: Array, b: Array, head: Array, j: Array, tiles: _Tiles) -> Array:
    """[rows, heads, block_kv, ...]."""
    start = (b, head, j * tiles.block_kv, 0)
    return jax.lax.dynamic_slice(x, _as_index(start), (tiles.rows, tiles.heads, tiles.block_kv, x.shape[3]))


def _put(x: Array, tile: Array, start: tuple[Array | int, ...]) -> Array:
    return jax.lax.dynamic_update_slice(x, tile, _as_index(start))


def _as_index(start: tuple[Array | int, ...]) -> tuple[Array, ...]:
    return tuple(jnp.int32(s) for s in start)
