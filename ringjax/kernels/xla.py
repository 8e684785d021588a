"""The readable block kernel in jax.numpy. Runs everywhere; blocked, so no T x S array ever exists.

A loop over tiles of queries (backward: of keys), in it a loop over the tiles that the block map lists: FULL tiles
first, without a predicate, then PARTIAL ones with it. FlashAttention-2's recurrences, Dao 2023, arXiv:2307.08691.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from .._compat import vary_like
from ..mask import BlockMap, Mask, block_map, tile_kinds
from ..partial import NO_LOGIT, Partial, attends_to_nothing, identity, wide
from ..partial import finish as finish_partial
from .base import KernelParams
from .softmax import factor, scores

# 256 x 256 float32 logits (256 KiB) stay in a core's cache, and fewer PARTIAL tiles than with larger ones; see
# docs/optimisation-log.md.
_DEFAULT_TILE = 256


class _Tiles(NamedTuple):
    """Sizes of one call after padding. A row of the outer loop is one (batch row, K/V head, tile)."""

    batch: int
    kv_heads: int
    group: int
    block_q: int
    block_kv: int
    num_q: int
    num_kv: int


def forward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S Hv"],
    mask: Mask,
    params: KernelParams,
    *,
    carry: Partial | None,
    finish: bool,
    sinks: Float[Array, " N"] | None,
) -> Partial | tuple[Float[Array, "B N T Hv"], Float[Array, "B N T"]]:
    """See :class:`ringjax.kernels.base.Kernel`."""
    dtype, length = wide(q.dtype), q.shape[2]
    tiles, mask = _tiling(q, k, mask, params)
    if carry is None:
        nothing = identity(q.shape[:3], v.shape[3], dtype)
        carry = Partial(*(vary_like(x, q, k, v, *jax.tree.leaves(mask)) for x in nothing))
    q = _grouped(_pad(q, tiles.block_q), tiles)
    k, v = _pad(k, tiles.block_kv), _pad(v, tiles.block_kv)
    state = Partial(*(_grouped(_pad(x, tiles.block_q), tiles) for x in carry))
    visits = None if mask.is_full else block_map(tile_kinds(mask, tiles.block_q, tiles.block_kv))

    def row(index: Array, state: Partial) -> Partial:
        b, head, i = _unravel(index, tiles.kv_heads, tiles.num_q)
        q_tile = _query_tile(q, b, head, i, tiles)
        q_mask = mask.queries(b, i * tiles.block_q, tiles.block_q)

        def column(j: Array, running: Partial, masked: bool) -> Partial:
            k_tile, v_tile = (_key_tile(x, b, head, j, tiles) for x in (k, v))
            s = scores(_dot(q_tile, k_tile, (1, 1), dtype), params)
            allowed = None
            if masked:
                allowed = _allowed(q_mask.keys(b, j * tiles.block_kv, tiles.block_kv), tiles)
                s = jnp.where(allowed, s, NO_LOGIT)
            return _fold(running, s, v_tile, allowed, factor(params))

        running = Partial(*(_query_tile(x, b, head, i, tiles) for x in state))
        running = _visit(visits, b, i, tiles.num_kv, column, running)
        return Partial(*(_put_query_tile(x, new, b, head, i, tiles) for x, new in zip(state, running, strict=True)))

    state = jax.lax.fori_loop(0, tiles.batch * tiles.kv_heads * tiles.num_q, row, state)
    result = Partial(*(_ungrouped(x, length) for x in state))
    if not finish:
        return result
    out, lse = finish_partial(result._replace(max=result.max * factor(params)), sinks)  # until here of the scores
    return out.astype(q.dtype), lse


def backward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S Hv"],
    dout: Float[Array, "B N T Hv"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    mask: Mask,
    params: KernelParams,
    *,
    dq_carry: Float[Array, "B N T H"] | None,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S Hv"]]:
    """See :class:`ringjax.kernels.base.Kernel`. One pass over the tiles: five products each."""
    dtype, q_length, k_length = wide(q.dtype), q.shape[2], k.shape[2]
    references = (q, k, v, dout, *jax.tree.leaves(mask))
    tiles, mask = _tiling(q, k, mask, params)
    if dq_carry is None:
        dq_carry = vary_like(jnp.zeros(q.shape, dtype), *references)
    # In the unit of the scores. A query that attends to nothing has p = 0 everywhere; any finite number will do there.
    lse = jnp.where(attends_to_nothing(lse), 0.0, lse) / factor(params)
    q, dout, lse, delta, dq = (_grouped(_pad(x, tiles.block_q), tiles) for x in (q, dout, lse, delta, dq_carry))
    k, v = _pad(k, tiles.block_kv), _pad(v, tiles.block_kv)
    dk, dv = (vary_like(jnp.zeros(x.shape, dtype), *references) for x in (k, v))
    visits = None
    if not mask.is_full:
        visits = block_map(jnp.swapaxes(tile_kinds(mask, tiles.block_q, tiles.block_kv), 1, 2))

    def row(index: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        b, head, j = _unravel(index, tiles.kv_heads, tiles.num_kv)
        k_tile, v_tile = (_key_tile(x, b, head, j, tiles) for x in (k, v))
        k_mask = mask.keys(b, j * tiles.block_kv, tiles.block_kv)

        def column(i: Array, sums: tuple[Array, Array, Array], masked: bool) -> tuple[Array, Array, Array]:
            dq, dk_tile, dv_tile = sums
            q_tile, dout_tile, lse_tile, delta_tile = (_query_tile(x, b, head, i, tiles) for x in (q, dout, lse, delta))
            s = scores(_dot(q_tile, k_tile, (1, 1), dtype), params)
            p = jnp.exp((s - lse_tile[:, None]) * factor(params))
            ds = p * (_dot(dout_tile, v_tile, (1, 1), dtype) - delta_tile[:, None])
            if params.logits_soft_cap is not None:
                ds = ds * (1.0 - jnp.square(s))
            allowed = None
            if masked:
                allowed = _allowed(k_mask.queries(b, i * tiles.block_q, tiles.block_q), tiles)
                p, ds = jnp.where(allowed, p, 0.0), jnp.where(allowed, ds, 0.0)
            ds = (ds * params.scale).astype(q.dtype)
            # An attended NaN or Inf in q or k is in ds already, one that is masked out must not meet ds = 0.
            q_clean, k_clean = (_finite(x) if masked else x for x in (q_tile, k_tile))
            dq_tile = _query_tile(dq, b, head, i, tiles) + _dot(ds, k_clean, (1, 0), dtype)
            dq = _put_query_tile(dq, dq_tile, b, head, i, tiles)
            dk_tile = dk_tile + _dot(ds, q_clean, (0, 0), dtype)
            return dq, dk_tile, dv_tile + _weigh(p, dout_tile, allowed, 0)

        dq, dk, dv = grads
        zeros = (jnp.zeros_like(k_tile, dtype), jnp.zeros_like(v_tile, dtype))
        zeros = tuple(vary_like(x, *references) for x in zeros)
        dq, dk_tile, dv_tile = _visit(visits, b, j, tiles.num_q, column, (dq, *zeros))
        start = (b, head, j * tiles.block_kv, 0)
        return dq, _put(dk, dk_tile[None, None], start), _put(dv, dv_tile[None, None], start)

    dq, dk, dv = jax.lax.fori_loop(0, tiles.batch * tiles.kv_heads * tiles.num_kv, row, (dq, dk, dv))
    return _ungrouped(dq, q_length), dk[:, :, :k_length], dv[:, :, :k_length]


def _fold(running: Partial, s: Array, values: Array, allowed: Bool[Array, "R S"] | None, factor: float) -> Partial:
    """One step of the online softmax for a tile of R queries, given the scores and what makes logits of them."""
    top = jnp.maximum(running.max, s.max(axis=-1))
    p = jnp.exp((s - top[:, None]) * factor)
    if allowed is not None:
        p = jnp.where(allowed, p, 0.0)  # where nothing was attended yet, exp(NO_LOGIT - NO_LOGIT) is 1
    rescale = jnp.exp((running.max - top) * factor)
    acc = running.acc * rescale[:, None] + _weigh(p, values, allowed, 1)
    return Partial(acc, top, running.sum * rescale + p.sum(axis=-1))


def _weigh(p: Array, values: Array, allowed: Bool[Array, "R S"] | None, axis: int) -> Array:
    """Contract ``axis`` of p with axis 0 of values; a NaN or Inf in values reaches only results that may see it.

    0 * NaN is NaN, so values that are masked out for some rows are set to zero, and NaN is put back where attended.
    """
    product = lambda weights, x: _dot(weights, x, (axis, 0), p.dtype)  # noqa: E731
    if allowed is None:
        return product(p.astype(values.dtype), values)
    clean = product(p.astype(values.dtype), _finite(values))

    def mark() -> Array:
        bad = (~jnp.isfinite(values)).astype(p.dtype)
        return jnp.where(product(allowed.astype(p.dtype), bad) > 0, jnp.nan, clean)

    return jax.lax.cond(jnp.all(jnp.isfinite(values)), lambda: clean, mark)


def _finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0.0)


def _dot(a: Array, b: Array, axes: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Contract one axis of each matrix, accumulating in ``dtype``.

    float32 is multiplied in full on every platform: by default XLA takes TF32 on a GPU, where logits that share an
    offset lose their digits.
    """
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)


def _visit(
    visits: BlockMap | None,
    b: Array,
    row: Array,
    num_columns: int,
    column: Callable[[Array, Any, bool], Any],
    init: Any,
) -> Any:
    """Run ``column(tile, state, masked)`` for every tile that the map lists in this row."""
    if visits is None:
        return jax.lax.fori_loop(0, num_columns, lambda j, state: column(j, state, False), init)
    b = b if visits.full.shape[0] > 1 else jnp.zeros_like(b)
    order, full, visit = visits.order[b, row], visits.full[b, row], visits.visit[b, row]
    state = jax.lax.fori_loop(0, full, lambda n, state: column(order[n], state, False), init)
    return jax.lax.fori_loop(full, visit, lambda n, state: column(order[n], state, True), state)


def _tiling(q: Array, k: Array, mask: Mask, params: KernelParams) -> tuple[_Tiles, Mask]:
    """Tile sizes, and the mask of the padded lengths."""
    (batch, heads, q_length, _), (_, kv_heads, k_length, _) = q.shape, k.shape
    block_q, block_kv = _tile(q_length, params.block_q), _tile(k_length, params.block_kv)
    num_q, num_kv = -(-q_length // block_q), -(-k_length // block_kv)
    tiles = _Tiles(batch, kv_heads, heads // kv_heads, block_q, block_kv, num_q, num_kv)
    return tiles, mask.padded(q_length, num_q * block_q, k_length, num_kv * block_kv)


def _tile(length: int, requested: int | None) -> int:
    """The tile size: as requested, else equal tiles of at most the default, so that padding is small or none."""
    if requested is not None:
        return min(requested, length)
    count = -(-length // _DEFAULT_TILE)
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


def _unravel(index: Array, heads: int, num_tiles: int) -> tuple[Array, Array, Array]:
    row, tile = index // num_tiles, index % num_tiles
    return row // heads, row % heads, tile


def _query_tile(x: Array, b: Array, head: Array, i: Array, tiles: _Tiles) -> Array:
    """Rows of all G query heads of one K/V head: [G * block_q, ...]."""
    start = (b, head, 0, i * tiles.block_q, *(0,) * (x.ndim - 4))
    size = (1, 1, tiles.group, tiles.block_q, *x.shape[4:])
    return jax.lax.dynamic_slice(x, _as_index(start), size).reshape(tiles.group * tiles.block_q, *x.shape[4:])


def _put_query_tile(x: Array, tile: Array, b: Array, head: Array, i: Array, tiles: _Tiles) -> Array:
    start = (b, head, 0, i * tiles.block_q, *(0,) * (x.ndim - 4))
    return _put(x, tile.reshape(1, 1, tiles.group, tiles.block_q, *x.shape[4:]), start)


def _key_tile(x: Array, b: Array, head: Array, j: Array, tiles: _Tiles) -> Array:
    start = (b, head, j * tiles.block_kv, 0)
    return jax.lax.dynamic_slice(x, _as_index(start), (1, 1, tiles.block_kv, x.shape[3]))[0, 0]


def _put(x: Array, tile: Array, start: tuple[Array | int, ...]) -> Array:
    return jax.lax.dynamic_update_slice(x, tile, _as_index(start))


def _as_index(start: tuple[Array | int, ...]) -> tuple[Array, ...]:
    return tuple(jnp.int32(s) for s in start)


def _allowed(mask: Mask, tiles: _Tiles) -> Bool[Array, "R S"]:
    """The predicate of one tile, repeated for the G query heads."""
    tile = jnp.broadcast_to(mask.predicate(), (1, tiles.block_q, tiles.block_kv))
    return jnp.broadcast_to(tile, (tiles.group, *tile.shape[1:])).reshape(-1, tiles.block_kv)
